"""The pieces of `data` for a GPU.

Tokens that fit into a small part of the GPU's memory are kept there, and a batch is one gather. Else a thread
prepares the next batch in pinned memory while the GPU computes.
"""

from collections.abc import Sequence
from concurrent import futures

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from llm_basics.core import dataloader as reference

# the reference, whose name comes to stand for what is defined here
BatchesOfReference = reference.Batches

# of the GPU's free memory, what tokens may take: a 16th leaves the rest to activations
SHARE_OF_MEMORY = 1 / 16


class Batches(BatchesOfReference):
    """`data.Batches` with the tokens on the GPU, or with batches that are made ahead; the same batches."""

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
        if self.on_gpu and n_bytes <= SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]:
            self._keep_resident()
        self._maker = futures.ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, futures.Future[Tensor]] | None = None

    def _keep_resident(self) -> None:
        """Put all tokens where the batches are wanted."""
        tokens = np.concatenate(self.shards)
        # torch cannot index unsigned numbers of two bytes everywhere: their bits stand in signed ones
        signed = tokens.view({1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[tokens.itemsize])
        self.resident = torch.from_numpy(signed).to(self.device)
        self.begins = np.cumsum([0, *(len(tokens) for tokens in self.shards)])
        self.within = torch.arange(self.context_length + 1, device=self.device)

    def starting_at(self, first: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """The batch whose first window is number `first` since the beginning of training."""
        if self.resident is not None:
            batch = self._gathered(first)
        elif self.on_gpu:
            batch = self._made_ahead(first).to(self.device, non_blocking=True)
        else:
            return super().starting_at(first)
        return batch[:, :-1], batch[:, 1:]

    def _gathered(self, first: int) -> Int[Tensor, "batch window"]:
        assert self.resident is not None, "tokens are gathered from where they are resident"
        places = [self.place(number) for number in range(first, first + self.batch_size)]
        starts = torch.tensor([self.begins[shard] + start for shard, start in places])
        where = starts.to(self.device, non_blocking=True)[:, None] + self.within
        batch = self.resident[where].long()
        return batch & 0xFFFF if self.resident.dtype == torch.int16 else batch

    def _made_ahead(self, first: int) -> Int[Tensor, "batch window"]:
        """The batch that was made meanwhile, if it is that one; and begin with the next."""
        made = self._ahead
        batch = made[1].result() if made is not None and made[0] == first else self._make(first)
        following = first + self.batch_size
        self._ahead = following, self._maker.submit(self._make, following)
        return batch

    def _make(self, first: int) -> Int[Tensor, "batch window"]:
        places = [self.place(number) for number in range(first, first + self.batch_size)]
        windows = [self.shards[shard][start : start + self.context_length + 1] for shard, start in places]
        batch = torch.from_numpy(np.stack(windows).astype(np.int64))
        return batch.pin_memory() if torch.cuda.is_available() else batch
