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


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how good trained models are, on text that they have not seen."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of runs, side by side; none, or newest: the one under runs/ that was written to last."""
    data: str | None = None
    """A text file, a folder or a glob of them, or stdlib. None: what the run held out, or --choices alone."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes of data that are not UTF-8: stop and say where, or replace them by U+FFFD."""
    checkpoint: str = "latest"
    """latest, best (the lowest validation loss), or a number of steps."""
    stride: int | None = None
    """Tokens from one window of text to the next: fewer leave each token more to go by, and take longer.
    None: as many as the model sees at once, windows side by side."""
    choices: str | None = None
    """A file of questions, one JSON object a line: prompt (or question), choices, and answer, which counts
    from 0."""
    delimiter: str = " "
    """Between a prompt and a choice, unless white space is there."""
    batch_size: int = 8
    """Windows in one forward pass."""
    out: str | None = None
    """A JSON file to write everything to."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of these that is there."""
    fast: Literal["on", "off"] = "on"
    """Use the fast twins of the pieces where there are some; off: the readable reference alone."""
    mine: str | None = None
    """A Python file with pieces of your own, which are used in the place of the reference's."""

    def __post_init__(self) -> None:
        for name in ("stride", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class HarnessConfig:
    """Run tasks of EleutherAI's lm-evaluation-harness on a trained model."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """The folder of a run; newest is the one under runs/ that was written to last."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, such as arc_easy hellaswag; their data comes from Hugging Face, and is kept."""
    include_path: str | None = None
    """A folder with tasks of your own, in YAML, in the place of the harness's."""
    num_fewshot: int | None = None
    """Solved examples before each question. None: as the task says."""
    limit: int | None = None
    """Questions of each task. None: all."""
    checkpoint: str = "latest"
    """latest, best (the lowest validation loss), or a number of steps."""
    batch_size: int = 8
    """Texts in one forward pass."""
    out: str | None = None
    """A JSON file to write the results to."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of these that is there."""
    fast: Literal["on", "off"] = "on"
    """Use the fast twins of the pieces where there are some; off: the readable reference alone."""
    mine: str | None = None
    """A Python file with pieces of your own, which are used in the place of the reference's."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
