"""The weights of another run to begin with, or of an imported model, which is a run directory too."""

import dataclasses
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llm_basics.core import config, presets
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import prepare, tokenizer_formats
from llm_basics.inference import engine
from llm_basics.runs import run_dir

# options of a model that may be others than those of the weights: they decide no weight, or only how many
# rows there are
FREE = {"vocab_size", "vocab_multiple", "dropout", "init", "zero_init"}

# how many merges GPT-2's tokenizer has
GPT2_MERGES = 50_000


def check(options: config.Config, folder: str) -> None:
    """Raise ValueError unless the run in `folder` has the model and the tokenizer that `options` ask for."""
    theirs = presets.update(config.Config(), run_dir.read_config(folder), origin=f"{folder}/config.json")
    found = presets.differences(dataclasses.asdict(theirs.model), dataclasses.asdict(options.model))
    differences = [
        f"model.{name} is {there} there, here {here}"
        for name, (there, here) in found.items()
        if name not in FREE
    ]
    if differences:
        raise ValueError(f"the model must be that of --init_from {folder}, but {'; '.join(differences)}")
    known = tokenizer_formats.load(Path(folder) / "tokenizer")
    # known without fetching it
    is_other = options.tokenizer == "gpt2" and len(known.merges) != GPT2_MERGES
    if (
        options.tokenizer == "bpe"
        or is_other
        or not extends(prepare.load_tokenizer(options.tokenizer), known)
    ):
        raise ValueError(
            f"the tokenizer must be that of --init_from {folder}, got {options.tokenizer}, which gives other "
            "ids; leave --tokenizer out"
        )


def extends(tokenizer: tokenizers.Tokenizer, known: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer gives the ids of another, and at most has special tokens that it lacks."""
    return (
        known.vocab.items() <= tokenizer.vocab.items()
        and (known.merges, known.pattern) == (tokenizer.merges, tokenizer.pattern)
        and set(known.special_tokens) <= set(tokenizer.special_tokens)
    )


def load_initial_weights(model: models.TransformerLM, folder: str) -> None:
    """Give a model the weights of the newest checkpoint of a run; tokens that are new get rows of their own.

    A new row is the mean of the old ones. So the model gives a new token no more than the mean probability of
    the old ones, and what it predicted among these stays (Hewitt 2021, Initializing new word embeddings for
    pretrained language models); a row as drawn for a new model could take most of the probability, or none.
    """
    theirs, tokenizer = engine.load_run(folder)
    # rows behind these are no token's, or were never trained
    n_known = min(tokenizer.vocab_size, theirs.config.vocab_size)
    weights = theirs.state_dict()
    for name in weights:
        if name.startswith(("token_embeddings.", "lm_head.")):
            weights[name] = with_rows(weights[name][:n_known], model.config.padded_vocab_size)
    model.load_state_dict(weights)


def with_rows(known: Float[Tensor, "known d"], n_rows: int) -> Float[Tensor, "rows d"]:
    """The matrix with new rows behind its own, each the mean of these.

    >>> with_rows(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), 3)
    tensor([[1., 2.],
            [3., 6.],
            [2., 4.]])
    """
    return torch.cat([known, known.mean(0, keepdim=True).expand(n_rows - len(known), -1)])
