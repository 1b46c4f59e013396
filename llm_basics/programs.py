"""The programs around training: their options, with defaults and meanings."""

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class PrepareConfig:
    """Make token files of text: once, and from there on training starts at once."""

    source: tyro.conf.Positional[str] = "stdlib"
    """A file of text, .jsonl or .parquet, also packed (.gz); a folder or a quoted glob of them; stdlib; - for
    standard input; of Hugging Face tinystories, openwebtext, fineweb-edu, hub:NAME or hub:NAME:CONFIG."""
    out: str = ""
    """The folder to make; train takes it as --data. Empty: data/ and the name of the source."""
    tokenizer: str = "bpe"
    """bpe (learned from the text), bytes, gpt2 (fetched by tiktoken), a saved folder or a tokenizer.json."""
    vocab_size: int = 10_000
    """Size of the vocabulary that bpe learns."""
    sample_bytes: int = 100_000_000
    """Of this much text, the first to train on, bpe learns."""
    val_fraction: float = 0.01
    """Share of the documents held out for validation; of a single document, its end."""
    max_tokens: int | None = None
    """Stop behind the document with which there are this many tokens. None: take all."""
    shard_tokens: int = 100_000_000
    """Tokens in a file; after each file, a run that is killed can go on from there."""
    text_field: str = "text"
    """The field of JSON lines, Parquet and data sets that holds the text."""
    form: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """How files are written. auto: as their names end; standard input is text."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8: stop and say where, or replace them by U+FFFD."""
    fast: Literal["on", "off"] = "on"
    """Use the fast twins of the tokenizer; off: the readable reference alone."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be above 0 and below 1, got {self.val_fraction}")
        for name in ("sample_bytes", "max_tokens", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class GenerateConfig:
    """Let a trained model write."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """The folder of a run; newest is the one under runs/ that was written to last."""
    checkpoint: str = "latest"
    """latest, best (the lowest validation loss), or a number of steps."""
    prompt: str = ""
    """Text to continue. Empty: begin a new document."""
    max_new_tokens: int = 200
    """The most tokens to write; the end of the document stops earlier."""
    temperature: float = 0.8
    """0: always the likeliest token; 1: as the model has learned; above: more surprising."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """The same seed writes the same text."""
    samples: int = 1
    """How many texts to write, with seeds counting up."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of these that is there."""
    fast: Literal["on", "off"] = "on"
    """Use the fast twins of the pieces where there are some; off: the readable reference alone."""
    mine: str | None = None
    """A Python file with pieces of your own, which are used in the place of the reference's."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 0 or self.samples < 1:
            raise ValueError(f"nothing to write: got {self.max_new_tokens} tokens in {self.samples} samples")
