"""A sharded optimizer: each rank updates a part of the parameters and stores only the state of that part.

AdamW's state is twice the size of the weights; each of `world` ranks stores a `world`-th of it, at the cost
of broadcasting the new weights (ZeRO stage 1, arXiv 1910.02054).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """Wrap the optimizer class `optimizer_cls`: `step` updates this rank's parameters, then broadcasts them.

    Each parameter is assigned to the rank with the fewest elements so far. `kwargs` are passed to
    `optimizer_cls`. Settings in `param_groups` (as of a learning-rate schedule) apply; `state` and
    `state_dict` have this rank's part.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        optimizer_cls: type[torch.optim.Optimizer],
        **kwargs: Any,
    ) -> None:
        self._make_local = lambda groups: optimizer_cls(groups, **kwargs)
        self._local: torch.optim.Optimizer | None = None
        self._owners: dict[Tensor, int] = {}
        self._loads = [0] * dist.get_world_size()
        super().__init__(params, kwargs)
        assert self._local is not None, "params has at least one group"
        self.state = self._local.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters and assign each to an owner; this rank optimizes those that it owns."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            owner = self._loads.index(min(self._loads))
            self._owners[parameter] = owner
            self._loads[owner] += parameter.numel()
        own = [parameter for parameter in group["params"] if self._owners[parameter] == dist.get_rank()]
        local_group = {**group, "params": own}
        if self._local is None:
            self._local = self._make_local([local_group])
        else:
            self._local.add_param_group(local_group)
        # the defaults of the class, such as betas
        for name, value in self._local.param_groups[-1].items():
            group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's parameters and broadcast each parameter from its owner."""
        assert self._local is not None, "made by the first group"
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, local_group in zip(self.param_groups, self._local.param_groups, strict=True):
            local_group |= {name: value for name, value in group.items() if name != "params"}
        self._local.step()
        for parameter, owner in self._owners.items():
            dist.broadcast(parameter.data, owner)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's part."""
        assert self._local is not None, "made by the first group"
        super().load_state_dict(state_dict)
        self._local.state = self.state
