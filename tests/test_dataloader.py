"""Batches. Alone: uv run pytest tests/test_dataloader.py"""

import numpy as np
import pytest
import torch

from llm_basics.core import dataloader

# --------------------------------------------------------------------------------------------------
# get_batch


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


def test_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match="more tokens than model.context_length 8, got 8"):
        dataloader.get_batch(np.arange(8), 1, 8)
    assert dataloader.get_batch(np.arange(9), 1, 8)[1][0, -1] == 8


def test_batches_follow_from_the_generator():
    tokens = np.arange(1000)
    first, again = (dataloader.get_batch(tokens, 4, 5, rng=np.random.default_rng(3))[0] for _ in range(2))
    assert torch.equal(first, again)


# --------------------------------------------------------------------------------------------------
# Batches


# of the first 24 windows of `shards` with seed 5, as versions without a stride have them
FIRST_TOKENS = (
    "3071 3011 3029 1023 3017 1041 3005 3065 1011 3077 3035 3047 "
    "3059 1017 1029 3083 3053 3023 3041 1005 1035 1013 1025 1037"
)


@pytest.fixture
def shards():
    return [np.arange(1000, 1050), np.arange(2000, 2004), np.arange(3000, 3091)]


def test_batches_are_a_function_of_their_number(shards):
    forward = dataloader.Batches(shards, 3, 6, seed=5)
    backward = dataloader.Batches(shards, 3, 6, seed=5)
    expected = [forward[i] for i in range(20)]
    for i in reversed(range(20)):
        assert torch.equal(backward[i][0], expected[i][0])
        assert torch.equal(backward[i][1], expected[i][0] + 1)


def test_an_epoch_sees_each_window_once_and_each_epoch_differs(shards):
    batches = dataloader.Batches(shards, 1, 6, seed=1)
    n = batches.windows_per_epoch
    epochs = [[batches[epoch * n + i][0][0, 0].item() for i in range(n)] for epoch in range(3)]
    for starts in epochs:
        ordered = sorted(starts)
        assert all(b - a == 6 or b - a > 900 for a, b in zip(ordered, ordered[1:], strict=False))
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != sorted(epochs[1])
    assert epochs[0] != sorted(epochs[0])


def test_every_place_is_reached_in_some_epoch(shards):
    batches = dataloader.Batches(shards[:1], 1, 6, seed=0)
    seen = {t for i in range(60 * batches.windows_per_epoch) for t in batches[i][1][0].tolist()}
    assert seen == set(range(1001, 1050))


def test_a_batch_may_reach_into_the_next_epoch(shards):
    one, three = dataloader.Batches(shards, 1, 6, seed=4), dataloader.Batches(shards, 3, 6, seed=4)
    for number in range(3 * one.windows_per_epoch):
        expected = torch.cat([one[i][0] for i in range(3 * number, 3 * number + 3)])
        assert torch.equal(three[number][0], expected)


def test_shards_too_short_for_a_window_are_passed_over(shards):
    batches = dataloader.Batches(shards, 1, 6, seed=0)
    assert all(not 2000 <= batches[i][0][0, 0] < 3000 for i in range(100))
    with pytest.raises(ValueError, match="context_length 100, got 91"):
        dataloader.Batches(shards, 1, 100)


def test_smallest_possible_text():
    inputs, targets = dataloader.Batches([np.arange(7)], 2, 6, seed=0)[123]
    assert inputs.tolist() == [list(range(6))] * 2
    assert targets.tolist() == [list(range(1, 7))] * 2


def test_windows_side_by_side_stand_where_they_always_stood(shards):
    batches = dataloader.Batches(shards, 1, 6, seed=5)
    found = [batches[number][0][0, 0].item() for number in range(24)]
    assert found == [int(token) for token in FIRST_TOKENS.split()]


@pytest.mark.parametrize("stride", [1, 2, 4, 5])
def test_overlapping_windows_are_a_stride_apart_and_reach_every_token(shards, stride):
    batches = dataloader.Batches(shards, 1, 6, seed=5, stride=stride)
    n, seen = batches.windows_per_epoch, set()
    assert n == sum(max(1, (len(tokens) - 7) // stride) for tokens in shards if len(tokens) > 6)
    for epoch in range(60):
        places = sorted(batches.place(epoch * n + i) for i in range(n))
        for shard in (0, 1):
            starts = [start for place, start in places if place == shard]
            assert set(np.diff(starts)) == {stride}
            assert 0 <= starts[0] and starts[-1] + 7 <= len(batches.shards[shard])
        seen |= {t for i in range(n) for t in batches[epoch * n + i][1][0].tolist()}
    assert seen == {*range(1001, 1050), *range(3001, 3091)}


def test_overlapping_batches_are_a_function_of_their_number(shards):
    forward, backward = (dataloader.Batches(shards, 3, 6, seed=5, stride=2) for _ in range(2))
    expected = [forward[i][0] for i in range(40)]
    assert all(torch.equal(backward[i][0], expected[i]) for i in reversed(range(40)))


@pytest.mark.parametrize("stride", [0, 7, -1])
def test_a_stride_outside_the_context_is_refused(shards, stride):
    said = f"stride must be from 1 to context_length 6, got {stride}"
    with pytest.raises(ValueError, match=said):
        dataloader.Batches(shards, 1, 6, stride=stride)
    with pytest.raises(ValueError, match=said):
        dataloader.WindowDataset(shards[0], 6, stride)


def test_sequential_batches_go_through_all_windows_once():
    tokens = np.arange(100)
    starts = [s for inputs, _ in dataloader.sequential_batches(tokens, 4, 9) for s in inputs[:, 0].tolist()]
    assert starts == list(range(0, 99, 9))
    few = [
        s
        for inputs, _ in dataloader.sequential_batches(tokens, 2, 9, max_batches=2)
        for s in inputs[:, 0].tolist()
    ]
    assert few == [0, 27, 63, 90]


# --------------------------------------------------------------------------------------------------
# WindowDataset


@pytest.mark.parametrize(("stride", "starts"), [(None, [0, 6, 12]), (6, [0, 6, 12]), (4, [0, 4, 8, 12])])
def test_a_dataset_holds_all_windows_in_order(stride, starts):
    windows = dataloader.WindowDataset(np.arange(19, dtype=np.uint16), 6, stride)
    assert len(windows) == len(starts)
    found = list(windows)
    assert [inputs.tolist() for inputs, _ in found] == [list(range(s, s + 6)) for s in starts]
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in found)
    assert found[0][0].dtype == found[0][1].dtype == torch.int64
    for index in (len(starts), -len(starts) - 1):
        with pytest.raises(IndexError):
            windows[index]


def test_a_dataset_of_too_few_tokens_is_refused():
    assert len(dataloader.WindowDataset(np.arange(7), 6)) == 1
    with pytest.raises(ValueError, match="more tokens than model.context_length 6, got 6"):
        dataloader.WindowDataset(np.arange(6), 6)


def test_a_dataloader_makes_batches_of_a_dataset():
    windows = dataloader.WindowDataset(np.arange(50), 6, stride=3)
    loader = torch.utils.data.DataLoader(windows, batch_size=4, shuffle=True, drop_last=True)
    batches = list(loader)
    assert len(batches) == len(windows) // 4
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (4, 6) and torch.equal(targets, inputs + 1)
    assert len({start for inputs, _ in batches for start in inputs[:, 0].tolist()}) == 4 * len(batches)
