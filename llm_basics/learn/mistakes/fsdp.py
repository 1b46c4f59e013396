"""Fully sharded data parallelism: gather, forward, free, gather, reduce-scatter, on two ranks."""

import copy
import time
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import reductions

from llm_basics import swap
from llm_basics.learn import probes, ranks
from llm_basics.learn.mistakes import ring_all_reduce
from llm_basics.systems import fsdp

step = probes.Step("fsdp")
WORLD, BATCH, STEPS = 2, 8, 3
HALF = torch.float16
RIGHT = swap.reference("fsdp.FullyShardedDataParallel")


class Net(nn.Module):
    """Layers whose sizes are multiples of the number of ranks."""

    def __init__(self, seed=0):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2, bias=False)
        draw = probes.numbers(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * draw(*parameter.shape))

    def forward(self, tokens):
        return self.second(torch.tanh(self.first(self.embedding(tokens))))


class Uneven(nn.Module):
    """Odd sizes, a single number, a tied, a frozen and an unused weight, a buffer."""

    def __init__(self, seed=0):
        super().__init__()
        draw = probes.numbers(seed)
        self.scale = nn.Parameter(draw(1))
        self.first = nn.Linear(3, 5)
        self.frozen = nn.Parameter(draw(5), requires_grad=False)
        self.unused = nn.Parameter(draw(3))
        self.second = nn.Linear(5, 3, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * draw(*parameter.shape))
        self.third = nn.Linear(3, 5, bias=False)
        self.third.weight = self.first.weight
        self.register_buffer("shift", draw(3))

    def forward(self, x):
        hidden = self.second(torch.tanh(self.first(x + self.shift)) * self.frozen)
        return self.third(torch.tanh(hidden) * self.scale)


class Watched(nn.Module):
    """A layer that notes the memory and the dtype of its weight in forward."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(0.5 * probes.numbers(seed)(4, 4))
        self.memory, self.dtypes = [], []

    def forward(self, x):
        weight = self.weight
        self.memory.append(reductions.StorageWeakRef(weight.untyped_storage()))
        self.dtypes.append(str(weight.dtype).removeprefix("torch."))
        return torch.tanh(x @ weight)

    def is_freed(self):
        """Whether the gathered weight was given back, or its memory."""
        storage = self.memory[-1]
        if storage.expired():
            return True
        return torch.UntypedStorage._new_with_weak_ptr(storage.cdata).nbytes() == 0


def share(tensor, rank):
    return tensor.tensor_split(WORLD)[rank]


def tokens_and_targets(n=STEPS):
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randint(6, (BATCH,), generator=generator),
            torch.randn(BATCH, 2, generator=generator),
        )
        for _ in range(n)
    ]


def loss_of(output, target):
    return (output.float() - target).square().mean()


def sgd(parameters):
    """Unlike AdamW, it shows a factor on the gradient."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.3, momentum=0.9, weight_decay=0.1)


def cloned(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


# --------------------------------------------------------------------------------------------------
# Probes


def train(a, module, batches, dtype=None):
    """Gathered weights at the start and after each step."""
    wrapped = a.get_fsdp(module, dtype) if dtype else a.get_fsdp(module)
    optimizer = sgd(wrapped.parameters())
    seen = {"weights at the start": cloned(a.fsdp_gather_full_params(wrapped))}
    for i, (inputs, targets) in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss_of(wrapped(inputs), targets).backward()
        a.fsdp_on_after_backward(wrapped, optimizer)
        optimizer.step()
        seen[f"weights after step {i}"] = cloned(a.fsdp_gather_full_params(wrapped))
    return seen


def train_alone(module, batches):
    optimizer = sgd(module.parameters())
    seen = {"weights at the start": cloned(dict(module.named_parameters()))}
    for i, (inputs, targets) in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss_of(module(inputs), targets).backward()
        optimizer.step()
        seen[f"weights after step {i}"] = cloned(dict(module.named_parameters()))
    return seen


def train_in_half(module, batches):
    """Float32 weights, of which each step computes with copies in float16."""
    optimizer = sgd(module.parameters())
    seen = {"weights at the start": cloned(dict(module.named_parameters()))}
    for i, (inputs, targets) in enumerate(batches, start=1):
        half = copy.deepcopy(module).to(HALF)
        half.zero_grad()
        loss_of(half(inputs), targets).backward()
        for parameter, computed in zip(module.parameters(), half.parameters(), strict=True):
            parameter.grad = computed.grad.float()
        optimizer.step()
        seen[f"weights after step {i}"] = cloned(dict(module.named_parameters()))
    return seen


def three_steps(a):
    rank = dist.get_rank()
    halves = [(share(x, rank), share(y, rank)) for x, y in tokens_and_targets()]
    return train(a, Net(), halves)


def equal_steps(a):
    """Every rank has the same batch, so that the mean over ranks is exact."""
    seen = train(a, Net(), tokens_and_targets())
    right = train_alone(Net(), tokens_and_targets())
    return {
        name: all(torch.equal(weight, right[name][k]) for k, weight in weights.items())
        for name, weights in seen.items()
    }


def half_steps(a):
    seen = train(a, Net(), tokens_and_targets(), HALF)
    dtypes = {str(weight.dtype) for weights in seen.values() for weight in weights.values()}
    return seen | {"dtypes of the gathered weights": sorted(dtypes)}


def expected_half_steps(rank):
    seen = train_in_half(Net(), tokens_and_targets())
    return seen | {"dtypes of the gathered weights": ["torch.float32"]}


def uneven_batches():
    draw = probes.numbers(seed=6)
    return [(draw(BATCH, 3), draw(BATCH, 5)) for _ in range(STEPS)]


def uneven_steps(a):
    rank = dist.get_rank()
    halves = [(share(x, rank), share(y, rank)) for x, y in uneven_batches()]
    return train(a, Uneven(seed=rank), halves)


def memory(a):
    layers = [Watched(seed) for seed in (1, 2, 3)]
    module = nn.Sequential(*layers)
    n = sum(p.numel() for p in module.parameters())
    wrapped = a.get_fsdp(module)
    optimizer = sgd(wrapped.parameters())
    output = wrapped(probes.numbers(seed=7)(2, 4))
    for _ in range(100):  # a thread of gloo may hold the last tensor that it received for a moment
        freed = [layer.is_freed() for layer in layers]
        if all(freed):
            break
        time.sleep(0.005)
    with ring_all_reduce.traffic() as seen:
        output.square().mean().backward()
        a.fsdp_on_after_backward(wrapped, optimizer)
    optimizer.step()
    state = sum(v.numel() for each in optimizer.state.values() for v in each.values() if v.dim())
    return {
        "share of the weights on a rank": sum(p.numel() for p in wrapped.parameters()) / n,
        "share of the state on a rank": state / n,
        "weights freed after forward": freed,
        "gathered again in backward": any(name == "all_gather" for name, _, _ in seen),
    }


def expected_memory(rank):
    return {
        "share of the weights on a rank": 0.5,
        "share of the state on a rank": 0.5,
        "weights freed after forward": [True, True, True],
        "gathered again in backward": True,
    }


def precision(a):
    """Gradients whose sum exceeds the range of float16, and floating-point inputs."""
    layer = Watched(seed=1)
    wrapped = a.get_fsdp(nn.Sequential(layer), HALF)
    output = wrapped(torch.ones(1, 4))
    (output.float().sum() * 50000).backward()
    a.fsdp_on_after_backward(wrapped, sgd(wrapped.parameters()))
    gradients = [p.grad for p in wrapped.parameters()]
    return {
        "the weight in forward is": layer.dtypes,
        "gradients": [str(g.dtype) for g in gradients],
        "finite": all(bool(g.isfinite().all()) for g in gradients),
        "shards": [str(p.dtype) for p in wrapped.parameters()],
    }


def expected_precision(rank):
    return {
        "the weight in forward is": ["float16"],
        "gradients": ["torch.float32"],
        "finite": True,
        "shards": ["torch.float32"],
    }


NEEDS = "get_fsdp fsdp_on_after_backward fsdp_gather_full_params"
ranks.probe(
    step,
    "three steps on halves of each batch",
    three_steps,
    lambda rank: train_alone(Net(), tokens_and_targets()),
    NEEDS,
    contract="fsdp",
)
ranks.probe(
    step,
    "three steps of every rank on the same batch, exactly",
    equal_steps,
    lambda rank: dict.fromkeys(
        ["weights at the start", *(f"weights after step {i}" for i in (1, 2, 3))], True
    ),
    NEEDS,
    contract="fsdp",
)
ranks.probe(
    step,
    "three steps that compute in float16",
    half_steps,
    expected_half_steps,
    NEEDS,
    rtol=0.0,
    atol=1e-4,
    contract="fsdp_half",
)
ranks.probe(
    step,
    "odd sizes, tied and frozen weights, ranks with different initial weights",
    uneven_steps,
    lambda rank: train_alone(Uneven(seed=0), uneven_batches()),
    NEEDS,
    beyond="the public tests have even sizes and equal initial weights; a model has any sizes",
)
ranks.probe(
    step,
    "memory of weights and state, and when weights are gathered and freed",
    memory,
    expected_memory,
    "get_fsdp fsdp_on_after_backward",
    beyond="the public tests see weights only; less memory is what FSDP is for",
)
ranks.probe(
    step,
    "large gradients in float16 are reduced in float32",
    precision,
    expected_precision,
    "get_fsdp fsdp_on_after_backward",
    beyond="the public tests have small gradients; a sum of large ones overflows in float16",
)


# --------------------------------------------------------------------------------------------------
# Mistakes


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, owner, shape):
        ctx.owner, ctx.dtype = owner, part.dtype
        return owner.join(part.to(owner.compute_dtype or part.dtype), shape)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.owner.reduce(gradient, ctx.dtype), None, None


class FSDP(RIGHT):
    """A right one, in parts: what the mistakes change."""

    def __init__(self, module, compute_dtype=None):
        nn.Module.__init__(self)
        self.module, self.compute_dtype = module, compute_dtype
        self.share_initial_state()
        self._shapes, self._parts, shards = {}, {}, {}
        self._gathered = weakref.WeakValueDictionary()
        for owner in list(module.modules()):
            own = {name: weight for name, weight in owner._parameters.items() if weight is not None}
            for name, weight in own.items():
                key = self.key(owner, name, weight)
                if key not in shards:
                    part = nn.Parameter(self.split(weight.detach()), self.is_trained(weight))
                    shards[key], self._shapes[part] = part, weight.shape
                owner._parameters[name] = shards[key]
            if own:
                owner.__class__ = type("Sharded", (type(owner),), {name: self._weight(name) for name in own})

    def share_initial_state(self):
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            dist.broadcast(tensor.data, src=0)

    def key(self, owner, name, weight):
        return weight

    def is_trained(self, weight):
        return weight.requires_grad

    def split(self, weight):
        return fsdp.shard(weight.float())

    def join(self, part, shape):
        return fsdp.unshard(part, shape)

    def join_in_backward(self, part, shape):
        return self.join(part, shape)

    def reduce(self, gradient, dtype):
        padded = torch.zeros(-(-gradient.numel() // WORLD) * WORLD, dtype=dtype)
        padded[: gradient.numel()] = gradient.flatten()
        own = padded.new_empty(len(padded) // WORLD)
        dist.reduce_scatter_tensor(own, padded)
        return own / WORLD

    def _gather(self, part):
        return self.remember(_Gather.apply(part, self, self._shapes[part]), part)

    def remember(self, weight, part):
        address = weight.untyped_storage().data_ptr()
        self._gathered[address], self._parts[address] = weight, part
        return weight

    def _unpack(self, saved):
        if isinstance(saved, torch.Tensor):
            return saved
        whole = self.join_in_backward(saved.part.detach().to(saved.dtype), saved.shape)
        return whole.as_strided(saved.size, saved.stride, saved.offset)

    @torch.no_grad()
    def gather_full_params(self):
        named = self.module.named_parameters()
        return {name: self.join(part.detach(), self._shapes[part]) for name, part in named}


PIECE = "fsdp.FullyShardedDataParallel"


@step.mistake(PIECE, source="public solutions of CS336")
class GradientsSummed(FSDP):
    """Gradients are summed over ranks and not divided, so each step is as many times too long as there are
    ranks. Divide the result of the reduce-scatter."""

    def reduce(self, gradient, dtype):
        return super().reduce(gradient, dtype) * WORLD


@step.mistake(PIECE, source="written for this catalogue")
class AveragedTwice(FSDP):
    """Gradients are divided before the reduce-scatter and again after it. Divide once."""

    def reduce(self, gradient, dtype):
        return super().reduce(gradient / WORLD, dtype)


@step.mistake(PIECE, source="written for this catalogue")
class GradientOfThisRankOnly(FSDP):
    """Each rank keeps its part of its own gradient, without the gradients of the others. Reduce-scatter, not
    scatter."""

    def reduce(self, gradient, dtype):
        return fsdp.shard(gradient.to(dtype))


@step.mistake(PIECE, source="written for this catalogue")
class GradientOfAnotherShard(FSDP):
    """The reduced gradient is that of another rank's shard, so weights learn from gradients of other weights.
    Rank r gets part r of both."""

    def reduce(self, gradient, dtype):
        size = -(-gradient.numel() // WORLD)
        padded = torch.zeros(size * WORLD, dtype=dtype)
        padded[: gradient.numel()] = gradient.flatten()
        return super().reduce(padded.view(WORLD, size).flip(0).flatten(), dtype)


@step.mistake(PIECE, source="public solutions of CS336; passes its suite")
class NoBroadcast(FSDP):
    """Each rank shards its own initial weights, so the whole is patched together from different models.
    Broadcast the weights of rank 0 before they are sharded."""

    def share_initial_state(self):
        for tensor in self.module.buffers():
            dist.broadcast(tensor.data, src=0)


@step.mistake(PIECE, source="written for this catalogue")
class BuffersForgotten(FSDP):
    """Weights come from rank 0, but buffers stay different on each rank. Broadcast both."""

    def share_initial_state(self):
        for tensor in self.module.parameters():
            dist.broadcast(tensor.data, src=0)


@step.mistake(PIECE, source="public solutions of CS336; passes its suite")
class PaddingLost(FSDP):
    """A shard has numel // world numbers, so the last numbers of a weight of odd size belong to no rank and
    come back as zeros. Round up, and pad with zeros."""

    def split(self, weight):
        flat = weight.float().flatten()
        kept = torch.zeros_like(flat)
        n = len(flat) // WORLD * WORLD
        kept[:n] = flat[:n]
        return fsdp.shard(kept)


@step.mistake(PIECE, source="written for this catalogue")
class PaddingInFront(FSDP):
    """The padding is put before the numbers when a weight is sharded and cut off behind them when it is
    gathered, so a weight of odd size is shifted. Pad and cut at the same end."""

    def split(self, weight):
        flat = weight.float().flatten()
        padding = torch.zeros(-len(flat) % WORLD)
        return fsdp.shard(torch.cat([padding, flat]))


@step.mistake(PIECE, source="written for this catalogue")
class PaddingNotCutOff(FSDP):
    """The gathered weight still has its padding, and does not fit the shape of a weight of odd size. Cut it
    off before the view."""

    def join(self, part, shape):
        whole = torch.empty(len(part) * WORLD, dtype=part.dtype)
        dist.all_gather_into_tensor(whole, part)
        return whole.view(shape)


@step.mistake(PIECE, source="written for this catalogue")
class EverySecondNumber(FSDP):
    """A shard has every world-th number of a weight, but the gathered shards are put one after the other, so
    the weight is permuted. Use contiguous shards."""

    def split(self, weight):
        flat = weight.float().flatten()
        flat = torch.cat([flat, torch.zeros(-len(flat) % WORLD)])
        return flat[dist.get_rank() :: WORLD].clone()


@step.mistake(PIECE, source="written for this catalogue")
class GatherMissingInBackward(FSDP):
    """Weights are freed after forward and not gathered again, so backward computes with memory that no longer
    holds them (zeros here). Gather before the backward pass of each layer."""

    def join_in_backward(self, part, shape):
        return torch.zeros(shape, dtype=part.dtype)


@step.mistake(PIECE, source="written for this catalogue")
class OwnShardInBackward(FSDP):
    """Backward computes with this rank's shard and zeros elsewhere, so gradients of layers below are wrong.
    Gather the whole weight again."""

    def join_in_backward(self, part, shape):
        whole = torch.zeros(len(part) * WORLD, dtype=part.dtype)
        whole.view(WORLD, -1)[dist.get_rank()] = part
        return whole[: shape.numel()].view(shape)


@step.mistake(PIECE, source="public solutions of CS336; passes its suite")
class NeverFreed(FSDP):
    """Gathered weights stay in memory until backward, so all layers are whole at once, and the peak is that
    of an unsharded model. Free each after its layer, and gather it again in backward."""

    def _pack(self, tensor):
        return tensor


@step.mistake(PIECE, source="written for this catalogue")
class GatheredOnce(FSDP):
    """A weight is gathered at its first use and kept, so later steps compute with the initial weights. Gather
    in every forward pass."""

    def _gather(self, part):
        kept = self.__dict__.setdefault("_kept", {})
        kept.setdefault(part, part.detach().clone())
        return _Gather.apply(part + (kept[part] - part.detach()), self, self._shapes[part])


@step.mistake(PIECE, source="public solutions of CS336")
class MasterWeightsInHalf(FSDP):
    """The shards are stored in the compute dtype, so updates smaller than its precision are lost. Keep
    float32 shards, and convert what is gathered."""

    def split(self, weight):
        return super().split(weight).to(self.compute_dtype or torch.float32)

    @torch.no_grad()
    def gather_full_params(self):
        return {name: weight.float() for name, weight in super().gather_full_params().items()}


@step.mistake(PIECE, source="public solutions of CS336; passes its suite")
class ReducedInHalf(FSDP):
    """Gradients are summed over ranks in float16, where large ones overflow and small ones vanish. Convert
    them to float32 before the reduce-scatter."""

    def reduce(self, gradient, dtype):
        return super().reduce(gradient, gradient.dtype).to(dtype)


@step.mistake(PIECE, source="written for this catalogue")
class ComputeDtypeIgnored(FSDP):
    """compute_dtype is accepted and not used, so layers compute in float32. Convert the weights that are
    gathered, and the inputs."""

    def __init__(self, module, compute_dtype=None):
        super().__init__(module)


@step.mistake(PIECE, source="public solutions of CS336")
class InputsNotConverted(FSDP):
    """Weights are converted to the compute dtype and floating-point inputs are not, so the first product has
    two dtypes and raises. Convert the inputs too."""

    def _converted(self, value):
        return value


@step.mistake(PIECE, source="written for this catalogue")
class TiedWeightsUntied(FSDP):
    """A weight under two names gets two shards, of which each learns from its own use, so the two drift
    apart. Make one shard for each parameter, not for each name."""

    def key(self, owner, name, weight):
        return owner, name


@step.mistake(PIECE, source="written for this catalogue")
class FrozenWeightsTrained(FSDP):
    """The shard of a frozen weight requires a gradient, so the optimizer moves it. Copy requires_grad to the
    shard."""

    def is_trained(self, weight):
        return True


@step.mistake(PIECE, source="written for this catalogue")
class GatheredParametersAreShards(FSDP):
    """gather_full_params returns this rank's shards, which are flat and half as long. Gather each weight, and
    view it in its shape."""

    @torch.no_grad()
    def gather_full_params(self):
        return {name: part.detach() for name, part in self.module.named_parameters()}


@step.mistake(PIECE, source="written for this catalogue")
class GatheredInTheComputeDtype(FSDP):
    """gather_full_params returns weights in the compute dtype, so a checkpoint loses half of their digits.
    Gather the float32 shards."""

    @torch.no_grad()
    def gather_full_params(self):
        dtype = self.compute_dtype or torch.float32
        return {name: weight.to(dtype) for name, weight in super().gather_full_params().items()}


@step.mistake(PIECE, source="written for this catalogue")
class DifferentOrdersOfCollectives(FSDP):
    """The ranks gather weights in different orders. Collectives match by order alone, so one weight gets the
    numbers of another, or the sizes differ and the job fails. Use one order on every rank."""

    @torch.no_grad()
    def gather_full_params(self):
        named = list(self.module.named_parameters())
        named = named if dist.get_rank() == 0 else named[::-1]
        found = {name: self.join(part.detach(), self._shapes[part]) for name, part in named}
        return {name: found[name] for name, _ in self.module.named_parameters()}


@step.mistake(PIECE, source="written for this catalogue")
class WholeWeightsOnEveryRank(FSDP):
    """Every rank stores whole weights, and only gradients are averaged: data parallelism without sharding, at
    its full cost of memory. Store a shard."""

    def split(self, weight):
        return weight.float().flatten().clone()

    def join(self, part, shape):
        whole = torch.empty(len(part) * WORLD, dtype=part.dtype)
        dist.all_gather_into_tensor(whole, part)
        return whole[: shape.numel()].view(shape)

    def reduce(self, gradient, dtype):
        whole = gradient.flatten().to(dtype)
        dist.all_reduce(whole)
        return whole / WORLD
