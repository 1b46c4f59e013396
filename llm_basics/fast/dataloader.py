"""`core.dataloader` for a GPU.

A dataset that fits a small part of GPU memory stays there, and a batch is one gather. For a larger one, a
thread prepares the next batch in pinned memory while the GPU computes.
"""

from collections.abc import Sequence
from concurrent import futures

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llm_basics.core import dataloader as reference

# bound here because `swap` replaces the name in the reference module
ReferenceBatches = reference.Batches

# maximum fraction of free GPU memory for resident tokens; the rest is for activations
RESIDENT_FRACTION = 1 / 16


class Batches(ReferenceBatches):
    """`dataloader.Batches` with tokens resident on the GPU, or prefetched; the same batches."""

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        batch_size: int,
        context_length: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        stride: int | None = None,
    ) -> None:
        super().__init__(shards, batch_size, context_length, seed, device, stride)
        self.on_gpu = torch.device(device).type == "cuda"
        self.resident: Tensor | None = None
        n_bytes = sum(tokens.nbytes for tokens in self.shards)
        if self.on_gpu and n_bytes <= RESIDENT_FRACTION * torch.cuda.mem_get_info(device)[0]:
            self._keep_resident()
        self._worker = futures.ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, futures.Future[Tensor]] | None = None

    def _keep_resident(self) -> None:
        """Copy all tokens to the device."""
        tokens = np.concatenate(self.shards)
        # torch cannot index uint16 on every device: int16 holds the same bits
        signed = tokens.view({1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[tokens.itemsize])
        self.resident = torch.from_numpy(signed).to(self.device)
        self.shard_starts = np.cumsum([0, *(len(tokens) for tokens in self.shards)])
        self.offsets = torch.arange(self.context_length + 1, device=self.device)

    def starting_at(self, first: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """The batch whose first window is number `first` since the start of training."""
        if self.resident is not None:
            batch = self._gather(first)
        elif self.on_gpu:
            batch = self._prefetched(first).to(self.device, non_blocking=True)
        else:
            return super().starting_at(first)
        return batch[:, :-1], batch[:, 1:]

    def _gather(self, first: int) -> Int[Tensor, "batch window"]:
        assert self.resident is not None, "tokens must be resident on the GPU"
        positions = [self.place(number) for number in range(first, first + self.batch_size)]
        starts = torch.tensor([self.shard_starts[shard] + start for shard, start in positions])
        indices = starts.to(self.device, non_blocking=True)[:, None] + self.offsets
        batch = self.resident[indices].long()
        return batch & 0xFFFF if self.resident.dtype == torch.int16 else batch

    def _prefetched(self, first: int) -> Int[Tensor, "batch window"]:
        """The prefetched batch if it starts at `first`, else a new one; starts prefetching the next."""
        pending = self._next
        batch = pending[1].result() if pending is not None and pending[0] == first else self._make(first)
        following = first + self.batch_size
        self._next = following, self._worker.submit(self._make, following)
        return batch

    def _make(self, first: int) -> Int[Tensor, "batch window"]:
        positions = [self.place(number) for number in range(first, first + self.batch_size)]
        windows = [self.shards[shard][start : start + self.context_length + 1] for shard, start in positions]
        batch = torch.from_numpy(np.stack(windows).astype(np.int64))
        return batch.pin_memory() if torch.cuda.is_available() else batch
