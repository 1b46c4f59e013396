"""Options of the commands with subcommands, `tokenizer`, `checkpoint` and `doctor`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from llm_basics.cli import commands
from llm_basics.core import option_types


@dataclass(frozen=True, kw_only=True)
class TextOptions(commands.FastOptions):
    """The text to tokenize."""

    data: str = "stdlib"
    """Text file, a folder or a glob of such files; stdlib: the source code of Python's standard library."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTrain(TextOptions):
    """Train a BPE tokenizer."""

    out: str
    """Output folder for vocab.json, merges.txt and special_tokens.json."""
    vocab_size: option_types.VocabSize = 10_000
    """Number of tokens: 256 bytes, the special tokens, and one per merge."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Strings that are one token each; the text is split at them."""
    pattern: Literal["gpt2", "cl100k"] = "gpt2"
    """Pre-tokenization pattern: that of GPT-2, or of GPT-4 (cl100k: at most three digits per pre-token)."""
    ties: Literal["greatest", "lowest-id"] = "greatest"
    """Order of equally frequent pairs; lowest-id is the rule of Hugging Face tokenizers."""


@dataclass(frozen=True, kw_only=True)
class TokenizerEncode(TextOptions):
    """Encode text into token files."""

    tokenizer: str
    """Tokenizer folder, a tokenizer.json, gpt2 or bytes."""
    out: str
    """Output folder for the token files and a copy of the tokenizer."""


@dataclass(frozen=True)
class TokenizerInspect(option_types.Options):
    """Show the tokens of a text and the merges that formed them."""

    text: tyro.conf.Positional[str]
    """Text to encode."""
    tokenizer: str = "gpt2"
    """Tokenizer folder, a tokenizer.json, gpt2 or bytes."""


@dataclass(frozen=True, kw_only=True)
class TokenizerCompare(TextOptions):
    """Compare two tokenizers on the same text."""

    first: tyro.conf.Positional[str]
    """Tokenizer folder, a tokenizer.json, gpt2 or bytes."""
    second: tyro.conf.Positional[str]
    """Second tokenizer, in the same forms."""


@dataclass(frozen=True)
class CheckpointVerify(option_types.Options):
    """Verify the SHA-256 of every checkpoint; exits with 1 if one is damaged."""

    run_dir: tyro.conf.Positional[str]
    """Run directory."""


@dataclass(frozen=True)
class CheckpointList(option_types.Options):
    """List step, validation loss, size and time of every checkpoint."""

    run_dir: tyro.conf.Positional[str]
    """Run directory."""


@dataclass(frozen=True)
class CheckpointPrune(option_types.Options):
    """Delete all checkpoints but the newest and the best; the run must not be training."""

    run_dir: tyro.conf.Positional[str]
    """Run directory."""
    keep: option_types.Count = 1
    """Number of newest checkpoints to keep."""


@dataclass(frozen=True)
class CheckpointMerge(option_types.Options):
    """Write a checkpoint of one file beside a sharded one, which must be trusted."""

    path: tyro.conf.Positional[str]
    """Folder of a sharded checkpoint."""


@dataclass(frozen=True)
class CheckpointSplit(option_types.Options):
    """Write a sharded checkpoint beside one of one file."""

    path: tyro.conf.Positional[str]
    """Checkpoint file."""


@dataclass(frozen=True)
class DoctorCheck(option_types.Options):
    """Check versions, accelerator, kernels, memory and disk, and compare one training step (default)."""

    device: str = "auto"
    """cuda, mps or cpu; auto: the first available."""
    runs: str = "runs"
    """Folder that runs are written to."""
    json: bool = False
    """Print one JSON array instead of lines."""


@dataclass(frozen=True)
class DoctorPlan(option_types.Options):
    """Plan a run: memory by component and strategy, the batch that fits, tokens/s, the command."""

    config: str = "tiny"
    """A preset or a YAML file of options, as of train."""
    gpus: option_types.Count = 1
    """Number of GPUs."""
    gpu: str | None = None
    """Card, such as H100, A100-80GB, L4, RTX4090. None and no gpu_memory: this machine's CPU, measured."""
    gpu_memory: option_types.Positive | None = None
    """Memory of a GPU in GB. None: that of the card."""
    tflops: option_types.Positive | None = None
    """Peak TFLOP/s of a GPU. None: that of the card, or no estimate of the speed."""
    json: bool = False
    """Print one JSON object instead of a table."""


TOKENIZER = (
    Annotated[TokenizerTrain, tyro.conf.subcommand("train")]
    | Annotated[TokenizerEncode, tyro.conf.subcommand("encode")]
    | Annotated[TokenizerInspect, tyro.conf.subcommand("inspect")]
    | Annotated[TokenizerCompare, tyro.conf.subcommand("compare")]
)

CHECKPOINT = (
    Annotated[CheckpointVerify, tyro.conf.subcommand("verify")]
    | Annotated[CheckpointList, tyro.conf.subcommand("list")]
    | Annotated[CheckpointPrune, tyro.conf.subcommand("prune")]
    | Annotated[CheckpointMerge, tyro.conf.subcommand("merge")]
    | Annotated[CheckpointSplit, tyro.conf.subcommand("split")]
)

DOCTOR = (
    Annotated[DoctorCheck, tyro.conf.subcommand("check")]
    | Annotated[DoctorPlan, tyro.conf.subcommand("plan")]
)
