"""What turns gradients into better weights: AdamW, gradient clipping and the learning-rate schedule.

The rule itself is a pure function (`adamw_update`), the schedule a pure function of the step. The class
around them keeps one state for each parameter and takes the settings of its group.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# The learning rate


def cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate at `step`: a line from 0 to `max_lr`, half a cosine down to `min_lr`, then flat.

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


# --------------------------------------------------------------------------------------------------
# The gradient


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, error_if_nonfinite: bool = False
) -> Float[Tensor, ""]:
    """Shorten all gradients by one factor so that together they are at most `max_norm` long, in place.

    Returns the norm before clipping: the L2 norm of all gradients laid end to end (arXiv 1211.5063).
    Parameters without a gradient are passed over. Where the norm is not finite and `error_if_nonfinite`
    is set, raises RuntimeError and changes nothing.

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
# The update


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
    start at 0 and are divided by `1 - beta^step`, which makes them means of the gradients seen so far.

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


class AdamW(torch.optim.Optimizer):
    """Apply `adamw_update` to every parameter that has a gradient, with the settings of its group.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
    >>> (3 * weight).backward()
    >>> optimizer.step()
    >>> weight.data  # a first step has length lr, however long the gradient
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        updated, state["exp_avg"], state["exp_avg_sq"] = adamw_update(
            parameter,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
        )
        parameter.copy_(updated)
