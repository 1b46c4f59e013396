"""Dataloader: batches of windows of token files, in a resumable order.

The order of the data is a pure function of (seed, epoch, step): nothing is buffered, and a run resumed from a
step gets the same batches as an uninterrupted one.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

# inputs and targets; the batches of a step may differ in size
Batch = tuple[Int[Tensor, "_ _"], Int[Tensor, "_ _"]]

# targets that the loss ignores, the default of cross-entropy as in torch
IGNORE_INDEX = -100


def get_batch(
    tokens: np.ndarray,
    batch_size: int,
    context_length: int,
    device: torch.device | str = "cpu",
    rng: np.random.Generator | None = None,
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Inputs and targets: random windows of `tokens`, and the same windows shifted by one token.

    All starts of complete windows with a last target are equally likely. Reads only the windows.

    >>> inputs, targets = get_batch(np.arange(5), batch_size=1, context_length=4)
    >>> inputs, targets
    (tensor([[0, 1, 2, 3]]), tensor([[1, 2, 3, 4]]))
    """
    check_length(len(tokens), context_length)
    rng = rng or np.random.default_rng()
    starts = rng.integers(0, len(tokens) - context_length, size=batch_size)
    return _to_batch([tokens[start : start + context_length + 1] for start in starts], device)


def _to_batch(
    windows: Sequence[np.ndarray], device: torch.device | str
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    batch = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)
    return batch[:, :-1], batch[:, 1:]


def check_length(n_tokens: int, context_length: int, what: str = "the text") -> None:
    """Raise ValueError unless `n_tokens` suffices for a window of `context_length` and its last target."""
    if n_tokens < context_length + 1:
        raise ValueError(
            f"{what} must have more tokens than model.context_length {context_length}, got {n_tokens}; "
            "use more text, a smaller --model.context_length or another --val_fraction"
        )


def check_stride(stride: int | None, context_length: int) -> int:
    """The distance of the starts of two windows; None is `context_length`, the maximum.

    >>> check_stride(None, context_length=64), check_stride(16, context_length=64)
    (64, 16)
    """
    if stride is not None and not 1 <= stride <= context_length:
        raise ValueError(f"stride must be from 1 to context_length {context_length}, got {stride}")
    return context_length if stride is None else stride


class WindowDataset(torch.utils.data.Dataset[tuple[Int[Tensor, " seq"], Int[Tensor, " seq"]]]):
    """The windows of `tokens` in order, for `torch.utils.data.DataLoader` or any other loop.

    Window i starts at token `i * stride`, by default `context_length`. Tokens at the end that do not fill a
    window are dropped.

    >>> windows = WindowDataset(np.arange(7), context_length=4, stride=2)
    >>> len(windows), windows[1]
    (2, (tensor([2, 3, 4, 5]), tensor([3, 4, 5, 6])))
    """

    def __init__(self, tokens: np.ndarray, context_length: int, stride: int | None = None) -> None:
        check_length(len(tokens), context_length)
        self.tokens = tokens
        self.context_length = context_length
        self.starts = range(0, len(tokens) - context_length, check_stride(stride, context_length))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Int[Tensor, " seq"], Int[Tensor, " seq"]]:
        start = self.starts[index]
        window = torch.from_numpy(self.tokens[start : start + self.context_length + 1].astype(np.int64))
        return window[:-1], window[1:]


class Batches:
    """Shuffled windows of all data, epoch after epoch: `batches[i]` is batch number i.

    An epoch cuts every shard into windows whose starts are `stride` tokens apart, from a random offset, and
    shuffles them. With the default, `context_length`, an epoch has each token about once; with a smaller
    stride windows overlap. Windows do not cross shards.

    >>> batches = Batches([np.arange(9)], batch_size=2, context_length=2, seed=0)
    >>> batches.windows_per_epoch
    3
    >>> inputs, targets = batches[7]
    >>> torch.equal(targets, inputs + 1)
    True
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        batch_size: int,
        context_length: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        stride: int | None = None,
    ) -> None:
        self.shards = [tokens for tokens in shards if len(tokens) > context_length]
        check_length(max(map(len, shards), default=0), context_length)
        self.batch_size = batch_size
        self.context_length = context_length
        self.stride = check_stride(stride, context_length)
        self.seed = seed
        self.device = device
        # one window fewer than fit, for the random offset
        fit = [len(range(0, len(tokens) - context_length, self.stride)) for tokens in self.shards]
        self._first = np.cumsum([0] + [max(1, windows - 1) for windows in fit])
        self.windows_per_epoch = int(self._first[-1])
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def __getitem__(self, number: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        return self.starting_at(number * self.batch_size)

    def starting_at(self, first: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """The batch that starts with window `first`, counted over all epochs."""
        positions = [self.place(number) for number in range(first, first + self.batch_size)]
        windows = [self.shards[shard][start : start + self.context_length + 1] for shard, start in positions]
        return _to_batch(windows, self.device)

    def place(self, number: int) -> tuple[int, int]:
        """The shard and the start of window `number`, counted over all epochs."""
        epoch, index = divmod(number, self.windows_per_epoch)
        offsets, order = self._order(epoch)
        shard = int(np.searchsorted(self._first, order[index], side="right")) - 1
        start = offsets[shard] + (order[index] - self._first[shard]) * self.stride
        return shard, int(start)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The offset of each shard, and the order of all windows, in `epoch`."""
        rng = np.random.default_rng((self.seed, epoch))
        n_offsets = [
            len(tokens) - self.context_length - (windows - 1) * self.stride
            for tokens, windows in zip(self.shards, np.diff(self._first), strict=True)
        ]
        return rng.integers(0, n_offsets), rng.permutation(self.windows_per_epoch)


def sequential_batches(
    tokens: np.ndarray,
    batch_size: int,
    context_length: int,
    max_batches: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]]:
    """Adjacent windows in order; with `max_batches`, as many evenly spaced ones."""
    n_windows = (len(tokens) - 1) // context_length
    n_chosen = n_windows if max_batches is None else min(n_windows, max_batches * batch_size)
    starts = np.linspace(0, n_windows - 1, n_chosen).round().astype(int) * context_length
    for i in range(0, n_chosen, batch_size):
        chosen = starts[i : i + batch_size]
        yield _to_batch([tokens[start : start + context_length + 1] for start in chosen], device)
