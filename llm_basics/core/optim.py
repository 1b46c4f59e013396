"""Optimizers: AdamW, Muon, gradient clipping and learning-rate schedules.

Update rules are pure functions (`adamw_update`, `muon_update`), schedules pure functions of the step. The
optimizer classes keep one state per parameter and use the settings of its group.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate at `step`: linear warm-up to `max_lr`, cosine decay to `min_lr`, then constant.

    The cosine runs over the steps after the warm-up (SGDR, arXiv 1608.03983).

    >>> [cosine_schedule(step, 1.0, 0.5, warmup_steps=2, total_steps=4) for step in (0, 1, 2, 3, 4, 9)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """
    step = max(step, 0)
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if step >= total_steps:
        return min_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd_schedule(
    step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int, decay_steps: int
) -> float:
    """The learning rate at `step`: linear warm-up to `max_lr`, constant, then linear decay to `min_lr`.

    Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the rates before the decay do not depend on the
    length of training.

    >>> [wsd_schedule(step, 1.0, 0.5, 2, total_steps=8, decay_steps=2) for step in (0, 1, 2, 6, 7, 8, 99)]
    [0.0, 0.5, 1.0, 1.0, 0.75, 0.5, 0.5]
    """
    step = max(step, 0)
    decay_steps = min(decay_steps, total_steps - warmup_steps)
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if step >= total_steps:
        return min_lr
    left = (total_steps - step) / max(decay_steps, 1)
    return min_lr + (max_lr - min_lr) * min(left, 1.0)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, error_if_nonfinite: bool = False
) -> Float[Tensor, ""]:
    """Scale all gradients in place by one factor so that their total norm is at most `max_norm`.

    Returns the norm before clipping: the L2 norm of all gradients concatenated (arXiv 1211.5063).
    Parameters without a gradient are skipped. If the norm is not finite and `error_if_nonfinite` is set,
    raises RuntimeError and changes nothing.

    >>> weight = torch.zeros(2, requires_grad=True)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0)
    tensor(5.)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    norms = [torch.linalg.vector_norm(g.float() if g.itemsize < 4 else g) for g in gradients]
    total_norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    if error_if_nonfinite and not total_norm.isfinite():
        raise RuntimeError(f"the gradient norm must be finite, got {total_norm.item()}; nothing was clipped")
    scale = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return total_norm


# --------------------------------------------------------------------------------------------------
# AdamW


def adamw_update(
    parameter: Float[Tensor, "..."],
    gradient: Float[Tensor, "..."],
    exp_avg: Float[Tensor, "..."],
    exp_avg_sq: Float[Tensor, "..."],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."], Float[Tensor, "..."]]:
    """One AdamW step: the new parameter and the new running means of gradient and squared gradient.

    Adam (arXiv 1412.6980) with decoupled weight decay (arXiv 1711.05101). `step` counts from 1. Both means
    start at 0; dividing them by `1 - beta^step` corrects this bias.

        exp_avg    = beta1 * exp_avg    + (1 - beta1) * gradient
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient^2
        parameter  = (1 - lr * weight_decay) * parameter
                     - lr * (exp_avg / (1 - beta1^step)) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> adamw_update(one, 5 * one, zero, zero, 1, lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=1.0)[0]
    tensor([0.8000])
    """
    beta1, beta2 = betas
    exp_avg = exp_avg.lerp(gradient, 1 - beta1)
    exp_avg_sq = exp_avg_sq.lerp(gradient.square(), 1 - beta2)
    mean = exp_avg / (1 - beta1**step)
    root_mean_square = (exp_avg_sq / (1 - beta2**step)).sqrt()
    parameter = parameter * (1 - lr * weight_decay) - lr * mean / (root_mean_square + eps)
    return parameter, exp_avg, exp_avg_sq


def adamw_step_(
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Apply `adamw_update` in place to `parameters`, all with a gradient, and to their states."""
    for parameter, state in zip(parameters, states, strict=True):
        assert parameter.grad is not None, "only parameters with a gradient are stepped"
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        updated, state["exp_avg"], state["exp_avg_sq"] = adamw_update(
            parameter,
            parameter.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            lr,
            betas,
            eps,
            weight_decay,
        )
        parameter.copy_(updated)


class AdamW(torch.optim.Optimizer):
    """Apply `adamw_update` to every parameter that has a gradient, with the settings of its group.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
    >>> (3 * weight).backward()
    >>> optimizer.step()
    >>> weight.data  # the first step has length lr, for any gradient
    tensor([0.9000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters once. A `closure`, if given, computes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._step_group(with_gradient, group)
        return loss

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        adamw_step_(parameters, states, group["lr"], group["betas"], group["eps"], group["weight_decay"])


# --------------------------------------------------------------------------------------------------
# Muon

# coefficients of a x + b x^3 + c x^5, with the steepest slope at 0 for which iteration still maps every x in
# (0, 1] close to 1 (Jordan et al. 2024, kellerjordan.github.io/posts/muon)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrices: Float[Tensor, "... rows cols"], steps: int = 5, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... rows cols"]:
    """The nearest matrices with orthonormal rows (or columns, if there are fewer), approximately.

    For the singular value decomposition `U S V^T` this is `U V^T`, with equal singular values. A
    Newton-Schulz step, `X <- a X + b (X X^T) X + c (X X^T)^2 X`, keeps U and V and applies a polynomial to S.
    Five steps map singular values above 1/500 of the norm to between 0.68 and 1.21, which is accurate enough
    for an update direction; so is bfloat16 as `dtype`.

    >>> orthogonalize(torch.diag(torch.tensor([5.0, 0.5]))).diag().round(decimals=1)
    tensor([0.7000, 0.7000])
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    # no singular value exceeds the norm
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def muon_update(
    parameter: Float[Tensor, "... rows cols"],
    gradient: Float[Tensor, "... rows cols"],
    momentum_buffer: Float[Tensor, "... rows cols"],
    lr: float,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "... rows cols"], Float[Tensor, "... rows cols"]]:
    """One Muon step for matrices of one shape: the new parameters and the new running means of the gradient.

    The step is the orthogonalized Nesterov momentum: rare directions have the same weight as frequent ones
    (Jordan et al. 2024). Scaled by `0.2 sqrt(max(rows, cols))`, its elements have about the magnitude of
    AdamW's, so that both use the same learning rate (arXiv 2502.16982).

        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * gradient
        direction = orthogonalize(momentum * momentum_buffer + (1 - momentum) * gradient)
        parameter = (1 - lr * weight_decay) * parameter - lr * 0.2 * sqrt(max(rows, cols)) * direction
    """
    momentum_buffer = momentum_buffer.lerp(gradient, 1 - momentum)
    direction = orthogonalize(momentum_buffer.lerp(gradient, 1 - momentum), dtype=dtype)
    length = 0.2 * math.sqrt(max(parameter.shape[-2:]))
    return parameter * (1 - lr * weight_decay) - lr * length * direction, momentum_buffer


def muon_step_(
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    lr: float,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype,
) -> None:
    """Apply `muon_update` in place to matrices of one shape, all with a gradient, and to their states."""
    for parameter, state in zip(parameters, states, strict=True):
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
    updated, buffers = muon_update(
        torch.stack(list(parameters)),
        torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None]),
        torch.stack([state["momentum_buffer"] for state in states]),
        lr,
        momentum,
        weight_decay,
        dtype,
    )
    for parameter, state, new, buffer in zip(parameters, states, updated, buffers, strict=True):
        parameter.copy_(new)
        state["momentum_buffer"].copy_(buffer)


class Muon(AdamW):
    """Apply `muon_update` to the groups that have a `momentum`, `adamw_update` to the others.

    Muon is for matrices between hidden states. Matrices of one shape are updated together. Directions are
    computed in `dtype`.

    >>> matrix, gain = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.ones(2))
    >>> groups = [{"params": [matrix], "momentum": 0.95}, {"params": [gain]}]
    >>> optimizer = Muon(groups, lr=0.1, weight_decay=0.0)
    >>> (3 * matrix.sum() + gain.sum()).backward()
    >>> optimizer.step()
    >>> gain.data
    tensor([0.9000, 0.9000])
    """

    def __init__(self, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dtype = dtype

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; one with `momentum` must hold only matrices."""
        super().add_param_group(param_group)
        for parameter in param_group["params"] if "momentum" in param_group else ():
            if parameter.dim() != 2:
                raise ValueError(
                    f"a group with momentum must hold only matrices, got a parameter of shape "
                    f"{tuple(parameter.shape)}; put it into a group without momentum"
                )

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if "momentum" not in group:
            super()._step_group(parameters, group)
            return
        of_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            of_shape.setdefault(parameter.shape, []).append(parameter)
        for alike in of_shape.values():
            states = [self.state[parameter] for parameter in alike]
            muon_step_(alike, states, group["lr"], group["momentum"], group["weight_decay"], self.dtype)
