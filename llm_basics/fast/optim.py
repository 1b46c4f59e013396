"""`core.optim` for all parameters at once, since each kernel launch on a GPU costs microseconds.

Nothing here synchronizes with a GPU: a flag on the device decides whether a step is skipped (`skip_if`).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_basics.core import optim as reference
from llm_basics.fast.cpu import matmul, muon, threads

# bound here because `swap` replaces the names in the reference module
clip_of_reference, muon_of_reference = reference.clip_grad_norm_, reference.muon_step_
orthogonalize_of_reference = reference.orthogonalize

# larger matrices exceed a core's cache, and torch is as fast
MAX_ROWS = 512


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, error_if_nonfinite: bool = False
) -> Float[Tensor, ""]:
    """`optim.clip_grad_norm_` by torch's multi-tensor kernels."""
    parameters = list(parameters)
    found = [p.grad for p in parameters if p.grad is not None]
    gradients = as_flat_view([local(gradient) for gradient in found])
    if len({(g.device, g.dtype) for g in gradients}) != 1 or gradients[0].itemsize < 4:
        return clip_of_reference(parameters, max_norm, error_if_nonfinite)
    total_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if hasattr(found[0], "device_mesh"):
        total_norm = total_norm.square()
        torch.distributed.all_reduce(total_norm, group=found[0].device_mesh.get_group())
        total_norm = total_norm.sqrt()
    if error_if_nonfinite and not total_norm.isfinite():
        raise RuntimeError(f"the gradient norm must be finite, got {total_norm.item()}; nothing was clipped")
    scale = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    # comparing a CUDA tensor would synchronize
    if total_norm.is_cuda or scale != 1:
        torch._foreach_mul_(gradients, scale)
    return total_norm


def local(tensor: Any) -> Tensor:
    """The local shard of a DTensor; any other tensor unchanged."""
    # DTensor takes a second to import
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def as_flat_view(tensors: list[Tensor]) -> list[Tensor]:
    """One flat tensor of the same memory if `tensors` are adjacent in one storage, else `tensors`.

    >>> both = torch.arange(6.0)
    >>> as_flat_view([both[:4].view(2, 2), both[4:]])
    [tensor([0., 1., 2., 3., 4., 5.])]
    """
    if not tensors:
        return []
    first, end = tensors[0], tensors[0].data_ptr()
    # an allocator may place unrelated tensors side by side
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        is_next = tensor.data_ptr() == end and tensor.untyped_storage().data_ptr() == storage
        if not is_next or not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return tensors
        end += tensor.nbytes
    return [first.as_strided((sum(map(torch.numel, tensors)),), (1,))]


class _Skip:
    """The flag of the enclosing `skip_if`, if any."""

    flag: Tensor | None = None


@contextlib.contextmanager
def skip_if(flag: Float[Tensor, ""]) -> Iterator[None]:
    """Within the context, an optimizer step leaves weights and moments unchanged if `flag` is 1, not 0.

    `flag` is on the parameters' device. A skipped step still increments the step count.
    """
    _Skip.flag = flag
    try:
        yield
    finally:
        _Skip.flag = None


def supports_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `skip_if` works with `optimizer`."""
    # user code may replace the class under its name
    is_reference = type(optimizer).__module__ == reference.__name__
    return is_reference and reference.adamw_step_ is adamw_step_ and reference.muon_step_ is muon_step_


def adamw_step_(
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`optim.adamw_step_` by torch's fused kernel, which reads and writes each element once."""
    by_step: dict[tuple[int, torch.device], list[int]] = {}
    for i, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        by_step.setdefault((state["step"], parameter.device), []).append(i)
    for (step, device), indices in by_step.items():
        count = torch.full((), float(step), device=device)
        torch._fused_adamw_(
            [local(parameters[i]) for i in indices],
            [local(gradient) for i in indices if (gradient := parameters[i].grad) is not None],
            [local(states[i]["exp_avg"]) for i in indices],
            [local(states[i]["exp_avg_sq"]) for i in indices],
            [],
            [count] * len(indices),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=_Skip.flag,
        )


def muon_step_(
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    lr: float,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype,
) -> None:
    """`optim.muon_step_`; on a CPU by compiled kernels, with the matrices distributed over threads."""
    (rows, cols), n_threads = parameters[0].shape, torch.get_num_threads()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter, state in zip(parameters, states, strict=True):
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
    buffers = [state["momentum_buffer"] for state in states]
    if _Skip.flag is not None:
        before = torch.stack(list(parameters)), torch.stack(buffers)
        settings = lr, momentum, weight_decay, dtype
        after = reference.muon_update(before[0], torch.stack(gradients), before[1], *settings)
        for tensors, old, new in zip((list(parameters), buffers), before, after, strict=True):
            torch._foreach_copy_(tensors, torch.where(_Skip.flag > 0, old, new).unbind())
        return
    if (
        dtype != torch.float32
        or min(rows, cols) > MAX_ROWS
        or rows % matmul.VECTOR
        or cols % matmul.VECTOR
        or len(parameters) < n_threads
        or not all(map(_has_cpu_data, (*parameters, *gradients, *buffers)))
    ):
        muon_of_reference(parameters, states, lr, momentum, weight_decay, dtype)
        return
    matrices = zip(parameters, gradients, buffers, strict=True)
    addresses = np.array([[tensor.data_ptr() for tensor in tensors] for tensors in matrices], np.int64)

    def work(number: int) -> None:
        chunk = addresses[number * len(addresses) // n_threads : (number + 1) * len(addresses) // n_threads]
        workspace = torch.empty(muon.workspace_size(rows, cols))
        settings = lr, momentum, weight_decay, reference.NEWTON_SCHULZ
        muon.update(chunk, rows, cols, *settings, workspace.data_ptr())

    threads.parallel_map(work, n_threads)


def orthogonalize(
    matrices: Float[Tensor, "... rows cols"], steps: int = 5, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... rows cols"]:
    """`optim.orthogonalize`; on a GPU by fused matrix multiply-adds."""
    if not matrices.is_cuda:
        return orthogonalize_of_reference(matrices, steps, dtype)
    return orthogonalize_fused(matrices, steps, dtype)


def orthogonalize_fused(
    matrices: Float[Tensor, "... rows cols"], steps: int, dtype: torch.dtype
) -> Float[Tensor, "... rows cols"]:
    """Newton-Schulz with three kernel launches per step (`baddbmm` adds the polynomial's terms)."""
    a, b, c = reference.NEWTON_SCHULZ
    rows, cols = matrices.shape[-2:]
    x = matrices.reshape(-1, rows, cols)
    x = x.mT if rows > cols else x
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > cols else x).to(matrices.dtype).view(matrices.shape)


def _has_cpu_data(tensor: Tensor) -> bool:
    """Whether kernels can read the tensor; a fake tensor, as in memory estimates, has no data."""
    is_float = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    return is_float and tensor.is_contiguous() and type(tensor) in (Tensor, nn.Parameter)
