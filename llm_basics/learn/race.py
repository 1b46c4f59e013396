"""Training with user pieces and with the reference (the default run without QK-norm), in one figure."""

import subprocess
import sys
from pathlib import Path

from llm_basics.analysis import figures
from llm_basics.runs import run_dir


def run_both(mine: str, data: str, steps: int, out: Path) -> int:
    """Train in two processes, one by one; plot both and print the difference in validation loss."""
    folders = {"yours": out / "yours", "reference": out / "reference"}
    if taken := [str(folder) for folder in folders.values() if folder.exists()]:
        raise ValueError(f"--out must have no race in it, got {', '.join(taken)}; choose another folder")
    for name, folder in folders.items():
        print(f"--- {name}", flush=True)
        command = [sys.executable, "-m", "llm_basics.train", "--data", data, "--train.steps", str(steps)]
        # QK-norm is in the second stage of a step
        command += ["--model.no-qk_norm", "--run_dir", str(folder)]
        command += ["--mine", mine] if name == "yours" else []
        status = subprocess.run(command).returncode
        if status:
            print(f"error: run {folder} exited with status {status}", file=sys.stderr)
            return status
    figure = figures.plot_runs(folders, out / "race.png")
    losses = [final_loss(folder) for folder in folders.values()]
    print(
        f"\nvalidation loss: yours {losses[0]:.4f}, reference {losses[1]:.4f} "
        f"(difference {losses[0] - losses[1]:+.4f} nats per token)\nfigure           {figure}"
    )
    return 0


def final_loss(folder: Path) -> float:
    """The last validation loss of a run."""
    return [m["val_loss"] for m in run_dir.read_metrics(folder) if m.get("val_loss") is not None][-1]
