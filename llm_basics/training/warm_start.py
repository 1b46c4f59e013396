"""Warm start: initial weights from another run, or an imported model, which is a run directory too."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from llm_basics import swap
from llm_basics.alignment import lora
from llm_basics.cli import nested
from llm_basics.core import config, presets
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import prepare, tokenizer_formats
from llm_basics.inference import engine
from llm_basics.runs import checkpoint, run_dir

# model options that may differ from the run's: they change no weight, or only the number of embedding rows
MAY_DIFFER = {"vocab_size", "vocab_multiple", "dropout", "init", "zero_init"}

# number of merges of GPT-2's tokenizer
GPT2_MERGES = 50_000


def check(options: config.Config, folder: str) -> None:
    """Raise ValueError unless the run in `folder` has the model and the tokenizer of `options`."""
    saved = presets.update(config.Config(), run_dir.read_config(folder), origin=f"{folder}/config.json")
    found = nested.differences(dataclasses.asdict(saved.model), dataclasses.asdict(options.model))
    differences = [
        f"model.{name} is {value} there, got {got}"
        for name, (value, got) in found.items()
        if name not in MAY_DIFFER
    ]
    if differences:
        raise ValueError(f"the model must match --init_from {folder}, but {'; '.join(differences)}")
    known = tokenizer_formats.load(Path(folder) / "tokenizer")
    # without downloading GPT-2's
    is_other = options.tokenizer == "gpt2" and len(known.merges) != GPT2_MERGES
    if (
        options.tokenizer == "bpe"
        or is_other
        or not extends(prepare.load_tokenizer(options.tokenizer), known)
    ):
        raise ValueError(
            f"the tokenizer must be that of --init_from {folder}, got {options.tokenizer}, which has other "
            "ids; omit --tokenizer"
        )


def extends(tokenizer: tokenizers.Tokenizer, known: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer is `known`, or `known` with more special tokens."""
    return (
        known.vocab.items() <= tokenizer.vocab.items()
        and (known.merges, known.pattern) == (tokenizer.merges, tokenizer.pattern)
        and set(known.special_tokens) <= set(tokenizer.special_tokens)
    )


def load_initial_weights(model: models.TransformerLM, folder: str) -> None:
    """Load the weights of a run's newest checkpoint; new tokens get new rows in the embeddings.

    A new row is the mean of the old ones, so a new token has at most the mean probability of the old ones,
    and the predictions among these stay (Hewitt 2021, Initializing new word embeddings for pretrained
    language models); a randomly initialized row could take most of the probability, or none.
    """
    model.load_state_dict(engine.initial_weights(folder, model.config))


def check_parameters(model: nn.Module, expected: config.ModelConfig) -> None:
    """Raise ValueError if user code made other parameters than those of the model config."""
    if not swap.user_pieces():
        return
    with swap.reference_only():
        wanted = models.TransformerLM(expected, device="meta").state_dict()
    found = model.state_dict()
    differences = [f"missing parameter {name}" for name in wanted.keys() - found.keys()]
    differences += [f"unexpected parameter {name}" for name in found.keys() - wanted.keys()]
    differences += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if differences:
        listed = "; ".join(sorted(differences)[:3]) + (" ..." if len(differences) > 3 else "")
        raise ValueError(
            f"your model's parameters do not match the config: {listed}; implement the options of the "
            "config, or train without them (q_norm and k_norm: --model.no-qk_norm)"
        )


# --------------------------------------------------------------------------------------------------
# Adapters


def adapt(model: models.TransformerLM, options: config.Config) -> dict[str, Any]:
    """Load the base of a LoRA run into a new model, and freeze it but for adapters. Returns the base.

    A resumed run has the base that its checkpoints name. Raises ValueError for options that do not fit.
    """
    if options.train.parallel == "fsdp2":
        raise ValueError(
            "--train.parallel must be ddp, none or auto with --lora.rank, got fsdp2; adapters are not sharded"
        )
    if options.resume is None and options.init_from is None:
        raise ValueError("--lora.rank needs --init_from, the run whose weights are adapted, got none")
    base: dict[str, Any] = {}
    for path in checkpoint.files(Path(options.resume or "") / run_dir.CHECKPOINTS) if options.resume else ():
        with contextlib.suppress(ValueError):
            base = base or checkpoint.read_about(path).get("base", {})
    if options.resume is None:
        base = engine.describe_base(str(options.init_from))
    engine.adapt(model, options.lora, base)
    return base


def describe_adapters(model: models.TransformerLM, options: config.Config) -> str:
    """Rank, scale and number of the trained weights."""
    n_trained, n_all = lora.trainable_parameters(model)
    how = f"rank {options.lora.rank}, alpha {options.lora.alpha:g}"
    return f"{how}: {n_trained:,} of {n_all:,} parameters trained"
