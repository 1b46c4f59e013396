"""Benchmarks the page of the lab in a headless chromium.

uv run python benchmarks/lab_page.py                              paint, list and latency: two minutes
uv run python benchmarks/lab_page.py --only memory                JavaScript heap over 10 minutes
uv run python benchmarks/lab_page.py --only speed                 training, page open and closed: 13 minutes
uv run python benchmarks/lab_page.py --quick                      everything, small: does it work?

paint     a run of 1,000,000 lines of metrics: from the request of the page to the curve, with a server that
          has just been started (it reads the file) and again
list      100 runs: from the request of the page to the last row
latency   a line is appended ten times a second to a run: from the write to the point on the page
memory    the heap after a garbage collection, every 30 s, while lines are appended ten times a second
speed     tokens per second of one training run, in turns with its page open, and without server and page;
          all of them share the machine's cores: leave the machine alone

The browser draws without a GPU, so it costs more here than on a desktop.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from playwright import sync_api

from llm_basics.core import config
from llm_basics.lab import catalog
from llm_basics.runs import run_dir

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
APPENDS_PER_SECOND = 10
# the first of the appended losses, above all before; each next one is larger
FIRST = 7
TRAIN = (
    "--config tiny --tokenizer bytes --train.steps 1000000 --train.sample_every 0 --train.checkpoint_every 0"
)

# window.drawn: when the first curve with more than 100 points was on the page, in milliseconds
WATCH_CURVES = """
const { stroke, lineTo, beginPath } = CanvasRenderingContext2D.prototype;
let points = 0;
CanvasRenderingContext2D.prototype.beginPath = function () { points = 0; beginPath.call(this); };
CanvasRenderingContext2D.prototype.lineTo = function (x, y) { points += 1; lineTo.call(this, x, y); };
CanvasRenderingContext2D.prototype.stroke = function () {
  stroke.call(this);
  if (points > 100) window.drawn ??= performance.now();
};
"""

# window.seen: the training loss that the page shows, and when it was drawn
WATCH_LOSS = """() => {
  window.seen = [];
  const tiles = document.querySelector(".tiles");
  new MutationObserver(() => {
    const all = [...tiles.querySelectorAll(".tile")];
    const tile = all.find((each) => each.textContent.startsWith("training loss"));
    const text = tile.querySelector("b").textContent;
    requestAnimationFrame(() => requestAnimationFrame(() => window.seen.push([text, Date.now() / 1000])));
  }).observe(tiles, { childList: true, subtree: true, characterData: true });
}"""


def main() -> None:
    """Run the benchmarks and print a table."""
    benchmarks: dict[str, Callable[..., None]] = {
        "paint": paint,
        "list": list_runs,
        "latency": latency,
        "memory": memory,
        "speed": speed,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=benchmarks, default=["paint", "list", "latency"])
    parser.add_argument("--quick", action="store_true", help="all of them, small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="stdlib", help="training text of speed")
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        parser.error(f"needs one of {', '.join(BROWSERS)}; apt-get install chromium")
    if options.quick:
        options.rounds = 1
    print("| measured | result | rounds |\n|---|---|---|", flush=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        for name in benchmarks if options.quick else options.only:
            with tempfile.TemporaryDirectory() as folder:
                benchmarks[name](browser, Path(folder) / "runs", options)
        browser.close()


def show(name: str, values: list[float], unit: str) -> None:
    """Print a row: the median, and all values."""
    print(
        f"| {name} | {statistics.median(values):.3g} {unit} | {' '.join(f'{v:.3g}' for v in values)} |",
        flush=True,
    )


# --------------------------------------------------------------------------------------------------
# What is measured


def paint(browser: sync_api.Browser, runs: Path, options: argparse.Namespace) -> None:
    """Time until the curve of a long run is on the page."""
    n_lines = 20_000 if options.quick else 1_000_000
    folder = write_run(runs / "long", n_lines)
    n_bytes = (folder / run_dir.METRICS).stat().st_size
    cold, warm, content = [], [], []
    for _ in range(options.rounds):
        with served(runs) as url, opened(browser, url) as page:
            for times in (cold, warm):
                page.goto("about:blank")
                page.goto(f"{url.partition('?')[0]}#/run/{catalog.id_of(folder)}")
                times.append(wait_for(page, "window.drawn") / 1000)
                entries = "performance.getEntriesByName('first-contentful-paint').map(each => each.startTime)"
                content += page.evaluate(entries)
    lines = f"{n_lines:,} lines ({n_bytes / 1e6:.0f} MB)"
    show(f"{lines}: curve, server just started", cold, "s")
    show(f"{lines}: curve, again", warm, "s")
    show(f"{lines}: first text", [each / 1000 for each in content], "s")


def list_runs(browser: sync_api.Browser, runs: Path, options: argparse.Namespace) -> None:
    """Time until the last row of a long list is on the page."""
    n_runs = 10 if options.quick else 100
    for number in range(n_runs):
        write_run(runs / f"run-{number:03}", 1000)
    cold, warm = [], []
    for _ in range(options.rounds):
        with served(runs) as url, opened(browser, url) as page:
            for times in (cold, warm):
                page.goto("about:blank")
                page.goto(url.partition("?")[0])
                rows = f"document.querySelectorAll('.row .name').length >= {n_runs} && performance.now()"
                times.append(wait_for(page, rows) / 1000)
    show(f"{n_runs} runs of 1,000 lines: last row, server just started", cold, "s")
    show(f"{n_runs} runs of 1,000 lines: last row, again", warm, "s")


def latency(browser: sync_api.Browser, runs: Path, options: argparse.Namespace) -> None:
    """Time from a line of metrics to its point on the page."""
    n_lines = 30 if options.quick else 600
    folder = write_run(runs / "live", 10_000)
    with served(runs) as url, opened(browser, url) as page:
        page.goto(f"{url.partition('?')[0]}#/run/{catalog.id_of(folder)}")
        wait_for(page, "window.drawn")
        page.evaluate(WATCH_LOSS)
        written = [append(folder, 10_001 + i, round(FIRST + i / 1000, 3)) for i in range(n_lines)]
        wait_for(page, f"window.seen.some(([text]) => Number(text) >= {FIRST + (n_lines - 1) / 1000 - 1e-9})")
        seen = [(float(text), at) for text, at in page.evaluate("window.seen")]
    # a point may arrive together with later ones
    delays = sorted(
        min(at for loss, at in seen if loss >= FIRST + i / 1000 - 1e-9) - at_write
        for i, at_write in enumerate(written)
    )
    show(f"{n_lines} lines: written to drawn, median", [statistics.median(delays)], "s")
    show("written to drawn, 95th percentile", [delays[int(0.95 * len(delays))]], "s")


def memory(browser: sync_api.Browser, runs: Path, options: argparse.Namespace) -> None:
    """The heap of the page while a run goes on."""
    n_samples, seconds = (3, 4) if options.quick else (21, 30)
    folder = write_run(runs / "live", 10_000)
    sizes = []
    with served(runs) as url, opened(browser, url) as page:
        page.goto(f"{url.partition('?')[0]}#/run/{catalog.id_of(folder)}")
        wait_for(page, "window.drawn")
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        for sample in range(n_samples):
            for i in range(seconds * APPENDS_PER_SECOND * (sample > 0)):
                append(folder, 10_001 + sample * seconds * APPENDS_PER_SECOND + i, 1.0)
            session.send("HeapProfiler.collectGarbage")
            metrics = {
                each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]
            }
            sizes.append(metrics["JSHeapUsedSize"] / 1e6)
    show(f"heap every {seconds} s, {APPENDS_PER_SECOND} lines a second", sizes, "MB")
    half = len(sizes) // 2
    growth = statistics.median(sizes[half:]) - statistics.median(sizes[:half] or sizes)
    show("second half over first half", [growth], "MB")


def speed(browser: sync_api.Browser, runs: Path, options: argparse.Namespace) -> None:
    """Speed of training with the page open and closed."""
    rounds, seconds = (1, 4) if options.quick else (2 * options.rounds + 2, 30)
    folder = runs / "training"
    command = [
        sys.executable,
        "-m",
        "llm_basics.train",
        *TRAIN.split(),
        f"--run_dir={folder}",
        f"--data={options.data}",
    ]
    runs.mkdir(parents=True)
    process = subprocess.Popen(command, cwd=runs, env=environment(), stdout=subprocess.DEVNULL)
    open_speeds, closed_speeds = [], []
    try:
        while count_lines(folder) < 5:
            assert process.poll() is None, "the training run has ended"
            time.sleep(0.5)
        for _ in range(rounds):
            closed_speeds.append(speed_during(folder, seconds, time.sleep))
            with served(runs) as url, opened(browser, url) as page:
                page.goto(f"{url.partition('?')[0]}#/run/{catalog.id_of(folder)}")
                page.locator(".tile").first.wait_for()
                open_speeds.append(speed_during(folder, seconds, lambda s: page.wait_for_timeout(1000 * s)))
    finally:
        process.terminate()
        process.wait()
    show("training, no page", closed_speeds, "tokens/s")
    show("training, page open", open_speeds, "tokens/s")
    ratios = [o / c for o, c in zip(open_speeds, closed_speeds, strict=True)]
    show("page open over no page", ratios, "times")


def speed_during(folder: Path, seconds: float, wait: Callable[[float], None]) -> float:
    """Median of the tokens per second that a run logs, after a tenth of the time as warm-up."""
    wait(seconds / 10)
    before = count_lines(folder)
    wait(seconds)
    lines = (folder / run_dir.METRICS).read_text().splitlines()[before:]
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    found = [each["tokens_per_second"] for each in entries if "tokens_per_second" in each]
    assert found, f"the run has logged no step in {seconds} s"
    return statistics.median(found)


def wait_for(page: sync_api.Page, expression: str) -> float:
    """The first true value of an expression; the page's policy forbids the polling of wait_for_function."""
    while not (found := page.evaluate(expression)):
        page.wait_for_timeout(10)
    return found


# --------------------------------------------------------------------------------------------------
# Runs, server, browser


def write_run(folder: Path, n_lines: int) -> Path:
    """A run that consists of metrics."""
    output = run_dir.RunDir(folder)
    options = config.Config(
        model=config.ModelConfig(vocab_size=257, context_length=64),
        train=config.TrainConfig(steps=10 * n_lines),
    )
    output.write_config(dataclasses.asdict(options))
    output.close()
    with open(folder / run_dir.METRICS, "w") as file:
        file.writelines(
            line(step, 1 + 4 / (1 + step / 1000) + step % 7 / 50) for step in range(1, n_lines + 1)
        )
    return folder


def line(step: int, loss: float) -> str:
    """A line of metrics."""
    entry = {"step": step, "attempt": 1, "train_loss": loss, "lr": 3e-4, "grad_norm": 0.5 + step % 5 / 10}
    return json.dumps(entry | {"step_seconds": 0.05, "tokens_per_second": 20_000.0}) + "\n"


def append(folder: Path, step: int, loss: float) -> float:
    """Append a line, and wait until the next is due; when it was written."""
    with open(folder / run_dir.METRICS, "a") as file:
        file.write(line(step, loss))
    written = time.time()
    time.sleep(1 / APPENDS_PER_SECOND)
    return written


def count_lines(folder: Path) -> int:
    """Number of lines of metrics so far."""
    path = folder / run_dir.METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def served(runs: Path) -> Iterator[str]:
    """A server of the lab over `runs`; its address with the token."""
    command = [sys.executable, "-m", "llm_basics.lab", "--runs", str(runs), "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the server did not print its address"
        yield found[0]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def opened(browser: sync_api.Browser, url: str) -> Iterator[sync_api.Page]:
    """A page that has the token and has loaded nothing of a run."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.add_init_script(WATCH_CURVES)
    # the login alone: the page would ask for all runs
    context.request.get(url)
    yield page
    context.close()


if __name__ == "__main__":
    main()
