"""Train a model with each setting of a sweep, and compare the results.

uv run python -m llm_basics.sweep lr --jobs 2
uv run python -m llm_basics.sweep mine.yaml --out runs/mine

`sweep_spec.py` describes the format of a sweep file. The folder of a sweep holds a run directory, a file for
--config and a log of each trial. The same command resumes an interrupted sweep, and compares a finished one
again.
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

from llm_basics.analysis import compare, figures, run_data, sweep_figures, sweep_spec
from llm_basics.cli import commands, parse
from llm_basics.core import bpe, config, files, presets
from llm_basics.data import sources
from llm_basics.runs import console, locks, run_dir, signals

TRAIN = (sys.executable, "-m", "llm_basics.train")

# maximum number of threads of all training runs together
MOST_THREADS = 1024

# interval between polls of the training processes
POLL_SECONDS = 0.2

# number of bytes at the end of a log to search for the error
TAIL_BYTES = 4000


@dataclass(frozen=True)
class TrialRun:
    """A trial and its run directory."""

    trial: sweep_spec.Trial
    folder: Path

    @property
    def is_finished(self) -> bool:
        """Whether the last step was evaluated."""
        steps = self.trial.options.train.steps
        return any(m["step"] == steps and "val_loss" in m for m in run_dir.read_metrics(self.folder))

    @property
    def log(self) -> Path:
        """Output of the training process."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def file(self) -> Path:
        """Options of the training run, for --config."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    def reason(self) -> str:
        """The last line in the log of a failed run."""
        try:
            lines = self.log.read_bytes()[-TAIL_BYTES:].decode("utf-8", errors="replace").splitlines()
        except OSError:
            return "the log is empty"
        return next((line for line in reversed(lines) if line.strip()), "the log is empty")


def find_trial_runs(sweep: sweep_spec.Sweep, out: Path) -> list[TrialRun]:
    """The run of each trial: an existing one with the same options, or a new directory."""
    taken = {path.stem for path in out.glob("*.yaml")} | {
        path.name for path in out.glob("*") if path.is_dir()
    }
    known = [
        (sweep_spec.changed_options(presets.load(str(path))), path.with_suffix(""))
        for path in sorted(out.glob("*.yaml"))
    ]
    trial_runs = []
    for trial in sweep.trials:
        changed = sweep_spec.changed_options(trial.options)
        # a run killed before its first checkpoint cannot be resumed
        found = [folder for options, folder in known if options == changed and not _is_stuck(folder)]
        if not found:
            found = [out / next(name for name in sweep_spec.numbered(trial.name) if name not in taken)]
            taken.add(found[0].name)
        trial_runs.append(TrialRun(trial, found[0]))
    return trial_runs


def check_sources(trial_runs: Sequence[TrialRun], origin: str) -> None:
    """Raise ValueError if the text of an unfinished run does not exist."""
    for source in dict.fromkeys(
        trial_run.trial.options.data for trial_run in trial_runs if not trial_run.is_finished
    ):
        try:
            sources.find(source)
        except ValueError as error:
            raise ValueError(f"data: {error} ({origin})") from None


def _is_stuck(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir()) and not run_dir.checkpoints(folder)


# --------------------------------------------------------------------------------------------------
# Training


def train_all(trial_runs: Sequence[TrialRun], jobs: int) -> dict[str, int]:
    """Train the unfinished runs, `jobs` at a time, and return the nonzero exit statuses.

    A failed run does not stop the others. A signal is forwarded to the running processes, which save; then
    `signals.Stopped` is raised.
    """
    waiting, statuses = deque(trial_run for trial_run in trial_runs if not trial_run.is_finished), {}
    done, total = len(trial_runs) - len(waiting), len(trial_runs)
    if done:
        console.print_line(f"{done} of {total} runs are already finished")
    running: list[tuple[TrialRun, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or running:
            signals.poll()
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                trial_run, process, began = entry
                running.remove(entry)
                done += 1
                result = _verdict(trial_run, process.returncode, began)
                console.print_line(f"[{done}/{total}] {trial_run.folder.name}: {result}")
                if process.returncode:
                    statuses[trial_run.folder.name] = process.returncode
            # the first run prepares the text for the others
            if waiting and len(running) < jobs and all(_has_begun(trial_run) for trial_run, _, _ in running):
                running.append((waiting[0], start(waiting.popleft(), jobs), time.monotonic()))
            time.sleep(POLL_SECONDS)
    finally:
        for _, process, _ in running:
            process.send_signal(signals.SIGNALS[0])
        for _, process, _ in running:
            process.wait()
    return statuses


def start(trial_run: TrialRun, jobs: int) -> subprocess.Popen[bytes]:
    """Start or resume a training run on its share of the cores."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, bpe.usable_cores(MOST_THREADS) // jobs)))
    if run_dir.checkpoints(trial_run.folder):
        arguments = ["--resume", str(trial_run.folder)]
    else:
        sweep_spec.write_options(trial_run.trial.options, trial_run.file)
        arguments = ["--config", str(trial_run.file), "--run_dir", str(trial_run.folder)]
    with files.open_output(trial_run.log, "ab") as log:
        return subprocess.Popen(
            [*TRAIN, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            # only this program receives Ctrl-C, and forwards it once
            start_new_session=True,
        )


def _has_begun(trial_run: TrialRun) -> bool:
    return (trial_run.folder / "config.json").exists()


def _verdict(trial_run: TrialRun, status: int, began: float) -> str:
    seconds = f"{time.monotonic() - began:.0f} s"
    if status:
        return f"failed after {seconds} with status {status}: {trial_run.reason()} (see {trial_run.log})"
    loss = run_data.read(str(trial_run.folder)).summary().get("val_loss", math.nan)
    return f"validation loss {loss:.4f}, {seconds}"


# --------------------------------------------------------------------------------------------------
# Results


def outcomes(trial_runs: Sequence[TrialRun], by: str = "val_loss") -> list[sweep_figures.Outcome]:
    """The outcome of each setting over its seeds, by the metric `by`, in the order of the sweep."""
    groups: dict[str, list[TrialRun]] = {}
    for trial_run in trial_runs:
        groups.setdefault(repr(trial_run.trial.setting), []).append(trial_run)
    found = []
    for group in groups.values():
        ended = [
            run_data.read(str(trial_run.folder)).summary() for trial_run in group if trial_run.is_finished
        ]
        options = group[0].trial.options
        train, model = options.train, _shape(group, options)
        tokens = train.steps * train.batch_size * train.grad_accumulation_steps * model.context_length
        found.append(
            sweep_figures.Outcome(
                group[0].trial.setting,
                [summary[by] for summary in ended if by in summary],
                model.n_matmul_params,
                tokens,
                float(tokens) * model.flops_per_token,
                by,
            )
        )
    return found


def divide(trial_runs: Sequence[TrialRun], groups: Sequence[compare.Group]) -> list[list[TrialRun]]:
    """The runs of each group of finished ones; those of settings without a finished run are in the last."""
    ended = {repr(trial_run.trial.setting) for trial_run in trial_runs if trial_run.is_finished}
    names = [{record.name for record in group.runs} for group in groups]
    rest = [trial_run for trial_run in trial_runs if repr(trial_run.trial.setting) not in ended]
    parts = [[trial_run for trial_run in trial_runs if trial_run.folder.name in each] for each in names]
    return [*parts[:-1], parts[-1] + rest]


def _shape(group: Sequence[TrialRun], options: config.Config) -> config.ModelConfig:
    """The trained model's config, with the vocabulary size of the tokenizer."""
    for trial_run in group:
        if _has_begun(trial_run) and (shape := run_data.read(str(trial_run.folder)).shape) is not None:
            return shape
    return options.model


def table(found: Sequence[sweep_figures.Outcome]) -> tuple[list[str], list[list[str]]]:
    """Titles and a row for each setting, lowest loss first; settings without a loss last."""
    names, loss = list(found[0].setting), compare.COLUMNS[found[0].metric]
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
    return [*names, loss, "spread", "runs", "weights", "tokens"], rows


def results(trial_runs: Sequence[TrialRun], statuses: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A flat row for each run: setting, state and summary."""
    for trial_run in trial_runs:
        is_finished = trial_run.is_finished
        state = "finished" if is_finished else "failed" if trial_run.folder.name in statuses else "unfinished"
        row = {
            "run": trial_run.folder.name,
            "state": state,
            **trial_run.trial.setting,
            "seed": trial_run.trial.seed,
        }
        yield row | (run_data.read(str(trial_run.folder)).summary() if is_finished else {})


def write_results(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write results.json and results.csv."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(out / "results.json", json.dumps(run_dir.as_json(list(rows)), indent=2) + "\n")
    files.write(out / "results.csv", content.getvalue())


def conclude(
    sweep: sweep_spec.Sweep, trial_runs: Sequence[TrialRun], statuses: dict[str, int], out: Path
) -> None:
    """Print a table, and write results, figures and a report; all for each group of comparable runs."""
    write_results(list(results(trial_runs, statuses)), out)
    screens = [compare.new_screen(), compare.recording_screen()]
    ended = [run_data.read(str(trial_run.folder)) for trial_run in trial_runs if trial_run.is_finished]
    if not ended:
        compare.print_table(screens[0], *table(outcomes(trial_runs)))
        print(f"no run has finished; see {out}/results.csv")
        return
    groups = compare.groups(ended)
    found = [outcomes(part, group.by) for part, group in zip(divide(trial_runs, groups), groups, strict=True)]
    for screen in screens:
        compare.print_groups(screen, groups, [table(part) for part in found])
    draw = sweep_figures.draw_scaling if sweep.figure == "scaling" else sweep_figures.draw_options
    pictures, lines = [], []
    for number, (part, group) in enumerate(zip(found, groups, strict=True), start=1):
        suffix = f"-{number}.png" if number > 1 else ".png"
        curves = ("train_loss", "val_loss") if group.by == "val_loss" else (group.by,)
        pictures += [draw(part, out / f"{sweep.name}{suffix}")]
        pictures += [figures.draw(group.runs, out / f"curves{suffix}", "tokens", curves)]
        lines += [
            f"{part[0].measure} over {name}: {law.factor:.4g} * {name} ** {law.exponent:.4f}"
            for name, law in (sweep_figures.scaling_laws(part) if sweep.figure == "scaling" else {}).items()
        ]
    for screen, line in itertools.product(screens, lines):
        screen.print(line)
    compare.write_page(out / "report.html", f"Sweep {sweep.name}", screens[1], pictures)
    print(*pictures, out / "report.html", out / "results.csv", sep="\n")


def main(options: commands.SweepConfig) -> int:
    """Train and compare. Returns the exit status."""
    with parse.exit_on_error():
        sweep = sweep_spec.load(options.sweep)
        out = Path(options.out or run_dir.RUNS / sweep.name)
        check_sources(find_trial_runs(sweep, out), options.sweep)
        files.create_folder(out)
        with signals.listening(), locks.locked(out):
            trial_runs = find_trial_runs(sweep, out)
            try:
                statuses = train_all(trial_runs, options.jobs)
            except signals.Stopped as stop:
                command = f"uv run python -m llm_basics.sweep {shlex.join(sys.argv[1:])}"
                console.print_line(
                    f"stopped by {stop.name}; running trials are saved; resume with: {command}"
                )
                return stop.status
            conclude(sweep, trial_runs, statuses, out)
    return 1 if statuses else 0
