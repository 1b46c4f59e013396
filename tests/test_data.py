"""Batches. Alone: uv run pytest tests/test_data.py"""

import collections

import numpy as np
import pytest
import torch

from llm_basics import data

# --------------------------------------------------------------------------------------------------
# get_batch


def test_targets_are_inputs_one_token_on(adapters):
    tokens = np.arange(100, 150)
    inputs, targets = adapters.run_get_batch(tokens, 32, 7, "cpu")
    assert inputs.shape == targets.shape == (32, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))


def test_every_start_is_equally_likely(adapters):
    tokens, context = np.arange(13), 4
    starts = torch.cat([adapters.run_get_batch(tokens, 100, context, "cpu")[0][:, 0] for _ in range(90)])
    counts = collections.Counter(starts.tolist())
    assert set(counts) == set(range(9)), "the first and the last possible start must come, and none beyond"
    # 1000 expected for each; 5 standard deviations of a binomial are 150
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_windows_of_a_batch_start_independently(adapters):
    inputs, _ = adapters.run_get_batch(np.arange(10_000), 64, 3, "cpu")
    assert len(set(inputs[:, 0].tolist())) > 50


def test_batch_lands_on_the_device_asked_for(adapters):
    inputs, targets = adapters.run_get_batch(np.arange(30), 2, 3, "meta")
    assert inputs.device.type == targets.device.type == "meta"


class CountingMemmap(np.memmap):
    """A memory map that counts how many of its elements are read at once."""

    read = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        CountingMemmap.read += getattr(found, "size", 1)
        return found

    def __array__(self, *args, **kwargs):
        CountingMemmap.read += self.size
        return super().__array__(*args, **kwargs)


def test_uint16_memmap_becomes_int64_and_is_not_read_whole(adapters, tmp_path):
    (np.arange(200_000) % 65_536).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = CountingMemmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    CountingMemmap.read = 0
    inputs, targets = adapters.run_get_batch(tokens, 8, 16, "cpu")
    assert inputs.dtype == torch.int64
    assert torch.equal((inputs + 1) % 65_536, targets)
    assert CountingMemmap.read <= 20 * 8 * 17, "reads far more than its windows"


def test_ids_above_int16_stay_positive(adapters):
    inputs, _ = adapters.run_get_batch(np.full(50, 60_000, dtype=np.uint16), 2, 5, "cpu")
    assert inputs.unique().tolist() == [60_000]


def test_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match="more tokens than model.context_length 8, got 8"):
        data.get_batch(np.arange(8), 1, 8)
    assert data.get_batch(np.arange(9), 1, 8)[1][0, -1] == 8


def test_batches_follow_from_the_generator():
    tokens = np.arange(1000)
    first, again = (data.get_batch(tokens, 4, 5, rng=np.random.default_rng(3))[0] for _ in range(2))
    assert torch.equal(first, again)


# --------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture
def shards():
    return [np.arange(1000, 1050), np.arange(2000, 2004), np.arange(3000, 3091)]


def test_batches_are_a_function_of_their_number(shards):
    forward = data.Batches(shards, 3, 6, seed=5)
    backward = data.Batches(shards, 3, 6, seed=5)
    expected = [forward[i] for i in range(20)]
    for i in reversed(range(20)):
        assert torch.equal(backward[i][0], expected[i][0])
        assert torch.equal(backward[i][1], expected[i][0] + 1)


def test_an_epoch_sees_each_window_once_and_each_epoch_differs(shards):
    batches = data.Batches(shards, 1, 6, seed=1)
    n = batches.windows_per_epoch
    epochs = [[batches[epoch * n + i][0][0, 0].item() for i in range(n)] for epoch in range(3)]
    for starts in epochs:
        ordered = sorted(starts)
        assert all(b - a == 6 or b - a > 900 for a, b in zip(ordered, ordered[1:], strict=False))
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != sorted(epochs[1])
    assert epochs[0] != sorted(epochs[0])


def test_every_place_is_reached_in_some_epoch(shards):
    batches = data.Batches(shards[:1], 1, 6, seed=0)
    seen = {t for i in range(60 * batches.windows_per_epoch) for t in batches[i][1][0].tolist()}
    assert seen == set(range(1001, 1050))


def test_a_batch_may_reach_into_the_next_epoch(shards):
    one, three = data.Batches(shards, 1, 6, seed=4), data.Batches(shards, 3, 6, seed=4)
    for number in range(3 * one.windows_per_epoch):
        expected = torch.cat([one[i][0] for i in range(3 * number, 3 * number + 3)])
        assert torch.equal(three[number][0], expected)


def test_shards_too_short_for_a_window_are_passed_over(shards):
    batches = data.Batches(shards, 1, 6, seed=0)
    assert all(not 2000 <= batches[i][0][0, 0] < 3000 for i in range(100))
    with pytest.raises(ValueError, match="context_length 100, got 91"):
        data.Batches(shards, 1, 100)


def test_smallest_possible_text():
    inputs, targets = data.Batches([np.arange(7)], 2, 6, seed=0)[123]
    assert inputs.tolist() == [list(range(6))] * 2
    assert targets.tolist() == [list(range(1, 7))] * 2


def test_sequential_batches_go_through_all_windows_once():
    tokens = np.arange(100)
    starts = [s for inputs, _ in data.sequential_batches(tokens, 4, 9) for s in inputs[:, 0].tolist()]
    assert starts == list(range(0, 99, 9))
    few = [
        s for inputs, _ in data.sequential_batches(tokens, 2, 9, max_batches=2) for s in inputs[:, 0].tolist()
    ]
    assert few == [0, 27, 63, 90]
