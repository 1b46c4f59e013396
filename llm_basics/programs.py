"""The programs around training: their options, with defaults and meanings."""

from dataclasses import dataclass
from typing import Literal

import tyro


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


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as transformers reads it: GPT-2's layout, Llama's, Qwen3's or one of their relatives."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """The folder of a run; newest is the one under runs/ that was written to last."""
    out: str | None = None
    """The folder to write, which must be new or empty. None: exports/ with the name of the run."""
    checkpoint: str = "latest"
    """latest, best (the lowest validation loss), or a number of steps."""


@dataclass(frozen=True)
class ImportConfig:
    """Make a run of a model that transformers has written, to let it write, evaluate it or train it on."""

    folder: tyro.conf.Positional[str] = "."
    """A folder with config.json, safetensors and a tokenizer, as from `save_pretrained` or a download."""
    out: str | None = None
    """The run directory to make, which must be new or empty. None: runs/ with the name of the folder."""
    tokenizer: str | None = None
    """bytes, gpt2, a folder or a tokenizer.json in the place of the tokenizer in the folder."""
