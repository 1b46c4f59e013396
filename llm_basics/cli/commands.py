"""The programs around training: their options, with defaults and meanings."""

import math
from dataclasses import dataclass
from typing import Literal

import tyro


def _check_sampling(options: "GenerateConfig | ChatConfig") -> None:
    """Raise ValueError for settings with which nothing can be drawn."""
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {options.temperature}")
    if options.top_k is not None and options.top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {options.top_k}")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {options.top_p}")
    if options.min_p is not None and not 0 <= options.min_p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, got {options.min_p}")
    if not 0 < options.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0, got {options.repetition_penalty}")


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
        if self.source == "-" and not self.out:
            raise ValueError(
                "--out must name the folder to make, since standard input (-) has no name, got none"
            )
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
    prompts: str | None = None
    """A file of prompts, one a line; of a .jsonl, the "prompt" of each line."""
    out: str | None = None
    """Write what is generated to this JSONL file, a line for each text, and not to the terminal."""
    max_new_tokens: int = 200
    """The most tokens to write; the end of the document stops earlier."""
    temperature: float = 0.8
    """0: always the likeliest token; 1: as the model has learned; above: more surprising."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the likeliest one's probability (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1: what stands in the text becomes less likely, 1.2 being usual (arXiv 1909.05858)."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End a text before this string. Can be given several times."""
    seed: int = 0
    """The same seed writes the same text."""
    samples: int = 1
    """How many texts to write for each prompt, with seeds counting up."""
    show_probs: bool = False
    """Show each token with the probability that the model gave it, and what it found likely instead."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of these that is there."""
    fast: Literal["on", "off"] = "on"
    """Use the fast twins of the pieces where there are some; off: the readable reference alone."""
    mine: str | None = None
    """A Python file with pieces of your own, which are used in the place of the reference's."""

    def __post_init__(self) -> None:
        _check_sampling(self)
        if self.max_new_tokens < 0 or self.samples < 1:
            raise ValueError(f"nothing to write: got {self.max_new_tokens} tokens in {self.samples} samples")
        if "" in self.stop:
            raise ValueError("stop must be a string of at least one character, got an empty one")
        if self.prompts is not None and self.prompt:
            raise ValueError("prompts must stand without prompt, got both; put the prompt into the file")
        if self.out is not None and self.show_probs:
            raise ValueError("show_probs must stand without out, got both: it is for the terminal")


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model that was fine-tuned for it."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """The folder of a run; newest is the one under runs/ that was written to last."""
    checkpoint: str = "latest"
    """latest, best (the lowest validation loss), or a number of steps."""
    message: str | None = None
    """Say this, show the answer, and end."""
    system: str = ""
    """What the model is told before the conversation."""
    max_new_tokens: int = 256
    """The most tokens of an answer."""
    temperature: float = 0.7
    """0: always the likeliest token; 1: as the model has learned; above: more surprising."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the likeliest one's probability (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1: what stands in the answer already becomes less likely (arXiv 1909.05858)."""
    seed: int = 0
    """The same seed and the same messages give the same answers."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of these that is there."""
    fast: Literal["on", "off"] = "on"
    """Use the fast twins of the pieces where there are some; off: the readable reference alone."""
    mine: str | None = None
    """A Python file with pieces of your own, which are used in the place of the reference's."""

    def __post_init__(self) -> None:
        _check_sampling(self)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


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


@dataclass(frozen=True)
class PlotConfig:
    """Draw the metrics of training runs over each other."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("newest",)
    """Run directories, their names under runs/, or newest."""
    x: Literal["step", "tokens", "time"] = "step"
    """The x axis: steps, tokens, or seconds of training without evaluation and saving."""
    y: str = "train_loss,val_loss"
    """Metrics to draw, names from metrics.jsonl separated by commas; losses share a panel."""
    log: bool = False
    """A logarithmic y axis."""
    smooth: int = 1
    """Window of the moving average of training metrics; the raw values are drawn faintly."""
    out: str = "runs.png"
    """Figure to write, as .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one run, got none")
        if self.smooth < 1:
            raise ValueError(f"smooth must be at least 1, got {self.smooth}")
        if not self.out.endswith((".png", ".svg", ".pdf")):
            raise ValueError(f"out must end in .png, .svg or .pdf, got {self.out}")


@dataclass(frozen=True)
class CompareConfig:
    """Compare training runs: results, options that differ, samples."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("newest",)
    """Run directories, their names under runs/, or newest."""
    x: Literal["step", "tokens", "time"] = "step"
    """The x axis of the curves in the report."""
    out: str | None = None
    """HTML report to write, self-contained, with its curves beside it as .png."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one run, got none")
        if self.out is not None and not self.out.endswith(".html"):
            raise ValueError(f"out must end in .html, got {self.out}")


@dataclass(frozen=True)
class SweepConfig:
    """Train each setting of a sweep, and compare the results. The same command resumes."""

    sweep: tyro.conf.Positional[str] = "lr"
    """A preset (lr, batch, ablations, scaling) or a YAML file with base, grid, variants, seeds."""
    jobs: int = 1
    """Training runs at the same time, which share the CPU cores."""
    out: str | None = None
    """Folder of the runs and their comparison. None: runs/ and the name of the sweep."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")


@dataclass(frozen=True)
class ProbeConfig:
    """See whether a small model learns tasks whose right answers are known."""

    task: tyro.conf.Positional[str] = "all"
    """What to learn: reverse, invert, copy, addition, induction, markov, or all of these."""
    mine: str | None = None
    """A Python file with pieces of yours, which take the place of the reference's."""
    steps: int | None = None
    """Number of optimizer steps. None: as many as the task needs."""
    seed: int = 0
    """Fixes initial weights, training sequences and held-out sequences."""
    out: str = "probes"
    """Folder for the figures."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
