"""Grading of foreign adapters: fair to right code, clear about wrong code.

uv run pytest tests/test_grading.py
"""

import time

import pytest

from llm_basics.learn import sandbox

# --------------------------------------------------------------------------------------------------
# Time


def test_a_block_that_waits_has_longer_on_a_busy_machine(monkeypatch):
    monkeypatch.setattr(sandbox, "slowdown", lambda: 100.0)
    with sandbox.time_limit(0.1):
        time.sleep(0.4)
    monkeypatch.setattr(sandbox, "slowdown", lambda: 1.0)
    with pytest.raises(sandbox.TimedOut), sandbox.time_limit(0.1):
        time.sleep(60)


def test_the_limit_counts_the_time_of_the_processor(monkeypatch):
    # a machine that gives half of the processor, which is not seen when it is measured
    monkeypatch.setattr(sandbox, "slowdown", lambda: 1.0)
    monkeypatch.setattr(sandbox.time, "process_time", lambda: time.monotonic() / 2)
    with sandbox.time_limit(0.4):
        time.sleep(0.6)
    # and one that is slow, but gave all of the processor
    monkeypatch.setattr(sandbox, "slowdown", lambda: 100.0)
    monkeypatch.setattr(sandbox.time, "process_time", time.monotonic)
    with pytest.raises(sandbox.TimedOut), sandbox.time_limit(0.1):
        time.sleep(5)


def test_limits_may_stand_in_one_another():
    done = []
    with pytest.raises(sandbox.TimedOut), sandbox.time_limit(0.1):
        with sandbox.time_limit(30.0):
            time.sleep(0.4)
            done.append("inner block, whose limit is not exceeded")
        time.sleep(60)
    with sandbox.time_limit(30.0):
        with pytest.raises(sandbox.TimedOut), sandbox.time_limit(0.05):
            time.sleep(60)
        time.sleep(0.3)
        done.append("outer block")
    assert len(done) == 2
