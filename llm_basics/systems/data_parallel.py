"""Data parallelism: every rank has the whole model and a part of the batch, and gradients are averaged.

With equal parts, the mean over ranks of gradients of mean losses is the gradient of the whole batch, so
training equals that of one process. Three methods to average gradients, in increasing order of speed:

- `average_gradients_`: after backward, one all-reduce per parameter: many small messages
- `average_flat_gradients_`: after backward, one all-reduce of all gradients: one long message
- `DistributedDataParallel`: all-reduces overlap with the backward pass (arXiv 2006.15704)
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over all ranks, one all-reduce per parameter.

        gradient = (gradient of rank 0 + ... + gradient of rank world - 1) / world

    Parameters without a gradient are skipped; they must be the same ones on every rank.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def average_flat_gradients_(parameters: Iterable[Tensor]) -> None:
    """`average_gradients_` by one all-reduce of all gradients, concatenated, per dtype.

    Each message has a fixed latency, so one long message is faster than many short ones.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def broadcast_from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0."""
    for tensor in tensors:
        dist.broadcast(tensor.data, src=0)


class DistributedDataParallel(nn.Module):
    """Wrap a module so that its gradients are averaged over all ranks while backward runs.

    Every rank starts with the weights and buffers of rank 0. A hook on each parameter starts an asynchronous
    all-reduce as soon as its gradient is complete; `finish_gradient_synchronization`, between backward and
    the optimizer step, waits for them. Collectives match by their order, so all ranks start all-reduces in
    the same order, the reverse of `parameters()`, which is about that of backward: a gradient that is ready
    early waits for those before it. Training on `world` parts of a batch equals training on the whole batch.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        broadcast_from_rank_0([*module.parameters(), *module.buffers()])
        # parameters() yields a tied weight once, and so its gradient is reduced once
        self._order = [parameter for parameter in module.parameters() if parameter.requires_grad][::-1]
        if not self._order:
            raise ValueError("the module must have a parameter that requires a gradient, got none")
        self._is_ready = [False] * len(self._order)
        self._pending: list[tuple[dist.Work, Tensor]] = []
        self._synchronizes = True
        for i, parameter in enumerate(self._order):
            parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._on_gradient(i))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; in training, with the buffers of rank 0."""
        if self.training and self._synchronizes:
            broadcast_from_rank_0(self.module.buffers())
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally within the context, for all batches of a step except the last."""
        before, self._synchronizes = self._synchronizes, False
        try:
            yield
        finally:
            self._synchronizes = before

    def finish_gradient_synchronization(self) -> None:
        """Wait until every gradient is the mean over all ranks.

        A parameter without a gradient on this rank contributes zeros, since other ranks may have one; if no
        rank has one, its gradient stays None.
        """
        flags = [int(parameter.grad is not None) for parameter in self._order]
        has_gradient = torch.tensor(flags, device=self._order[0].device)
        for parameter in self._order:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._start_all_reduces(len(self._order))
        dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
        for work, gradient in self._pending:
            work.wait()
            gradient /= dist.get_world_size()
        for parameter, is_used in zip(self._order, has_gradient.tolist(), strict=True):
            if not is_used:
                parameter.grad = None
        self._pending = []
        self._is_ready = [False] * len(self._order)

    def _on_gradient(self, i: int) -> None:
        if not self._synchronizes:
            return
        if self._is_ready[i]:
            raise RuntimeError(
                "backward ran twice without finish_gradient_synchronization; to accumulate gradients, "
                "run all but the last backward under no_sync()"
            )
        self._is_ready[i] = True
        n_started = len(self._pending)
        n_ready = next((k for k in range(n_started, len(self._order)) if not self._is_ready[k]), None)
        self._start_all_reduces(len(self._order) if n_ready is None else n_ready)

    def _start_all_reduces(self, end: int) -> None:
        """Start the all-reduces, in order, of all gradients before `end`."""
        for parameter in self._order[len(self._pending) : end]:
            assert parameter.grad is not None, "its hook has run, or it was filled with zeros"
            work = dist.all_reduce(parameter.grad, async_op=True)
            assert work is not None, "this rank is in the group"
            self._pending.append((work, parameter.grad))
