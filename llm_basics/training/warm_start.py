"""Warm start: initial weights from another run or an imported model."""

import dataclasses
from pathlib import Path

from llm_basics.cli import nested
from llm_basics.core import config, presets
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import prepare, tokenizer_formats
from llm_basics.inference import engine
from llm_basics.runs import run_dir

# model options that may differ from the run's: they affect no weight, or only the number of embedding rows
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
    # avoids downloading GPT-2's tokenizer
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
    whose relative probabilities are unchanged (Hewitt 2021, Initializing new word embeddings for pretrained
    language models); a randomly initialized row could have most of the probability, or none.
    """
    model.load_state_dict(engine.initial_weights(folder, model.config))
