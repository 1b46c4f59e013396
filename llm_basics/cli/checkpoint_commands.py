"""Verify, list, prune and convert the checkpoints of a run.

uv run python -m llm_basics.checkpoint verify runs/NAME
uv run python -m llm_basics.checkpoint list runs/NAME
uv run python -m llm_basics.checkpoint prune runs/NAME --keep 1
uv run python -m llm_basics.checkpoint merge runs/NAME/checkpoints/step_00000500.sharded
uv run python -m llm_basics.checkpoint split runs/NAME/checkpoints/step_00000500.safetensors
"""

import datetime
import sys
from pathlib import Path
from typing import Any

from llm_basics.cli import parse, subcommands
from llm_basics.runs import checkpoint, locks, sharded_checkpoint
from llm_basics.runs import run_dir as run_dirs


def main(options: Any) -> None:
    """Run the subcommand that `options` belong to; on an error, print one line and exit with 2."""
    with parse.exit_on_error():
        match options:
            case subcommands.CheckpointMerge():
                print(sharded_checkpoint.merge(Path(options.path)))
                return
            case subcommands.CheckpointSplit():
                print(sharded_checkpoint.split(Path(options.path)))
                return
        folder = Path(options.run_dir) / run_dirs.CHECKPOINTS
        if not folder.is_dir():
            raise ValueError(f"a run directory must hold {run_dirs.CHECKPOINTS}/, got {options.run_dir}")
        match options:
            case subcommands.CheckpointVerify():
                sys.exit(verify(folder))
            case subcommands.CheckpointList():
                show(folder)
            case subcommands.CheckpointPrune():
                with locks.locked(options.run_dir):
                    for path in checkpoint.prune(folder, options.keep):
                        print(f"deleted {path}")


def verify(folder: Path) -> int:
    """Print whether each checkpoint is valid. Returns 1 if one is damaged or there is none."""
    status = 0 if sharded_checkpoint.resumable(folder) else 1
    for path in sharded_checkpoint.resumable(folder):
        try:
            sharded_checkpoint.read_about(path) if path.is_dir() else checkpoint.verify(path)
            print(f"valid    {path}")
        except ValueError as error:
            print(f"damaged  {error}")
            status = 1
    return status


def show(folder: Path) -> None:
    """Print one line per checkpoint, newest first."""
    found, best = checkpoint.files(folder), checkpoint.best(folder)
    for path in found:
        try:
            about = checkpoint.read_about(path)
        except ValueError as error:
            print(f"damaged  {error}")
            continue
        loss = about.get("val_loss")
        labels = [name for name, other in (("latest", found[0]), ("best", best)) if path == other]
        print(
            f"step {about['step']:>8,}  val_loss {'     -' if loss is None else f'{loss:.4f}'}  "
            f"{path.stat().st_size / 1e6:8.1f} MB  "
            f"{datetime.datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M:%S}  {' '.join(labels)}"
        )
