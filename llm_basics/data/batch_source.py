"""Interface of the sources of training batches: text or conversations."""

from typing import Protocol

import numpy as np

from llm_basics.core import dataloader


class BatchSource(Protocol):
    """Training batches in an order that is a pure function of (seed, epoch, step)."""

    shards: list[np.ndarray]

    def starting_at(self, first: int) -> dataloader.Batch:
        """The batch that starts with row `first`, counted over all epochs."""
