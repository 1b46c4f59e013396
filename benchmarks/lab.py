"""Measures the server of the lab: long runs, many runs, and the latency of live updates.

uv run --extra lab python benchmarks/lab.py
uv run --extra lab python benchmarks/lab.py --points 100000 --runs 20 --updates 10

Run directories are generated. The server runs in this process, without network: seconds of the CPU are its
own, and those of reading a response. The page asks for the same series and numbers of buckets.
"""

import asyncio
import dataclasses
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from fastapi import testclient

from llm_basics.core import config
from llm_basics.lab import app, catalog, run_routes, service
from llm_basics.runs import run_dir

NAMES = ("train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second")
SERIES = "&".join(f"name={name}" for name in NAMES)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    points: int = 1_000_000
    """Lines of metrics of the long run."""
    runs: int = 100
    """Runs in the list, with 2,000 lines each."""
    updates: int = 40
    """Lines that are appended while the page follows."""


def generate(folder: Path, n_lines: int) -> None:
    """A run directory with `n_lines` lines of metrics."""
    folder.mkdir(parents=True)
    options = config.Config(model=config.ModelConfig(vocab_size=2048, context_length=128))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(options)))
    rng = random.Random(0)
    with open(folder / run_dir.METRICS, "w") as file:
        for step in range(1, n_lines + 1):
            loss = 2 + 6 / math.sqrt(step) + rng.gauss(0, 0.05)
            line = {"step": step, "attempt": 1, "train_loss": loss, "lr": 1e-3, "grad_norm": 0.5}
            line |= {"step_seconds": 0.05, "tokens_per_second": 20_000.0, "eta_seconds": 100.0}
            file.write(json.dumps(line) + "\n")


def measured(what: str, request: Callable[[], int]) -> None:
    """Print a row: seconds, seconds of the CPU, bytes of the response."""
    start, cpu = time.perf_counter(), time.process_time()
    n_bytes = request()
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    print(f"| {what} | {seconds:.2f} | {cpu:.2f} | {n_bytes / 1000:,.0f} |", flush=True)


def long_run(root: Path, n_lines: int) -> None:
    """Rows of a run with `n_lines` lines."""
    generate(root / "long", n_lines)
    token, id = "t" * 16, catalog.id_of(root / "long")
    guarded = app.create(service.make(root), token, 8100)
    client = testclient.TestClient(
        guarded, base_url="http://127.0.0.1:8100", headers={"authorization": f"Bearer {token}"}
    )

    def metrics(more: str = "") -> int:
        return len(client.get(f"/api/runs/{id}/metrics?{SERIES}&buckets=700{more}").content)

    def rest() -> int:
        while not client.get(f"/api/runs/{id}/metrics?{SERIES}&buckets=700").json()["is_complete"]:
            pass
        return metrics()

    measured(f"first buckets of {n_lines:,} lines", metrics)
    measured("until all lines are read", rest)
    measured("all buckets again", metrics)
    measured("zoom to 1,000 steps", lambda: metrics(f"&first={n_lines // 2}&last={n_lines // 2 + 999}"))
    measured("details", lambda: len(client.get(f"/api/runs/{id}").content))
    measured("findings", lambda: len(client.get(f"/api/runs/{id}/findings").content))


def many_runs(root: Path, n_runs: int) -> None:
    """Rows of a list of `n_runs` runs."""
    for number in range(n_runs):
        generate(root / f"run-{number}", 2000)
    token = "t" * 16
    guarded = app.create(service.make(root), token, 8100)
    client = testclient.TestClient(
        guarded, base_url="http://127.0.0.1:8100", headers={"authorization": f"Bearer {token}"}
    )
    for when in ("first", "again"):
        measured(f"{n_runs} runs listed, {when}", lambda: len(client.get("/api/runs").content))
    measured("presets and options", lambda: len(client.get("/api/presets").content))


async def latency(root: Path, n_updates: int) -> None:
    """Seconds from an appended line to its event, of a stream that follows the run."""
    generate(root / "live", 1000)
    id = catalog.id_of(root / "live")
    events = run_routes.stream(service.make(root), [id], None, None)
    sent: dict[int, float] = {}
    seconds: list[float] = []

    async def append() -> None:
        for step in range(1001, 1001 + n_updates):
            await asyncio.sleep(random.uniform(0.2, 1.0))
            sent[step] = time.perf_counter()
            with open(root / "live" / run_dir.METRICS, "a") as file:
                file.write(json.dumps({"step": step, "train_loss": 2.0}) + "\n")

    await anext(events)
    writer = asyncio.create_task(append())
    async for event in events:
        if event.event == "metrics":
            for record in json.loads(event.raw_data)["records"]:
                seconds.append(time.perf_counter() - sent[record["step"]])
        if len(seconds) == n_updates:
            break
    await writer
    p95 = statistics.quantiles(seconds, n=20)[-1] if n_updates > 1 else seconds[0]
    print(
        f"\nupdate latency over {n_updates} lines: median {statistics.median(seconds):.2f} s, p95 {p95:.2f} s"
    )


def main(options: Options) -> None:
    """Measure all."""
    print("| | seconds | CPU seconds | kB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        long_run(Path(root) / "one", options.points)
        many_runs(Path(root) / "many", options.runs)
        asyncio.run(latency(Path(root) / "latency", options.updates))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
