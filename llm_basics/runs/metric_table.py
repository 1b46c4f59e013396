"""Metrics of a run as columns, and as buckets of steps that preserve spikes at any zoom."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_basics.runs import tail

# entries of a line that are not metrics
NOT_METRICS = {"step", "attempt", "nonfinite", "resumed"}

MAX_COLUMNS = 64

# maximum reading time per request; the next request continues from there
READ_SECONDS = 0.7


@dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl: those of a training step, or of an evaluation."""

    step: int
    """Number of updates of the weights."""
    train_loss: float
    """Cross-entropy of a step's batch in nats per token: -ln of the probability of the token that follows."""
    val_loss: float
    """Cross-entropy on held-out text, which is not trained on: it measures generalization."""
    perplexity: float
    """exp(val_loss): as uncertain as a choice among this many equally likely tokens."""
    bits_per_byte: float
    """Bits to encode a byte of held-out text with the model; comparable across tokenizers."""
    accuracy: float
    """Share of held-out tokens that are the model's most likely one."""
    lr: float
    """Learning rate: how far a step of the optimizer moves the weights."""
    grad_norm: float
    """Length of the gradient of all weights, before clipping. Jumps come with spikes of the loss."""
    step_seconds: float
    """Seconds of a step, without evaluation, samples and saving."""
    tokens_per_second: float
    """Training tokens per second, without evaluation, samples and saving."""
    eta_seconds: float
    """Time to the last step at the current speed (estimated time of arrival)."""


@dataclass(frozen=True)
class Buckets:
    """A metric in ranges of steps: entry i covers the steps from `first_step[i]` to `last_step[i]`.

    `min`, `max` and `mean` are of the finite values, None without any; `last` is None if not finite. `count`
    counts all values, `nonfinite` the non-finite ones. `seconds` is the training time up to `last_step`.
    """

    first_step: list[int]
    last_step: list[int]
    min: list[float | None]
    max: list[float | None]
    mean: list[float | None]
    last: list[float | None]
    count: list[int]
    nonfinite: list[int]
    seconds: list[float | None]


class Table:
    """The metrics in a file, read as it grows. Missing values are NaN, non-finite values infinity."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.offset = self.n_rows = 0
        self.is_complete = False
        self._steps = np.zeros(0, np.int64)
        self._columns: dict[str, np.ndarray] = {}

    @property
    def steps(self) -> np.ndarray:
        """The step of each row, in order."""
        return self._steps[: self.n_rows]

    def column(self, name: str) -> np.ndarray:
        """The values of a metric, one for each row."""
        return self._columns[name][: self.n_rows]

    @property
    def names(self) -> list[str]:
        """The metrics of this run."""
        return list(self._columns)

    def update(self, seconds: float = READ_SECONDS) -> None:
        """Read appended lines for at most about `seconds`, and set `is_complete` if all were read."""
        end = time.monotonic() + seconds
        self.is_complete = False
        while not self.is_complete and time.monotonic() < end:
            entries, offset = tail.read(self.path, self.offset)
            if offset < self.offset:
                self._clear()
                continue
            self.is_complete = offset == self.offset
            self.offset = offset
            self._append(entries)

    def _append(self, entries: Sequence[dict[str, Any]]) -> None:
        rows: list[dict[str, Any]] = []
        for entry in entries:
            step = entry.get("step")
            if type(step) is not int or not 0 <= step <= tail.MAX_EXACT:
                continue
            if "resumed" in entry:
                self._add(rows)
                rows = []
                # a resumed run replaces the later steps of an earlier attempt
                self._keep(self.steps <= step)
            else:
                rows.append(entry)
        self._add(rows)

    def _add(self, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        names = dict.fromkeys(name for names in dict.fromkeys(map(tuple, rows)) for name in names)
        for name in names:
            if name not in self._columns and name not in NOT_METRICS and len(self._columns) < MAX_COLUMNS:
                self._columns[name] = np.full(len(self._steps), math.nan)
        start, self.n_rows = self.n_rows, self.n_rows + len(rows)
        if self.n_rows > len(self._steps):
            size = max(1024, 2 * self.n_rows)
            self._steps = np.resize(self._steps, size)
            self._columns = {name: _resized(column, size) for name, column in self._columns.items()}
        self._steps[start : self.n_rows] = [row["step"] for row in rows]
        for name, column in self._columns.items():
            column[start : self.n_rows] = _numbers([row.get(name, math.nan) for row in rows])
        if (np.diff(self._steps[max(0, start - 1) : self.n_rows]) < 0).any():
            self._keep(np.argsort(self.steps, kind="stable"))

    def _keep(self, rows: np.ndarray) -> None:
        """Keep only `rows`, a mask or indices."""
        kept = {name: self.column(name)[rows] for name in self._columns}
        steps = self.steps[rows]
        self.n_rows = len(steps)
        self._steps[: self.n_rows] = steps
        for name, column in kept.items():
            self._columns[name][: self.n_rows] = column

    # -- buckets ----------------------------------------------------------------------------------

    def buckets(self, name: str, first: int, last: int, most: int) -> Buckets:
        """The metric `name` from step `first` to `last` in at most about `most` buckets.

        The width of a bucket is a power of 2 and its start a multiple of it, so that complete buckets do not
        change while the run continues.
        """
        begin, end = np.searchsorted(self.steps, [first, last + 1])
        values, steps = self.column(name)[begin:end], self.steps[begin:end]
        is_present = ~np.isnan(values)
        values, steps = values[is_present], steps[is_present]
        if not len(steps):
            return Buckets([], [], [], [], [], [], [], [], [])
        n_steps = int(steps[-1] - steps[0]) + 1
        width = 1 << max(0, math.ceil(math.log2(n_steps / most)))
        starts = np.flatnonzero(np.diff(steps // width, prepend=-1))
        ends = np.append(starts[1:], len(steps)) - 1
        is_finite = np.isfinite(values)
        count = np.diff(np.append(starts, len(steps)))
        finite = np.add.reduceat(is_finite.astype(np.int64), starts)
        total = np.add.reduceat(np.where(is_finite, values, 0.0), starts)
        return Buckets(
            steps[starts].tolist(),
            steps[ends].tolist(),
            _listed(np.minimum.reduceat(np.where(is_finite, values, math.inf), starts)),
            _listed(np.maximum.reduceat(np.where(is_finite, values, -math.inf), starts)),
            _listed(np.where(finite > 0, total / np.maximum(finite, 1), math.nan)),
            _listed(values[ends]),
            count.tolist(),
            (count - finite).tolist(),
            self._seconds(steps[ends]),
        )

    def _seconds(self, steps: np.ndarray) -> list[float | None]:
        """Training time up to each of `steps`, without evaluation and saving."""
        if "step_seconds" not in self._columns:
            return [None] * len(steps)
        each = self.column("step_seconds")
        is_known = np.isfinite(each)
        at = self.steps[is_known].astype(float)
        if not len(at):
            return [None] * len(steps)
        total = np.cumsum(np.diff(at, prepend=0) * each[is_known])
        return _listed(np.interp(steps, np.append(0, at), np.append(0, total)))


def _numbers(values: list[Any]) -> np.ndarray:
    """Values of a column as floats: null becomes infinity, any other non-number NaN."""
    try:
        if None not in values:
            return np.array(values, float)
    except (TypeError, ValueError, OverflowError):
        pass
    return np.array([_number(value) for value in values], float)


def _number(value: Any) -> float:
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _resized(column: np.ndarray, size: int) -> np.ndarray:
    larger = np.full(size, math.nan)
    larger[: len(column)] = column
    return larger


def _listed(values: np.ndarray) -> list[float | None]:
    """The values as a list, with None for non-finite values."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
