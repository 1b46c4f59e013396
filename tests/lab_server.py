"""A real server of the lab over small trained runs, and pages of a real browser that record every fault."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llm_basics.core import bpe, config, dataloader, trainer
from llm_basics.core import model as models
from llm_basics.core import tokenizer as tokenizers
from llm_basics.data import chat_template
from llm_basics.runs import checkpoint, run_dir

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "tests" / "fixtures" / "corpus.txt"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

VIEWS = ["runs", "run", "play", "tokens", "inside", "config", "learn"]

# a checkpoint and a sample after each
STEPS = (8, 16, 24)
SAMPLES = ("e te e", "the ten", "the king said")

# generous: the machine may be busy
SECONDS = 180.0

HOSTILE_NAMES = ["<img src=x onerror=alert(1)>", "\u202eevil", "'\"&", "%2e%2e%2f", "a\nb"]
HOSTILE_LINES = [
    '{"step": 1, "train_loss": NaN, "lr": 1e-3}\n',
    '{"step": 2, "train_loss": -Infinity, "grad_norm": Infinity}\n',
    '{"step": 3, "train_loss": null, "nonfinite": ["train_loss"]}\n',
    '[1, 2]\n{"step": -4}\n{"step": 1e400, "train_loss": 1}\n\0\n',
    '{"step": 4, "train_loss": 3.5, "val_loss": "<b>4</b>", "lr": {"a": []}}\n',
    '{"step": 5, "train_loss": 3.25}\n{"step": 6, "tra',
]


def find_browser() -> str | None:
    """The path of an installed chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def train_run(folder: Path) -> None:
    """A run of some steps, with a checkpoint and a sample after each of `STEPS`."""
    text = CORPUS.read_text(encoding="utf-8")[:20_000]
    excerpt = folder.parent / f"{folder.name}.txt"
    excerpt.write_text(text, encoding="utf-8")
    vocab, merges = bpe.train_bpe(excerpt, vocab_size=290)
    chosen = tokenizers.Tokenizer(vocab, merges, ("<|endoftext|>", *chat_template.SPECIALS))
    shape = config.ModelConfig(chosen.vocab_size, context_length=64, d_model=32, n_layers=2, n_heads=2)
    options = config.Config(
        model=shape, train=config.TrainConfig(steps=STEPS[-1], lr=1e-2, warmup_steps=4, device="cpu")
    )
    run = run_dir.RunDir(folder)
    run.write_config(dataclasses.asdict(options))
    chosen.save(folder / "tokenizer")
    shards = [ids for ids, *_ in chosen.encode_file(excerpt)]
    batches = dataloader.Batches(shards, batch_size=4, context_length=64)
    training = trainer.Trainer(models.TransformerLM(shape), options.train)
    for step in range(1, STEPS[-1] + 1):
        result = training.training_step(batches[step - 1])
        loss, norm = float(result.train_loss), float(result.grad_norm)
        run.metrics(
            step, train_loss=loss, lr=result.lr, grad_norm=norm, step_seconds=0.1, tokens_per_second=2e3
        )
        if step in STEPS:
            run.metrics(step, val_loss=loss + 0.1)
            run.sample(step, "A king ", SAMPLES[STEPS.index(step)])
            path = run.checkpoint_path(step)
            checkpoint.save_checkpoint(training.model, training.optimizer, step, path)
            run.event(step, "checkpoint", val_loss=loss + 0.1)
    run.close()


def copy_run(folder: Path, name: str, lr: float) -> Path:
    """The same run under another name, with another learning rate in its options."""
    other = folder.parent / name
    shutil.copytree(folder, other)
    options = json.loads((other / "config.json").read_text())
    options["train"]["lr"] = lr
    (other / "config.json").write_text(json.dumps(options))
    return other


def write_rollouts(
    folder: Path, step: int, texts: Sequence[str], attempt: int = 1, n_groups: int = 2
) -> None:
    """Responses of a run of rl to two prompts, as `post_training.rollouts.as_record` writes them."""
    with open(folder / run_dir.ROLLOUTS, "a") as file:
        for group in range(n_groups):
            for i, text in enumerate(texts):
                entry = {"step": step, "attempt": attempt, "group": group, "prompt": f"prompt {group}"}
                entry |= {"expected": "4", "text": text, "tokens": [1, 2, 3], "ended": i > 0}
                entry |= {"reward": float(i), "exact": i == 1, "advantage": i - 0.5, "log_probs": None}
                file.write(json.dumps(entry) + "\n")


def make_hostile(folder: Path) -> None:
    """Runs with hostile names, numbers that are none and a torn last line."""
    for name in HOSTILE_NAMES:
        other = copy_run(folder, name, lr=1e-3)
        (other / run_dir.METRICS).write_text("".join(HOSTILE_LINES))
        (other / run_dir.SAMPLES).write_text('{"step": 1, "text": "\\ud800<script>x</script>"}\n{"torn')
        write_rollouts(other, 1, ["<img src=x onerror=alert(1)>", "\ud800</p><script>x</script>"])
        (other / run_dir.EVENTS).write_text('{"step": 1, "event": "<img src=x onerror=alert(1)>"}\n{"st')


class Server:
    """`python -m llm_basics.lab` in a process of its own; `url` has the token."""

    def __init__(self, runs: Path, *more: str) -> None:
        self.runs = runs
        options = ["--runs", runs, "--port", "0", "--no-browser", "--data", CORPUS, *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llm_basics.lab", *map(str, options)],
            cwd=runs.parent,
            # runs that it starts get these too
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"http://\S+", self.process.stdout.readline())
        assert found, "the server did not print its address"
        self.url = found[0]
        self.base = self.url.partition("?")[0]

    def close(self) -> None:
        """End the server and the runs that it has started."""
        # also one that has no run directory yet
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in file.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)
        self.process.terminate()
        self.process.wait(SECONDS)


class Watch:
    """What goes wrong on a page: errors and warnings of its console, and requests to anywhere else."""

    def __init__(self, page, base: str) -> None:
        self.faults: list[str] = []
        self.paths: list[str] = []
        self.base = base
        page.on("console", lambda m: m.type in ("error", "warning") and self.faults.append(m.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", self.requested)

    def requested(self, request) -> None:
        if request.url.startswith(self.base):
            self.paths.append("/" + request.url.removeprefix(self.base))
        else:
            self.faults.append(f"requests {request.url}")

    def take(self, pattern: str) -> list[str]:
        """The faults that match, which are expected and therefore removed."""
        found = [fault for fault in self.faults if re.search(pattern, fault)]
        self.faults = [fault for fault in self.faults if fault not in found]
        return found


def wait_until(condition, seconds: float = SECONDS):
    """The first true value of a function."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)
    return found


def go(page, hash):
    """Show a view, and wait until its data is there."""
    page.evaluate("hash => { location.hash = hash; }", hash)
    view = hash.removeprefix("#/").partition("/")[0]
    page.locator(f"nav a[aria-current=page][href^='#/{view}']").wait_for()
    loaded = {"runs": ".row .name", "run": ".tile", "play": ".lane select", "tokens": ".piece b"}
    loaded |= {"inside": ".heads canvas", "config": ".tile b", "learn": ".lesson h2"}
    page.locator(loaded[view]).first.wait_for()


def picture(page, selector):
    """What a canvas shows."""
    return page.locator(selector).first.evaluate("canvas => canvas.toDataURL()")
