"""Train with many settings, and compare what comes out.

uv run python -m llm_basics.sweep lr --jobs 2
uv run python -m llm_basics.sweep mine.yaml --out runs/mine

What a sweep file may hold stands in `trials.py`. In the folder of a sweep each run has a file of options, so
that it can be trained alone too, a folder, and a log. Interrupted, the same command goes on; finished, it
compares again.
"""

import csv
import io
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_basics import (
    bpe,
    charts,
    command_line,
    compare,
    config,
    followers,
    plot,
    presets,
    programs,
    records,
    run,
    signals,
    sources,
    trials,
)

TRAIN = (sys.executable, "-m", "llm_basics.train")

# of all training runs together
MOST_THREADS = 1024

# how often running trainings are looked at
LOOK_SECONDS = 0.2

# of a log that may say why a run failed
TAIL_BYTES = 4000


@dataclass(frozen=True)
class Place:
    """Where a trial is, and how far it has come."""

    trial: trials.Trial
    folder: Path

    @property
    def is_finished(self) -> bool:
        """Whether the last step was made and evaluated."""
        steps = self.trial.options.train.steps
        return any(m["step"] == steps and "val_loss" in m for m in run.read_metrics(self.folder))

    @property
    def log(self) -> Path:
        """What the training run says."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def file(self) -> Path:
        """The options of the training run."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    def reason(self) -> str:
        """The last words of a run that failed."""
        try:
            said = self.log.read_bytes()[-TAIL_BYTES:].decode("utf-8", errors="replace").splitlines()
        except OSError:
            return "it said nothing"
        return next((line for line in reversed(said) if line.strip()), "it said nothing")


def find_places(sweep: trials.Sweep, out: Path) -> list[Place]:
    """Where each trial is: the folder of a run with the same options, or a new one."""
    taken = {path.stem for path in out.glob("*.yaml")} | {
        path.name for path in out.glob("*") if path.is_dir()
    }
    known = [
        (trials.changed_options(presets.load(str(path))), path.with_suffix(""))
        for path in sorted(out.glob("*.yaml"))
    ]
    places = []
    for trial in sweep.trials:
        own = trials.changed_options(trial.options)
        # one that was killed before its first checkpoint cannot be gone on with
        found = [folder for options, folder in known if options == own and not _is_stuck(folder)]
        if not found:
            found = [out / next(name for name in trials.numbered(trial.name) if name not in taken)]
            taken.add(found[0].name)
        places.append(Place(trial, found[0]))
    return places


def check_texts(places: Sequence[Place], origin: str) -> None:
    """Raise ValueError if the text of a run that is to be trained is not there."""
    for source in dict.fromkeys(place.trial.options.data for place in places if not place.is_finished):
        try:
            sources.find(source)
        except ValueError as error:
            raise ValueError(f"data: {error} ({origin})") from None


def _is_stuck(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir()) and not run.checkpoints(folder)


# --------------------------------------------------------------------------------------------------
# Training


def train_all(places: Sequence[Place], jobs: int) -> dict[str, int]:
    """Train what is not finished, `jobs` runs at a time, and return the exit statuses that are not 0.

    One that fails stops no other. A request to stop goes on to those that run, which save; then it is raised.
    """
    waiting, statuses = deque(place for place in places if not place.is_finished), {}
    done, total = len(places) - len(waiting), len(places)
    if done:
        followers.tell(f"{done} of {total} runs are finished already")
    running: list[tuple[Place, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or running:
            signals.poll()
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                place, process, began = entry
                running.remove(entry)
                done += 1
                followers.tell(
                    f"[{done}/{total}] {place.folder.name}: {_verdict(place, process.returncode, began)}"
                )
                if process.returncode:
                    statuses[place.folder.name] = process.returncode
            # one prepares the text, those after it find it
            if waiting and len(running) < jobs and all(_has_begun(place) for place, _, _ in running):
                running.append((waiting[0], start(waiting.popleft(), jobs), time.monotonic()))
            time.sleep(LOOK_SECONDS)
    finally:
        for _, process, _ in running:
            process.send_signal(signals.SIGNALS[0])
        for _, process, _ in running:
            process.wait()
    return statuses


def start(place: Place, jobs: int) -> subprocess.Popen[bytes]:
    """Begin a training run, or go on with one, on its share of the cores."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, bpe.usable_cores(MOST_THREADS) // jobs)))
    if run.checkpoints(place.folder):
        arguments = ["--resume", str(place.folder)]
    else:
        trials.write_options(place.trial.options, place.file)
        arguments = ["--config", str(place.file), "--run_dir", str(place.folder)]
    with open(place.log, "ab") as log:
        return subprocess.Popen(
            [*TRAIN, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            # a Ctrl-C reaches it through this program alone, once
            start_new_session=True,
        )


def _has_begun(place: Place) -> bool:
    return (place.folder / "config.json").exists()


def _verdict(place: Place, status: int, began: float) -> str:
    seconds = f"{time.monotonic() - began:.0f} s"
    if status:
        return f"failed after {seconds} with status {status}: {place.reason()} (see {place.log})"
    loss = records.read(str(place.folder)).summary().get("val_loss", math.nan)
    return f"validation loss {loss:.4f}, {seconds}"


# --------------------------------------------------------------------------------------------------
# What came out


def outcomes(places: Sequence[Place]) -> list[charts.Outcome]:
    """What each setting led to, its seeds together, in the order of the sweep."""
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(repr(place.trial.setting), []).append(place)
    found = []
    for group in groups.values():
        ended = [records.read(str(place.folder)).summary() for place in group if place.is_finished]
        options = group[0].trial.options
        train, model = options.train, _shape(group, options)
        tokens = train.steps * train.batch_size * train.grad_accumulation_steps * model.context_length
        found.append(
            charts.Outcome(
                group[0].trial.setting,
                [summary["val_loss"] for summary in ended],
                model.n_multiplied,
                tokens,
                float(tokens) * model.flops_per_token,
            )
        )
    return found


def _shape(group: Sequence[Place], options: config.Config) -> config.ModelConfig:
    """As it was trained: the tokenizer says how large the vocabulary is."""
    for place in group:
        if _has_begun(place) and (shape := records.read(str(place.folder)).shape) is not None:
            return shape
    return options.model


def table(found: Sequence[charts.Outcome]) -> tuple[list[str], list[list[str]]]:
    """Titles, and a row for each setting, the lowest loss first; without a loss last."""
    names = list(found[0].setting)
    rows = [
        [
            *(str(outcome.setting[name]) for name in names),
            f"{outcome.mean:.4f}" if outcome.losses else "none",
            f"{outcome.spread:.4f}" if len(outcome.losses) > 1 else "-",
            str(len(outcome.losses)),
            f"{outcome.weights:,}" if outcome.losses else "-",
            f"{outcome.tokens:,}" if outcome.losses else "-",
        ]
        for outcome in sorted(found, key=lambda o: o.mean if o.losses else float("inf"))
    ]
    return [*names, "val loss", "spread", "runs", "weights", "tokens"], rows


def results(places: Sequence[Place], statuses: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A flat row for each run: its setting, how it ended, what it measured."""
    for place in places:
        is_finished = place.is_finished
        state = "finished" if is_finished else "failed" if place.folder.name in statuses else "unfinished"
        row = {"run": place.folder.name, "state": state, **place.trial.setting, "seed": place.trial.seed}
        yield row | (records.read(str(place.folder)).summary() if is_finished else {})


def write_results(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write results.json and results.csv."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run.write_file(out / "results.json", json.dumps(run.as_json(list(rows)), indent=2) + "\n")
    run.write_file(out / "results.csv", content.getvalue())


def conclude(sweep: trials.Sweep, places: Sequence[Place], statuses: dict[str, int], out: Path) -> None:
    """Compare: print a table, and write results, figures and a page."""
    found = outcomes(places)
    write_results(list(results(places, statuses)), out)
    screens = [compare.new_screen(), compare.recording_screen()]
    for screen in screens:
        compare.print_table(screen, *table(found))
    ended = [records.read(str(place.folder)) for place in places if place.is_finished]
    if not ended:
        print(f"no run has come to its end; {out}/results.csv says of each how far it came")
        return
    draw = charts.draw_scaling if sweep.figure == "scaling" else charts.draw_options
    pictures = [draw(found, out / f"{sweep.name}.png"), plot.draw(ended, out / "curves.png", "tokens")]
    lines = [
        f"loss over {name}: {law.factor:.4g} * {name} ** {law.exponent:.4f}"
        for name, law in (charts.scaling_laws(found) if sweep.figure == "scaling" else {}).items()
    ]
    for screen, line in itertools.product(screens, lines):
        screen.print(line)
    compare.write_page(out / "report.html", f"Sweep {sweep.name}", screens[1], pictures)
    print(*pictures, out / "report.html", out / "results.csv", sep="\n")


def main(options: programs.SweepConfig) -> int:
    """Train and compare as `options` say. Returns the exit status."""
    with command_line.exit_on_mistake():
        sweep = trials.load(options.sweep)
        out = Path(options.out or run.RUNS / sweep.name)
        check_texts(find_places(sweep, out), options.sweep)
        out.mkdir(parents=True, exist_ok=True)
        with signals.listening(), run.locked(out):
            places = find_places(sweep, out)
            try:
                statuses = train_all(places, options.jobs)
            except signals.Stopped as stop:
                command = f"uv run python -m llm_basics.sweep {shlex.join(sys.argv[1:])}"
                followers.tell(f"stopped by {stop.name}; what ran is saved; go on with: {command}")
                return stop.status
            conclude(sweep, places, statuses, out)
    return 1 if statuses else 0


if __name__ == "__main__":
    sys.exit(
        main(command_line.program_options(programs.SweepConfig(), sys.argv[1:], "python -m llm_basics.sweep"))
    )
