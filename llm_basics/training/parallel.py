"""Data parallelism: each process computes the gradients of its rows of the global batch, and averages them.

The model, its pieces and the training step are independent of it. `parallelize` wraps the model for the
training step; a wrapper does the communication: torch's DistributedDataParallel (ddp, arXiv 2006.15704) or
fully_shard (fsdp2, arXiv 2304.11277), or a class of the user (mine).
"""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_basics import swap
from llm_basics.core import config, dataloader, device, evaluate, optim, trainer
from llm_basics.core import model as models
from llm_basics.runs import process
from llm_basics.training import distributed

# the piece of user code for train.parallel mine
OWN = "data_parallel.DistributedDataParallel"


class Objective(nn.Module):
    """A model whose forward pass returns the loss if targets are passed, and the logits if not.

    Wrappers act in the forward pass of their module, so it must include the loss: fast implementations of the
    loss do not call the model's forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = trainer.batch_loss

    def forward(
        self,
        inputs: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"] | None = None,
        z_loss: float = 0,
    ) -> Float[Tensor, "..."]:
        return self.model(inputs) if targets is None else self.loss(self.model, inputs, targets, z_loss)


class Replica:
    """The wrapped model of training steps, and the schedule of gradient averaging."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.n_left = 0
        """Remaining backward passes of this step; gradients are averaged in the last."""
        self.weight: Tensor | float = 1.0
        """The weight of this process's loss: its number of targets divided by the mean of all processes."""

    def synchronize(self, is_last: bool) -> None:
        """Average gradients in the next backward pass if it is the last, else only accumulate them."""
        if hasattr(self.module, "set_requires_gradient_sync"):
            self.module.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        else:
            self.module.require_backward_grad_sync = is_last  # type: ignore[assignment]

    def finish(self) -> None:
        """Wait for gradient averaging; torch's wrappers do so in the backward pass."""


class OwnReplica(Replica):
    """Data parallelism by user code, with the interface of `systems.data_parallel`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.open = contextlib.ExitStack()

    def synchronize(self, is_last: bool) -> None:
        self.open.close()
        if not is_last:
            self.open.enter_context(self.module.no_sync())  # type: ignore[operator]

    def finish(self) -> None:
        self.module.finish_gradient_synchronization()  # type: ignore[operator]


def parallelize(model: nn.Module, options: config.TrainConfig, chosen: torch.device) -> Replica | None:
    """Distribute `model` over the processes of the job; None in a single process.

    The weights of all processes become those of the main process (ddp, mine), or the parameters of `model`
    are replaced by shards (fsdp2).
    """
    strategy = distributed.strategy(options)
    if strategy == "none":
        return None
    objective = Objective(model)
    if strategy == "fsdp2":
        shard(objective, options, chosen)
        replica = Replica(objective)
    elif strategy == "ddp":
        # only user code has parameters without a gradient
        has_user_code = bool(swap.user_pieces())
        ddp = nn.parallel.DistributedDataParallel
        # broadcast_buffers before torch 2.15; buffers are constant
        names = inspect.signature(ddp).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        settings: dict[str, Any] = {
            sync: False,
            "gradient_as_bucket_view": True,
            "find_unused_parameters": has_user_code,
        }
        wrapped = ddp(objective, **settings)
        replica = Replica(wrapped)
    else:
        replica = OwnReplica(swap.current(OWN)(objective))
    use(replica)
    return replica


def shard(objective: nn.Module, options: config.TrainConfig, chosen: torch.device) -> None:
    """Replace the parameters by shards: those of a block are gathered while it runs, others at the start.

    On a GPU the gathered weights are in the dtype of the forward pass; gradients are averaged in float32.
    """
    from torch.distributed import device_mesh, fsdp

    mesh = device_mesh.init_device_mesh(chosen.type, (distributed.size(),))
    settings: dict[str, Any] = {"mesh": mesh}
    if device.is_bfloat16(chosen, options.dtype):
        settings["mp_policy"] = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if options.offload:
        settings["offload_policy"] = fsdp.CPUOffloadPolicy()
    for block in objective.modules():
        if isinstance(block, models.TransformerBlock):
            fsdp.fully_shard(block, **settings)
    fsdp.fully_shard(objective, **settings)


def use(replica: Replica) -> None:
    """Make training steps on `replica` average gradients over all targets of all processes."""
    loss_of, accumulate = trainer.batch_loss, trainer.accumulate_gradients

    def batch_loss(model: nn.Module, inputs: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        if model is not replica.module:
            return loss_of(model, inputs, targets, z_loss)
        replica.n_left -= 1
        replica.synchronize(replica.n_left <= 0)
        return replica.module(inputs, targets, z_loss) * replica.weight

    def accumulate_gradients(
        model: nn.Module, batches: Sequence[dataloader.Batch], options: config.TrainConfig
    ) -> Tensor:
        if model is not replica.module:
            return accumulate(model, batches, options)
        counts = [(targets != dataloader.IGNORE_INDEX).sum() for _, targets in batches]
        n_targets = torch.stack(counts).sum().double()
        replica.weight = (n_targets.clamp(min=1) / distributed.mean(n_targets).clamp(min=1e-9)).float()
        replica.n_left = len(batches)
        loss = accumulate(model, batches, options)
        replica.finish()
        return distributed.mean(loss)

    clip = optim.clip_grad_norm_

    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Tensor:
        return whole(clip(*args, **kwargs))

    swap.set_piece("optim.clip_grad_norm_", clip_grad_norm_)
    swap.set_piece("trainer.batch_loss", batch_loss)
    swap.set_piece("trainer.accumulate_gradients", accumulate_gradients)


def evaluate_rows(
    model: nn.Module, batches: Iterable[dataloader.Batch], token_bytes: Float[Tensor, " vocab"]
) -> dict[str, float]:
    """`evaluate.evaluate`, with the rows of each batch divided among the processes."""
    if distributed.size() == 1:
        return evaluate.evaluate(model, batches, token_bytes)
    n_targets = n_bytes = 0.0

    def local_rows() -> Iterator[dataloader.Batch]:
        nonlocal n_targets, n_bytes
        for batch in batches:
            inputs, targets = distributed.rows(batch)
            counted = targets[targets != dataloader.IGNORE_INDEX]
            n_targets, n_bytes = n_targets + counted.numel(), n_bytes + token_bytes[counted].sum().item()
            yield inputs, targets

    local = evaluate.evaluate(model, local_rows(), token_bytes)
    loss, correct, n_targets, n_bytes = distributed.sums(
        [local["val_loss"] * n_targets, local["accuracy"] * n_targets, n_targets, n_bytes]
    )
    mean = loss / n_targets
    return {
        "val_loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": loss / math.log(2) / n_bytes,
        "accuracy": correct / n_targets,
    }


# --------------------------------------------------------------------------------------------------
# Shards


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is distributed over the processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """The full tensor of a shard, gathered collectively; other values unchanged."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def like(tensor: Any, parameter: Any) -> Any:
    """The local shard of `tensor`, sharded as `parameter`; other values unchanged."""
    if not is_shard(parameter) or not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed import tensor as distributed_tensor

    local = tensor.to(parameter.to_local().device)
    return distributed_tensor.distribute_tensor(
        local, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def reshard_optimizer(optimizer: torch.optim.Optimizer, sharded: torch.optim.Optimizer) -> None:
    """Copy the state of `optimizer` to `sharded`, an equal optimizer of the sharded parameters."""
    for old, new in zip(optimizer.param_groups, sharded.param_groups, strict=True):
        new |= {name: value for name, value in old.items() if name != "params"}
        for before, parameter in zip(old["params"], new["params"], strict=True):
            if before in optimizer.state:
                state = optimizer.state[before]
                sharded.state[parameter] = {name: like(value, parameter) for name, value in state.items()}


class Gathered:
    """The state dict of a sharded model or optimizer with full tensors, as `checkpoint` saves it.

    Gathering is collective; only the main process keeps the tensors, in CPU memory.
    """

    def __init__(self, source: nn.Module | torch.optim.Optimizer) -> None:
        kept: dict[int, Any] = {}

        def gather(value: Any, key: int) -> Any:
            if key not in kept:
                tensor = whole(value)
                is_kept = distributed.is_main() or not isinstance(tensor, Tensor)
                kept[key] = (tensor.cpu() if isinstance(tensor, Tensor) else tensor) if is_kept else None
            return kept[key]

        state = source.state_dict()
        if isinstance(source, nn.Module):
            # tied parameters once
            tensors = dict(source.named_parameters(remove_duplicate=False))
            self.state = {n: gather(value, id(tensors.get(n, value))) for n, value in state.items()}
        else:
            values = {i: {n: gather(v, id(v)) for n, v in each.items()} for i, each in state["state"].items()}
            self.state = {**state, "state": values}

    def state_dict(self) -> dict[str, Any]:
        return self.state


def gathered(source: Any) -> Any:
    """`source` itself, or if it is sharded, its gathered state; collective then."""
    parameters = source.parameters() if isinstance(source, nn.Module) else source.param_groups[0]["params"]
    return Gathered(source) if any(map(is_shard, parameters)) else source


def whole_model(
    model: models.TransformerLM, shape: config.ModelConfig, chosen: torch.device
) -> models.TransformerLM:
    """An unsharded copy of a sharded model in the main process; elsewhere the model itself."""
    gathered = Gathered(model)
    if not distributed.is_main():
        return model
    random = process.random_state(chosen)
    copy = models.TransformerLM(shape).to(chosen)
    process.set_random_state(random, chosen)
    copy.load_state_dict(gathered.state)
    return copy.train(model.training)
