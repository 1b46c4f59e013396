"""Options of the commands: names, defaults and descriptions. Training options are in core.config."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from llm_basics.cli import generation_options
from llm_basics.core import option_types

# --------------------------------------------------------------------------------------------------
# Options that several commands share


@dataclass(frozen=True)
class FastOptions(option_types.Options):
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
class RunOptions(option_types.Options):
    """Which model is loaded."""

    run_dir: tyro.conf.Positional[str] = "newest"
    """Run directory; newest: the most recently written under runs/."""
    checkpoint: str = "latest"
    """latest, best (lowest validation loss), or a step number."""


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
    vocab_size: option_types.VocabSize = 10_000
    """Vocabulary size of bpe."""
    sample_bytes: option_types.Count = 100_000_000
    """Train bpe on at most this many bytes from the start of the training split."""
    val_fraction: option_types.ProperFraction = 0.01
    """Fraction of documents held out for validation; of a single document, its end."""
    max_tokens: option_types.Count | None = None
    """Stop after the document that reaches this number of tokens. None: no limit."""
    shard_tokens: option_types.Count = 100_000_000
    """Tokens per shard; an interrupted run resumes after the last complete shard."""
    text_field: str = "text"
    """Field of JSON lines, Parquet files and datasets that holds the text."""
    form: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """File format. auto: by file name; standard input is text."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """On invalid UTF-8: stop with the position, or replace the bytes with U+FFFD."""
    clean: bool = False
    """Drop repeated lines, documents that break Gopher's rules, and near duplicates; for languages with
    spaces between words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source == "-" and not self.out:
            raise ValueError("--out must name the output folder when reading standard input (-), got none")


@dataclass(frozen=True)
class GenerateConfig(
    generation_options.SelectionOptions,
    generation_options.SamplingOptions,
    generation_options.QuantizationOptions,
    PieceOptions,
    RunOptions,
):
    """Generate text with a trained model."""

    prompt: str = ""
    """Text to continue, printed before its continuation: bold on a terminal, as one text in a pipe; separate
    fields with --out. Empty: start a new document."""
    prompts: str | None = None
    """File with one prompt per line; .jsonl: the "prompt" field of each line."""
    out: str | None = None
    """Write completions to this JSONL file, one per line with its prompt, instead of the terminal."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop before this string; can be given several times."""
    samples: generation_options.BatchSize = 1
    """Completions per prompt, with consecutive seeds."""
    show_probs: bool = False
    """Show the probability of each token and the most likely alternatives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_selection(self.temperature)
        self.check_one_selection()
        if self.n_candidates and self.show_probs:
            raise ValueError("show_probs cannot be combined with best_of or majority, got both")
        if "" in self.stop:
            raise ValueError("stop must be a string of at least one character, got an empty one")
        if self.prompts is not None and self.prompt:
            raise ValueError("prompts cannot be combined with prompt, got both; add the prompt to the file")
        if self.out is not None and self.show_probs:
            raise ValueError("show_probs cannot be combined with out, got both; it prints to the terminal")


@dataclass(frozen=True)
class ChatConfig(
    generation_options.SelectionOptions,
    generation_options.SamplingOptions,
    generation_options.QuantizationOptions,
    PieceOptions,
    RunOptions,
):
    """Chat with a fine-tuned model, in the terminal or through a pipe."""

    max_new_tokens: Annotated[int, option_types.Range(ge=1, most=10**6)] = 256
    """Maximum number of tokens in a reply."""
    temperature: option_types.NonNegative = 0.7
    """0: greedy; 1: the model's distribution; above 1: flatter."""
    message: str | None = None
    """Send this message, print the reply, and exit."""
    system: str = ""
    """System prompt, at the start of the conversation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_selection(self.temperature)
        self.check_one_selection()


@dataclass(frozen=True)
class ExportConfig(RunOptions):
    """Export a trained model in the format of Hugging Face transformers."""

    out: str | None = None
    """Output folder, new or empty. None: exports/ and the name of the run."""
    adapters: bool = False
    """Write the adapters of a LoRA run alone, in the format of PEFT, and their base in base/."""


@dataclass(frozen=True)
class ImportConfig(option_types.Options):
    """Import a model saved by Hugging Face transformers as a run directory."""

    folder: tyro.conf.Positional[str] = "."
    """Folder with config.json, safetensors and a tokenizer, as from `save_pretrained` or a download."""
    out: str | None = None
    """Run directory to create, new or empty. None: runs/ and the name of the folder."""
    tokenizer: str | None = None
    """bytes, gpt2, a folder or a tokenizer.json, instead of the folder's tokenizer."""
    adapters: str | None = None
    """Folder with LoRA adapters saved by PEFT, which are merged into the weights."""


@dataclass(frozen=True)
class EvaluateConfig(
    generation_options.SelectionOptions, generation_options.QuantizationOptions, PieceOptions
):
    """Evaluate trained models on held-out text and multiple-choice questions."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories to compare; none, or newest: the most recently written under runs/."""
    checkpoint: str = "latest"
    """latest, best (lowest validation loss), or a step number."""
    data: str | None = None
    """Text file, a folder or a glob of them, or stdlib. None: the run's held-out split, or only --choices."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """On invalid UTF-8 in data: stop with the position, or replace the bytes with U+FFFD."""
    stride: option_types.Count | None = None
    """Tokens between window starts: a smaller stride gives each token more context and takes longer. None:
    the context length, disjoint windows."""
    choices: str | None = None
    """File of multiple-choice questions, one JSON object per line: prompt (or question), choices, and the
    index of the answer, counted from 0."""
    delimiter: str = " "
    """Separator between prompt and choice, unless the text has white space there."""
    answers: str | None = None
    """Measure exact answers of a chat model to a file of conversations, as for sft, or to the held_out ones
    of its run: greedy, and with --best_of and --majority."""
    max_new_tokens: Annotated[int, option_types.Range(ge=1, most=10**6)] = 64
    """Maximum number of tokens in an answer."""
    temperature: option_types.NonNegative = 0.7
    """Temperature of the samples for best_of and majority."""
    seed: option_types.Seed = 0
    """Random seed of the samples."""
    batch_size: generation_options.BatchSize = 8
    """Windows per forward pass."""
    out: str | None = None
    """JSON file for all results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_selection(self.temperature)
        if self.n_candidates and self.answers is None:
            raise ValueError(
                "best_of and majority need answers, a file of conversations or held_out, got none"
            )

    def sampling(self, max_new_tokens: int) -> generation_options.SamplingOptions:
        """Sampling options of the answers."""
        return generation_options.SamplingOptions(
            max_new_tokens, temperature=self.temperature, seed=self.seed
        )

    def each_selection(self) -> list[tuple[str, generation_options.SelectionOptions]]:
        """Each enabled selection method alone, by name."""
        best = generation_options.SelectionOptions(best_of=self.best_of, reward=self.reward)
        vote = generation_options.SelectionOptions(majority=self.majority)
        return [(name, each) for name, each in (("best_of", best), ("majority", vote)) if each.n_candidates]


@dataclass(frozen=True)
class HarnessConfig(PieceOptions, RunOptions):
    """Evaluate a trained model with EleutherAI's lm-evaluation-harness."""

    tasks: tuple[str, ...] = ()
    """Task names, such as arc_easy hellaswag; datasets are downloaded from Hugging Face and cached."""
    include_path: str | None = None
    """Folder with YAML tasks, instead of the harness's."""
    num_fewshot: int | None = None
    """Few-shot examples per question. None: the task's default."""
    limit: option_types.Count | None = None
    """Questions per task. None: all."""
    batch_size: generation_options.BatchSize = 8
    """Texts per forward pass."""
    out: str | None = None
    """JSON file for the results."""


@dataclass(frozen=True)
class RunsOptions(option_types.Options):
    """Which runs are drawn or compared."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("newest",)
    """Run directories, their names under runs/, or newest."""
    x: Literal["step", "tokens", "time"] = "step"
    """X axis: steps, tokens, or seconds of training without evaluation and saving."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ValueError("runs must name at least one run, got none")


@dataclass(frozen=True)
class PlotConfig(RunsOptions):
    """Plot the metrics of training runs."""

    y: str = "train_loss,val_loss"
    """Comma-separated metrics from metrics.jsonl; losses share a panel."""
    log: bool = False
    """Logarithmic y axis."""
    smooth: option_types.Count = 1
    """Window of the moving average of training metrics; raw values are drawn faintly."""
    out: str = "runs.png"
    """Output figure: .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
class SweepConfig(option_types.Options):
    """Train with a grid of settings and compare the results. The same command resumes."""

    sweep: tyro.conf.Positional[str] = "lr"
    """A preset (lr, batch, ablations, scaling) or a YAML file with base, grid, variants, seeds."""
    jobs: Annotated[int, option_types.Range(ge=1, most=1024)] = 1
    """Runs in parallel, sharing the CPU cores."""
    out: str | None = None
    """Folder of the runs and their comparison. None: runs/ and the name of the sweep."""


@dataclass(frozen=True)
class SteerConfig(option_types.Options):
    """Change options of a run while it trains."""

    run_dir: tyro.conf.Positional[str]
    """Run directory; newest: the most recently written under runs/."""
    changes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Options, as in train.lr=1e-3 train.eval_every=50, and actions: evaluate, sample, save, stop."""
    wait_seconds: option_types.NonNegative = 60.0
    """Timeout for the run's response, which follows its current step or evaluation."""


@dataclass(frozen=True)
class ProbeConfig(option_types.Options):
    """Test whether a stack of pieces can learn: small tasks with known answers."""

    task: tyro.conf.Positional[str] = "all"
    """reverse, invert, copy, addition, induction, markov, or all."""
    mine: str | None = None
    """Python file with your pieces, used instead of the reference's."""
    steps: option_types.Count | None = None
    """Maximum number of optimizer steps. None: the task's default, or one minute of training."""
    seed: option_types.Seed = 0
    """Random seed of initial weights, training sequences and held-out sequences."""
    out: str = "probes"
    """Folder for the figures."""
    record: bool = False
    """Also write a run directory under runs/, which the lab shows with the known optimal losses."""


@dataclass(frozen=True)
class CompletionConfig(option_types.Options):
    """Print a completion script for the shell: commands, options and files."""

    shell: tyro.conf.Positional[Literal["bash", "zsh"]] = "bash"
    """bash or zsh."""
