"""Measures the normal band of the training loss of a preset, for "is my loss normal?" in the lab.

python benchmarks/normal_loss.py --seeds 1 2 3 4 5 --steps 300         the default run on its default text

Trains one run for each seed, with the schedule of the whole run, stops it after `steps`, and writes the
quantiles of their losses by step to llm_basics/analysis/normal_loss.json.
"""

import dataclasses
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from llm_basics.analysis import normal_loss
from llm_basics.core import config, files
from llm_basics.runs import run_dir, steering, tail


@dataclass(frozen=True)
class Options:
    """What is measured."""

    preset: str = config.Config.config
    """A preset."""
    data: str = config.Config.data
    """Text, as --data of train."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds, a run each."""
    steps: int = 300
    """Steps that are measured; the runs stop after them."""


def losses(options: Options, seed: int, folder: Path) -> list[float]:
    """The training loss of each step of a run."""
    arguments = ["--config", options.preset, "--data", options.data, "--train.seed", str(seed)]
    arguments += ["--train.log_every", "1", "--train.eval_every", "1000000", "--train.sample_every", "0"]
    command = [sys.executable, "-m", "llm_basics.train", *arguments, "--run_dir", str(folder)]
    offset, found = 0, {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            entries, offset = tail.read(folder / run_dir.METRICS, offset)
            found |= {entry["step"]: entry.get("train_loss") for entry in entries}
            if max(found, default=0) >= options.steps:
                steering.send(folder, {}, ["stop"])
                run.wait()
            time.sleep(0.2)
    missing = [step for step in range(1, options.steps + 1) if not math.isfinite(found.get(step, math.nan))]
    if missing:
        raise SystemExit(f"the run with seed {seed} has no loss of step {missing[0]}")
    return [found[step] for step in range(1, options.steps + 1)]


def main(options: Options) -> None:
    """Measure, and replace the band of this preset and text."""
    measured = []
    with tempfile.TemporaryDirectory() as root:
        for seed in options.seeds:
            measured.append(losses(options, seed, Path(root) / str(seed)))
            print(f"seed {seed}: loss {measured[-1][-1]:.3f} after {options.steps} steps", flush=True)
    found = normal_loss.of_losses(measured)
    about = dict(preset=options.preset, data=options.data, seeds=list(options.seeds))
    band = normal_loss.Band(**about, python=platform.python_version(), **found)
    others = normal_loss.bands() if normal_loss.BANDS.exists() else []
    kept = [each for each in others if (each.preset, each.data) != (band.preset, band.data)]
    files.write(normal_loss.BANDS, json.dumps([dataclasses.asdict(each) for each in [*kept, band]]) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
