"""Training programs of tests with injected failures, run by `fixtures/nursery.py`."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_basics.runs import checkpoint, run_dir

TESTS = Path(__file__).parent
STEPS = 10
SETTINGS = {
    "model.d_model": 16,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.context_length": 16,
    "model.dropout": 0.1,
    "train.steps": STEPS,
    "train.batch_size": 4,
    "train.warmup_steps": 2,
    "train.log_every": 1,
    "train.eval_every": 3,
    "train.eval_batches": 3,
    "train.sample_every": 4,
    "train.sample_tokens": 5,
    "train.checkpoint_every": 1,
    "train.device": "cpu",
}


class Trainers:
    """Runs training programs with injected failures and waits for them."""

    def __init__(self, home: Path, imports: str = "") -> None:
        self.home = home
        self.log = home / "log.txt"
        text = "".join(f"{i} times {i} is {i * i}.\n" for i in range(200))
        (home / "text.txt").write_text(text)
        environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "NURSERY_IMPORTS": imports}
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "fixtures" / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.seconds: float | None = None

    def train(self, folder: Path, settings: dict[str, Any] | None = None, **plan: Any) -> int:
        """Train in a new folder. Returns the exit status."""
        options = SETTINGS | (settings or {})
        arguments = [f"--data={self.home / 'text.txt'}", "--tokenizer=bytes", "--fast=off"]
        arguments += [f"--data_dir={self.home / 'data'}", f"--run_dir={folder}"]
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        return self.start([*arguments, *flags], **plan)

    def resume(self, folder: Path, *arguments: str, **plan: Any) -> int:
        """Resume a run. Returns the exit status."""
        return self.start(["--resume", str(folder), *arguments], **plan)

    def start(self, arguments: Sequence[str], **plan: Any) -> int:
        self.log.write_text("")
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"arguments": arguments, "log": str(self.log), **plan}) + "\n")
        self.process.stdin.flush()
        status, self.seconds = json.loads(self.process.stdout.readline())
        return status

    @property
    def output(self) -> str:
        return self.log.read_text()


def learned(folder: Path) -> tuple[str, dict[int, Any]]:
    """The SHA-256 of weights, optimizer and random state after the last step, and all losses, exactly."""
    (path,) = [path for path in run_dir.checkpoints(folder) if f"{STEPS:08d}" in path.name]
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.read_checkpoint(path)[0].items()):
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), losses(folder)


def losses(folder: Path) -> dict[Any, Any]:
    """The losses of a run by step and kind."""
    found: dict[Any, Any] = {}
    for entry in run_dir.read_metrics(folder):
        key = "train_loss" if "train_loss" in entry else "val_loss"
        found[entry["step"], key] = entry[key]
    return found
