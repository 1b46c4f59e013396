"""Metrics as columns and buckets. Alone: uv run pytest tests/test_metric_table.py"""

import json
import math
import random

import pytest

from llm_basics.runs import metric_table, run_dir, tail


def write_metrics(folder, entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries]
    (folder / run_dir.METRICS).write_text("".join(lines))


def test_a_spike_of_one_step_survives_any_zoom(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(tmp_path, [{"step": s, "loss": 99.0 if s == 5001 else 1.0} for s in range(10_000)])
    table = metric_table.Table(path)
    table.update()
    for most in (1, 7, 100, 1000, 4000):
        found = table.buckets("loss", 0, 9_999, most)
        assert max(found.max) == 99 and min(found.min) == 1 and sum(found.count) == 10_000
        assert most <= 2 or len(found.count) <= most + 1
    assert table.buckets("loss", 5000, 5002, 10).last == [1, 99, 1]


def test_buckets_are_those_of_a_simple_loop(tmp_path):
    values = [random.Random(0).choice([s / 3, None, 2.5]) for s in range(500)]
    write_metrics(tmp_path, [{"step": 3 * s, "loss": v} for s, v in enumerate(values)])
    table = metric_table.Table(tmp_path / "metrics.jsonl")
    table.update()
    found = table.buckets("loss", 30, 900, 40)
    steps = [3 * s for s in range(500) if 30 <= 3 * s <= 900]
    width = next(w for w in (1, 2, 4, 8, 16, 32, 64) if 40 * w >= steps[-1] - steps[0] + 1)
    for i, key in enumerate(sorted({s // width for s in steps})):
        inside = [s for s in steps if s // width == key]
        finite = [values[s // 3] for s in inside if values[s // 3] is not None]
        assert (found.first_step[i], found.last_step[i]) == (inside[0], inside[-1])
        assert found.count[i] == len(inside) and found.nonfinite[i] == len(inside) - len(finite)
        assert found.min[i] == min(finite, default=None) and found.max[i] == max(finite, default=None)
        assert found.mean[i] == (pytest.approx(sum(finite) / len(finite)) if finite else None)
        assert found.last[i] == values[inside[-1] // 3]


def test_a_table_follows_a_file_and_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    table = metric_table.Table(path)
    write_metrics(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 5, "loss": 5.0}, '{"step": 7, "lo'])
    table.update()
    assert table.steps.tolist() == [1, 5]
    with open(path, "a") as file:
        file.write(
            '\n{"step": 3, "resumed": true}\n{"step": 4, "loss": null, "nonfinite": ["loss"], "lr": 2}\n'
        )
    table.update()
    assert table.steps.tolist() == [1, 4] and table.column("loss").tolist() == [1.0, math.inf]
    assert math.isnan(table.column("lr")[0]) and table.column("lr")[1] == 2
    write_metrics(tmp_path, [{"step": 2}])
    table.update()
    assert table.steps.tolist() == [2] and table.is_complete


def test_a_file_that_takes_long_is_read_in_parts(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(metric_table.time, "monotonic", lambda: next(clock))
    write_metrics(tmp_path, [{"step": s, "loss": 1.0, "padding": "x" * 1000} for s in range(3000)])
    table, n_rows = metric_table.Table(tmp_path / "metrics.jsonl"), [0]
    while not table.is_complete:
        table.update(seconds=2)  # one chunk by this clock
        n_rows.append(len(table.steps))
    assert n_rows == sorted(n_rows) and len(set(n_rows)) > 2 and n_rows[-1] == 3000


def test_a_long_line_and_what_follows_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 5000 + b'"}\n{"b": 1}\n')
    found, offset = [], 0
    while (result := tail.read(path, offset, 1024))[1] > offset:
        found, offset = found + result[0], result[1]
    assert found == [{"b": 1}] and offset == path.stat().st_size
