"""Run directories without training: written by the same code that a training run writes with."""

import dataclasses
from pathlib import Path

from llm_basics.analysis import sweep_spec
from llm_basics.core import config
from llm_basics.runs import run_dir


def record(folder, losses, samples=(), **changed):
    """A run whose step 10 i had the i-th of `losses`, evaluated at the last; options as `train__lr=1`."""
    options = sweep_spec.set_options(
        config.Config(model=config.ModelConfig(vocab_size=257, context_length=64, d_model=64)),
        {name.replace("__", "."): value for name, value in changed.items()},
        "a test",
    )
    options = dataclasses.replace(options, run_dir=str(folder))
    output = run_dir.RunDir(folder)
    output.write_config(dataclasses.asdict(options))
    for i, loss in enumerate(losses, start=1):
        output.metrics(10 * i, train_loss=loss, lr=options.train.lr, tokens_per_second=1000.0)
    if losses:
        last = losses[-1]
        output.metrics(
            10 * len(losses), val_loss=last + 0.5, perplexity=9.0, bits_per_byte=2.5, accuracy=0.25
        )
    for prompt, text in samples:
        output.sample(10 * len(losses), prompt, text)
    output.checkpoint_path(10 * len(losses)).touch()
    output.close()
    return Path(folder)
