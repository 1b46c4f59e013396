"""Run directories without training: written by the same code that a training run writes with."""

import dataclasses
from pathlib import Path

from llm_basics.analysis import sweep_spec
from llm_basics.core import config
from llm_basics.runs import run_dir


def record(folder, losses, samples=(), held_out=None, bits_per_byte=2.5, **changed):
    """A run whose step 10 i had the i-th of `losses`, evaluated at the last; options as `train__lr=1`.

    `held_out` are the hashes of the text and of the tokenizer.
    """
    options = sweep_spec.set_options(
        config.Config(model=config.ModelConfig(vocab_size=257, context_length=64, d_model=64)),
        {name.replace("__", "."): value for name, value in changed.items()},
        "a test",
    )
    options = dataclasses.replace(options, run_dir=str(folder))
    output = run_dir.RunDir(folder)
    measured_on = dict(zip(("text", "tokenizer"), held_out, strict=True)) if held_out else None
    output.write_config(dataclasses.asdict(options) | {run_dir.HELD_OUT: measured_on})
    for i, loss in enumerate(losses, start=1):
        output.metrics(10 * i, train_loss=loss, lr=options.train.lr, tokens_per_second=1000.0)
    if losses:
        last = losses[-1]
        results = {"perplexity": 9.0, "bits_per_byte": bits_per_byte, "accuracy": 0.25}
        output.metrics(10 * len(losses), val_loss=last + 0.5, **results)
    for prompt, text in samples:
        output.sample(10 * len(losses), prompt, text)
    output.checkpoint_path(10 * len(losses)).touch()
    output.close()
    return Path(folder)
