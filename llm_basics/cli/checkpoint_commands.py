"""The program of checkpoints: are they whole, what is in them, which can go?

uv run python -m llm_basics.checkpoint verify runs/NAME
uv run python -m llm_basics.checkpoint list runs/NAME
uv run python -m llm_basics.checkpoint prune runs/NAME --keep 1
"""

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llm_basics.cli import parse
from llm_basics.runs import checkpoint
from llm_basics.runs import run_dir as run_dirs


@dataclass(frozen=True)
class Verify:
    """Read all checkpoints and compare them with their SHA-256; the exit status is 1 if one is damaged."""

    run_dir: tyro.conf.Positional[str]
    """The folder of a run."""


@dataclass(frozen=True)
class List:
    """Show step, validation loss, size and time of all checkpoints."""

    run_dir: tyro.conf.Positional[str]
    """The folder of a run."""


@dataclass(frozen=True)
class Prune:
    """Delete all checkpoints but the newest and the best. The run must not be going on."""

    run_dir: tyro.conf.Positional[str]
    """The folder of a run."""
    keep: int = 1
    """How many of the newest to keep."""


COMMANDS = (
    Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Prune, tyro.conf.subcommand("prune")]
)


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says. For a mistake, prints one line and exits with 2."""
    with parse.exit_on_error():
        options = parse.parse_command(COMMANDS, arguments, prog="python -m llm_basics.checkpoint")
        folder = Path(options.run_dir) / run_dirs.CHECKPOINTS
        if not folder.is_dir():
            raise ValueError(f"a run directory must hold {run_dirs.CHECKPOINTS}/, got {options.run_dir}")
        match options:
            case Verify():
                sys.exit(verify(folder))
            case List():
                show(folder)
            case Prune():
                with run_dirs.locked(options.run_dir):
                    for path in checkpoint.prune(folder, options.keep):
                        print(f"deleted {path}")


def verify(folder: Path) -> int:
    """Print of each checkpoint whether it is whole. Returns 1 if one is not, or none is there."""
    status = 0 if checkpoint.files(folder) else 1
    for path in checkpoint.files(folder):
        try:
            checkpoint.verify(path)
            print(f"whole    {path}")
        except ValueError as error:
            print(f"damaged  {error}")
            status = 1
    return status


def show(folder: Path) -> None:
    """Print a line for each checkpoint, newest first."""
    found, best = checkpoint.files(folder), checkpoint.best(folder)
    for path in found:
        try:
            about = checkpoint.read_about(path)
        except ValueError as error:
            print(f"damaged  {error}")
            continue
        loss = about.get("val_loss")
        marks = [name for name, is_it in (("latest", path == found[0]), ("best", path == best)) if is_it]
        print(
            f"step {about['step']:>8,}  val_loss {'     -' if loss is None else f'{loss:.4f}'}  "
            f"{path.stat().st_size / 1e6:8.1f} MB  "
            f"{datetime.datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M:%S}  {' '.join(marks)}"
        )
