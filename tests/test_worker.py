"""The queue for what computes. Alone: uv run pytest tests/test_worker.py"""

import pytest

from llm_basics.inference import worker


def test_jobs_take_turns():
    order = []

    def count(name):
        for i in range(3):
            order.append(name)
            yield i

    queue = worker.Worker()
    gate = queue.stream(iter([0]))
    streams = [queue.stream(count(name)) for name in "ab"]
    assert list(gate) == [0] and [list(stream) for stream in streams] == [[0, 1, 2]] * 2
    assert order.count("a") == order.count("b") == 3 and order != list("aaabbb")


def test_a_closed_stream_stops_its_job():
    steps = []

    def endless():
        try:
            while True:
                steps.append(1)
                yield 1
        finally:
            steps.append("closed")

    queue = worker.Worker()
    stream = queue.stream(endless())
    next(stream)
    stream.close()
    assert queue.call(lambda: 7) == 7
    assert queue.call(lambda: 7) == 7
    assert steps[-1] == "closed"


def test_errors_of_a_job_reach_its_caller_and_a_limit_ends_it(monkeypatch):
    queue = worker.Worker()
    with pytest.raises(ZeroDivisionError):
        queue.call(lambda: 1 / 0)
    monkeypatch.setattr(worker, "MAX_SECONDS", -1.0)
    with pytest.raises(TimeoutError):
        queue.call(lambda: 1)
