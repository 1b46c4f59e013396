"""Options of the commands: names, defaults and meanings. Those of training are in core.config."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import tyro


def _check_at_least_one(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


# --------------------------------------------------------------------------------------------------
# Options that several commands share


@dataclass(frozen=True)
class FastOptions:
    """Whether fast kernels are used."""

    fast: Literal["on", "off"] = "on"
    """Use fast kernels where available; off: reference code only."""


@dataclass(frozen=True)
class PieceOptions(FastOptions):
    """Which implementation runs, and on which device."""

    mine: str | None = None
    """Python file with your pieces, used instead of the reference's."""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first available."""


@dataclass(frozen=True)
class RunOptions:
    """Which model is loaded."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """Run directory; newest: the most recently written under runs/."""
    checkpoint: str = "latest"
    """latest, best (lowest validation loss), or a step number."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled from the model's distribution."""

    max_new_tokens: int = 200
    """Maximum number of new tokens; the end of the document stops earlier."""
    temperature: float = 0.8
    """0: greedy; 1: the model's distribution; above 1: flatter."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = None
    """Nucleus sampling: the most likely tokens with this total probability (arXiv 1904.09751)."""
    min_p: float | None = None
    """Minimum probability of a token, relative to the most likely one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1: tokens already in the text become less likely; usually 1.2 (arXiv 1909.05858)."""
    seed: int = 0
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "top_k")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")


# --------------------------------------------------------------------------------------------------
# Commands


@dataclass(frozen=True)
class PrepareConfig(FastOptions):
    """Tokenize a corpus once into token files, which training then reads directly."""

    source: tyro.conf.Positional[str] = "stdlib"
    """Text, .jsonl or .parquet file, plain or compressed (.gz); a folder or a quoted glob of such files;
    stdlib (Python's standard library); - for standard input; or from Hugging Face tinystories,
    openwebtext, fineweb-edu, hub:NAME or hub:NAME:CONFIG."""
    out: str = ""
    """Output folder, which train accepts as --data. Empty: data/ and the name of the source."""
    tokenizer: str = "bpe"
    """bpe (trained on the text), bytes, gpt2 (downloaded by tiktoken), a folder or a tokenizer.json."""
    vocab_size: int = 10_000
    """Vocabulary size of bpe."""
    sample_bytes: int = 100_000_000
    """Train bpe on at most this many bytes from the start of the training split."""
    val_fraction: float = 0.01
    """Fraction of documents held out for validation; of a single document, its end."""
    max_tokens: int | None = None
    """Stop after the document that reaches this number of tokens. None: no limit."""
    shard_tokens: int = 100_000_000
    """Tokens per shard; an interrupted run resumes after the last complete shard."""
    text_field: str = "text"
    """Field of JSON lines, Parquet files and datasets that holds the text."""
    form: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """File format. auto: by file name; standard input is text."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """On invalid UTF-8: stop with the position, or replace the bytes with U+FFFD."""

    def __post_init__(self) -> None:
        if self.source == "-" and not self.out:
            raise ValueError("--out must name the output folder when reading standard input (-), got none")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be above 0 and below 1, got {self.val_fraction}")
        _check_at_least_one(self, "sample_bytes", "max_tokens", "shard_tokens")


@dataclass(frozen=True)
class GenerateConfig(SamplingOptions, PieceOptions, RunOptions):
    """Generate text with a trained model."""

    prompt: str = ""
    """Text to continue. Empty: start a new document."""
    prompts: str | None = None
    """File with one prompt per line; .jsonl: the "prompt" field of each line."""
    out: str | None = None
    """Write completions to this JSONL file, one per line, instead of the terminal."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop before this string; can be given several times."""
    samples: int = 1
    """Completions per prompt, with consecutive seeds."""
    show_probs: bool = False
    """Show the probability of each token and the most likely alternatives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_one(self, "samples")
        if "" in self.stop:
            raise ValueError("stop must be a string of at least one character, got an empty one")
        if self.prompts is not None and self.prompt:
            raise ValueError("prompts cannot be combined with prompt, got both; add the prompt to the file")
        if self.out is not None and self.show_probs:
            raise ValueError("show_probs cannot be combined with out, got both; it prints to the terminal")


@dataclass(frozen=True)
class ChatConfig(SamplingOptions, PieceOptions, RunOptions):
    """Chat with a fine-tuned model, in the terminal or through a pipe."""

    max_new_tokens: int = 256
    """Maximum number of tokens in a reply."""
    temperature: float = 0.7
    """0: greedy; 1: the model's distribution; above 1: flatter."""
    message: str | None = None
    """Send this message, print the reply, and exit."""
    system: str = ""
    """System prompt, at the start of the conversation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_one(self, "max_new_tokens")


@dataclass(frozen=True)
class ExportConfig(RunOptions):
    """Export a trained model in the format of Hugging Face transformers."""

    out: str | None = None
    """Output folder, new or empty. None: exports/ and the name of the run."""


@dataclass(frozen=True)
class ImportConfig:
    """Import a model saved by Hugging Face transformers as a run directory."""

    folder: tyro.conf.Positional[str] = "."
    """Folder with config.json, safetensors and a tokenizer, as from `save_pretrained` or a download."""
    out: str | None = None
    """Run directory to create, new or empty. None: runs/ and the name of the folder."""
    tokenizer: str | None = None
    """bytes, gpt2, a folder or a tokenizer.json, instead of the folder's tokenizer."""


@dataclass(frozen=True)
class EvaluateConfig(PieceOptions):
    """Evaluate trained models on held-out text and multiple-choice questions."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories to compare; none, or newest: the most recently written under runs/."""
    checkpoint: str = "latest"
    """latest, best (lowest validation loss), or a step number."""
    data: str | None = None
    """Text file, a folder or a glob of them, or stdlib. None: the run's held-out split, or only --choices."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """On invalid UTF-8 in data: stop with the position, or replace the bytes with U+FFFD."""
    stride: int | None = None
    """Tokens between window starts: fewer give each token more context and take longer. None: the context
    length, windows side by side."""
    choices: str | None = None
    """File of multiple-choice questions, one JSON object per line: prompt (or question), choices, and the
    index of the answer, counted from 0."""
    delimiter: str = " "
    """Separator between prompt and choice, unless the text has white space there."""
    batch_size: int = 8
    """Windows per forward pass."""
    out: str | None = None
    """JSON file for all results."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "stride", "batch_size")


@dataclass(frozen=True)
class HarnessConfig(PieceOptions, RunOptions):
    """Evaluate a trained model with EleutherAI's lm-evaluation-harness."""

    tasks: tuple[str, ...] = ()
    """Task names, such as arc_easy hellaswag; datasets are downloaded from Hugging Face and cached."""
    include_path: str | None = None
    """Folder with YAML tasks, instead of the harness's."""
    num_fewshot: int | None = None
    """Few-shot examples per question. None: the task's default."""
    limit: int | None = None
    """Questions per task. None: all."""
    batch_size: int = 8
    """Texts per forward pass."""
    out: str | None = None
    """JSON file for the results."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "batch_size", "limit")


@dataclass(frozen=True)
class RunsOptions:
    """Which runs are drawn or compared."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("newest",)
    """Run directories, their names under runs/, or newest."""
    x: Literal["step", "tokens", "time"] = "step"
    """X axis: steps, tokens, or seconds of training without evaluation and saving."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must name at least one run, got none")


@dataclass(frozen=True)
class PlotConfig(RunsOptions):
    """Plot the metrics of training runs."""

    y: str = "train_loss,val_loss"
    """Comma-separated metrics from metrics.jsonl; losses share a panel."""
    log: bool = False
    """Logarithmic y axis."""
    smooth: int = 1
    """Window of the moving average of training metrics; raw values are drawn faintly."""
    out: str = "runs.png"
    """Output figure: .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_one(self, "smooth")
        if not self.out.endswith((".png", ".svg", ".pdf")):
            raise ValueError(f"out must end in .png, .svg or .pdf, got {self.out}")


@dataclass(frozen=True)
class CompareConfig(RunsOptions):
    """Compare training runs: results, options that differ, samples."""

    out: str | None = None
    """Self-contained HTML report to write, with its curves beside it as .png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and not self.out.endswith(".html"):
            raise ValueError(f"out must end in .html, got {self.out}")


@dataclass(frozen=True)
class SweepConfig:
    """Train with a grid of settings and compare the results. The same command resumes."""

    sweep: tyro.conf.Positional[str] = "lr"
    """A preset (lr, batch, ablations, scaling) or a YAML file with base, grid, variants, seeds."""
    jobs: int = 1
    """Runs in parallel, sharing the CPU cores."""
    out: str | None = None
    """Folder of the runs and their comparison. None: runs/ and the name of the sweep."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "jobs")


@dataclass(frozen=True)
class SteerConfig:
    """Change options of a run while it trains."""

    run_dir: tyro.conf.Positional[str]
    """Run directory; newest: the most recently written under runs/."""
    changes: tyro.conf.Positional[tuple[str, ...]]
    """Options, as in train.lr=1e-3 train.eval_every=50, and actions: evaluate, sample, save, stop."""
    wait_seconds: float = 60.0
    """Time to wait for the run's answer, which comes after its current step or evaluation."""


@dataclass(frozen=True)
class ProbeConfig:
    """Test whether a stack of pieces can learn: small tasks with known answers."""

    task: tyro.conf.Positional[str] = "all"
    """reverse, invert, copy, addition, induction, markov, or all."""
    mine: str | None = None
    """Python file with your pieces, used instead of the reference's."""
    steps: int | None = None
    """Maximum number of optimizer steps. None: the task's default, or what a minute allows."""
    seed: int = 0
    """Random seed of initial weights, training sequences and held-out sequences."""
    out: str = "probes"
    """Folder for the figures."""

    def __post_init__(self) -> None:
        _check_at_least_one(self, "steps")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
