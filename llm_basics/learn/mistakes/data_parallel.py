"""Data parallelism: gradients averaged after backward, flat, and while backward runs, on two ranks."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from llm_basics import swap
from llm_basics.learn import probes, ranks
from llm_basics.learn.mistakes import ring_all_reduce
from llm_basics.systems import data_parallel

step = probes.Step("data_parallel")
WORLD, BATCH, STEPS = 2, 6, 5
traffic = ring_all_reduce.traffic
right_flat = swap.reference("data_parallel.average_flat_gradients_")


class Net(nn.Module):
    """A tied weight, a parameter without a gradient, one that is not used, and a buffer."""

    def __init__(self, seed=0):
        super().__init__()
        draw = probes.numbers(seed)
        self.first = nn.Parameter(0.5 * draw(4, 4))
        self.frozen = nn.Parameter(draw(4), requires_grad=False)
        self.unused = nn.Parameter(draw(2))
        self.gain = nn.Parameter(draw(4))
        self.second = nn.Linear(4, 4)
        with torch.no_grad():
            self.second.weight.copy_(draw(4, 4))
            self.second.bias.copy_(draw(4))
        self.third = nn.Linear(4, 4, bias=False)
        self.third.weight = self.second.weight

    def forward(self, x):
        hidden = torch.tanh(x @ self.first.T + self.frozen) * self.gain
        return self.third(torch.tanh(self.second(hidden)))


class Branches(nn.Module):
    """Two weights, of which each input uses one or both."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(w) for w in 0.5 * probes.numbers(3)(2, 3, 3))

    def forward(self, x, uses):
        return sum((x @ getattr(self, name) for name in uses), torch.zeros(()))


class Counter(nn.Module):
    """A running sum of its inputs as a buffer, which the output depends on."""

    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("total", torch.full((2,), start))

    def forward(self, x):
        output = self.weight * (x + self.total)
        self.total += x.detach().mean(0)
        return output


def batches(n=STEPS):
    draw = probes.numbers(seed=9)
    return [(draw(BATCH, 4), draw(BATCH, 4)) for _ in range(n)]


def share(tensor, rank):
    return tensor.tensor_split(WORLD)[rank]


def loss_of(output, target):
    return (output - target).square().mean()


def weights_of(module):
    """A copy of the weights by name, tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def gradients_of(module):
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
    }


def sgd(module):
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)


# --------------------------------------------------------------------------------------------------
# Probes


def trained_alone(module, n=STEPS):
    """Weights after each step of one process on whole batches."""
    optimizer, seen = sgd(module), []
    for inputs, targets in batches(n):
        optimizer.zero_grad()
        loss_of(module(inputs), targets).backward()
        optimizer.step()
        seen.append(weights_of(module))
    return {f"weights after step {i}": each for i, each in enumerate(seen, start=1)}


def five_steps(a):
    rank = dist.get_rank()
    module = Net(seed=rank)
    ddp = a.get_ddp(module)
    optimizer, seen = sgd(module), {"weights at the start": weights_of(module)}
    for i, (inputs, targets) in enumerate(batches(), start=1):
        optimizer.zero_grad()
        loss_of(ddp(share(inputs, rank)), share(targets, rank)).backward()
        a.ddp_on_after_backward(ddp, optimizer)
        optimizer.step()
        seen[f"weights after step {i}"] = weights_of(module)
    return seen


def collectives_of_a_step(a):
    rank = dist.get_rank()
    module = Net(seed=0)
    ddp = a.get_ddp(module)
    inputs, targets = batches(1)[0]
    with traffic() as seen:
        loss_of(ddp(share(inputs, rank)), share(targets, rank)).backward()
        n_in_backward = len([each for each in seen if each[0] == "all_reduce"])
        a.ddp_on_after_backward(ddp, sgd(module))
    n = sum(n for name, n, dtype in seen if name == "all_reduce" and dtype == "float32")
    return {
        "all-reduces start in backward": n_in_backward > 0,
        "numbers reduced twice": max(0, n - sum(p.numel() for p in sgd(module).param_groups[0]["params"])),
        "gradients": gradients_of(module),
    }


def expected_collectives(rank):
    module = Net(seed=0)
    inputs, targets = batches(1)[0]
    loss_of(module(inputs), targets).backward()
    return {
        "all-reduces start in backward": True,
        "numbers reduced twice": 0,
        "gradients": gradients_of(module),
    }


USES = [("left", "left right"), ("left right", "right"), ("right", "right")]


def different_branches(a):
    rank = dist.get_rank()
    module = Branches()
    ddp = a.get_ddp(module)
    x, seen = probes.numbers(seed=5)(4, 3), {}
    for i, uses in enumerate(USES):
        module.zero_grad()
        ddp(share(x, rank), uses[rank].split()).square().mean().backward()
        a.ddp_on_after_backward(ddp, sgd(module))
        seen[f"gradients, batch {i}"] = gradients_of(module)
    return seen


def expected_branches(rank):
    module, x, seen = Branches(), probes.numbers(seed=5)(4, 3), {}
    for i, uses in enumerate(USES):
        module.zero_grad()
        losses = [module(share(x, r), uses[r].split()).square().mean() for r in range(WORLD)]
        (sum(losses) / WORLD).backward()
        seen[f"gradients, batch {i}"] = gradients_of(module)
    return seen


def buffers(a):
    rank = dist.get_rank()
    module = Counter(start=float(rank))
    ddp = a.get_ddp(module)
    inputs = probes.numbers(seed=8)(3, 4, 2)
    seen = {"buffer at the start": module.total.clone()}
    for i, x in enumerate(inputs):
        seen[f"output {i}"] = ddp(share(x, rank)).detach()
    if rank == 1:  # evaluation on one rank must not wait for the other
        ddp.eval()
        seen["output in evaluation"] = ddp(inputs[0]).detach()
    return seen


def expected_buffers(rank):
    inputs = probes.numbers(seed=8)(3, 4, 2)
    seen, total, after = {"buffer at the start": torch.zeros(2)}, torch.zeros(2), torch.zeros(2)
    for i, x in enumerate(inputs):
        seen[f"output {i}"] = share(x, rank) + total
        after = total + share(x, rank).mean(0)
        total = total + share(x, 0).mean(0)
    if rank == 1:
        seen["output in evaluation"] = inputs[0] + after
    return seen


def accumulation(a):
    rank = dist.get_rank()
    module = Net(seed=0)
    ddp = a.get_ddp(module)
    seen = {}
    for i in range(2):
        module.zero_grad()
        with traffic() as calls:
            for k, (inputs, targets) in enumerate(batches(3)):
                with ddp.no_sync() if k < 2 else contextlib.nullcontext():
                    loss = loss_of(ddp(share(inputs, rank)), share(targets, rank))
                    loss.backward()
                if k == 1:
                    seen[f"collectives under no_sync, step {i}"] = len(calls)
            a.ddp_on_after_backward(ddp, sgd(module))
        seen[f"gradients, step {i}"] = gradients_of(module)
    return seen


def expected_accumulation(rank):
    module, seen = Net(seed=0), {}
    for inputs, targets in batches(3):
        loss_of(module(inputs), targets).backward()
    for i in range(2):
        seen[f"collectives under no_sync, step {i}"] = 0
        seen[f"gradients, step {i}"] = gradients_of(module)
    return seen


class _Mixed(nn.Module):
    """Weights of two dtypes, a transposed gradient, one without."""

    def __init__(self):
        super().__init__()
        draw = probes.numbers(seed=30)
        shapes = {"matrix": (2, 3), "vector": (4,), "without": (2,), "wide": (3,)}
        for name, shape in shapes.items():
            dtype = torch.float64 if name == "wide" else torch.float32
            setattr(self, name, nn.Parameter(draw(*shape).to(dtype)))


def given_gradients(rank):
    draw, module = probes.numbers(seed=40 + rank), _Mixed()
    module.matrix.grad = draw(3, 2).T
    module.vector.grad = draw(4)
    module.wide.grad = draw(3).double()
    return module


def averaged(name):
    def on_rank(a):
        module = given_gradients(dist.get_rank())
        gradient_before = module.vector.grad
        with traffic() as seen:
            getattr(a, name)(p for p in module.parameters())
        n_calls = len([each for each in seen if each[0] == "all_reduce"])
        return {
            "gradients": gradients_of(module),
            "in place": module.vector.grad is gradient_before,
            "all-reduces": n_calls,
            "numbers reduced": sum(n for _, n, _ in seen),
        }

    return on_rank


def expected_average(n_calls):
    def expected(rank):
        of_ranks = [gradients_of(given_gradients(r)) for r in range(WORLD)]
        mean = {k: None if v is None else (v + of_ranks[1][k]) / 2 for k, v in of_ranks[0].items()}
        return {"gradients": mean, "in place": True, "all-reduces": n_calls, "numbers reduced": 13}

    return expected


ranks.probe(
    step,
    "one all-reduce for each of three gradients",
    averaged("run_average_gradients"),
    expected_average(3),
    "run_average_gradients",
)
ranks.probe(
    step,
    "one all-reduce for each dtype of three gradients",
    averaged("run_average_flat_gradients"),
    expected_average(2),
    "run_average_flat_gradients",
)
DDP = "get_ddp ddp_on_after_backward"
ranks.probe(
    step,
    "five steps on halves of each batch, ranks with different initial weights",
    five_steps,
    lambda rank: {"weights at the start": weights_of(Net(seed=0))} | trained_alone(Net(seed=0)),
    DDP,
    contract="ddp",
)
ranks.probe(
    step,
    "what a step communicates, and when",
    collectives_of_a_step,
    expected_collectives,
    DDP,
    beyond="the public tests see weights only; to start all-reduces in backward is what the step is about",
)
ranks.probe(
    step,
    "a parameter that one rank uses and the other does not",
    different_branches,
    expected_branches,
    DDP,
    beyond="in the public tests all ranks use the same parameters; with branches, ranks wait for each other",
)
ranks.probe(
    step,
    "buffers follow rank 0 in training, and evaluation on one rank does not wait",
    buffers,
    expected_buffers,
    "get_ddp",
    beyond="the public tests have no buffers; running statistics that differ give a different model per rank",
)
ranks.probe(
    step,
    "gradients accumulated over three batches under no_sync, twice",
    accumulation,
    expected_accumulation,
    DDP,
    beyond="the public tests do not accumulate; no_sync is PyTorch's name for what large batches need",
)


# --------------------------------------------------------------------------------------------------
# Mistakes


class DDP(swap.reference("data_parallel.DistributedDataParallel")):
    """A right one, in parts: what the mistakes change."""

    divides_by = WORLD
    op = dist.ReduceOp.SUM

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module
        self.share_initial_state()
        self._order = self.order()
        self._is_ready = [False] * len(self._order)
        self._pending = []
        self._synchronizes = True
        self.add_hooks()

    def share_initial_state(self):
        data_parallel.broadcast_from_rank_0([*self.module.parameters(), *self.module.buffers()])

    def order(self):
        return [p for p in self.module.parameters() if p.requires_grad][::-1]

    def add_hooks(self):
        for i, parameter in enumerate(self._order):
            parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._on_gradient(i))


class Direct(DDP):
    """One that starts each all-reduce in its hook and waits for those, where all ranks use all weights."""

    def _on_gradient(self, i):
        if self._synchronizes:
            self.reduce(self._order[i])

    def reduce(self, parameter):
        self._pending.append((dist.all_reduce(parameter.grad, async_op=True), parameter.grad))

    def finish_gradient_synchronization(self):
        for work, gradient in self._pending:
            work.wait()
            gradient /= dist.get_world_size()
        self._pending = []


@step.mistake("data_parallel.DistributedDataParallel", source="public solutions of CS336; passes its suite")
class UnusedParametersHang(Direct):
    """A parameter that this rank does not use starts no all-reduce, while the other waits for it: the job
    hangs, or reduces another gradient. Let unused parameters contribute zeros, in one order on every rank."""


@step.mistake("data_parallel.DistributedDataParallel", source="public solutions of CS336")
class GradientsSummed(DDP):
    """Gradients are summed over ranks and never divided, so the step is as many times too long as there are
    ranks. The gradient of the whole batch is the mean: divide by the number of ranks."""

    def finish_gradient_synchronization(self):
        super().finish_gradient_synchronization()
        for parameter in self._order:
            if parameter.grad is not None:
                parameter.grad *= dist.get_world_size()


@step.mistake("data_parallel.DistributedDataParallel", source="public solutions of CS336")
class AveragedTwice(DDP):
    """Gradients are divided before the all-reduce and again after it, so steps are too short by the number of
    ranks. Divide once."""

    def finish_gradient_synchronization(self):
        super().finish_gradient_synchronization()
        for parameter in self._order:
            if parameter.grad is not None:
                parameter.grad /= dist.get_world_size()


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class DividedByTheBatch(DDP):
    """The sum of gradients is divided by the number of examples in a share, though each loss is already a
    mean over them. Divide by the number of ranks."""

    def forward(self, *args, **kwargs):
        self.n_examples = len(args[0])
        return super().forward(*args, **kwargs)

    def finish_gradient_synchronization(self):
        super().finish_gradient_synchronization()
        for parameter in self._order:
            if parameter.grad is not None:
                parameter.grad *= dist.get_world_size() / self.n_examples


@step.mistake("data_parallel.DistributedDataParallel", source="public solutions of CS336")
class NoBroadcast(DDP):
    """Each rank keeps its own initial weights. Averaged gradients of different models train none of them;
    broadcast the weights of rank 0 when the module is wrapped."""

    def share_initial_state(self):
        data_parallel.broadcast_from_rank_0(self.module.buffers())


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class InitialWeightsAveraged(DDP):
    """The initial weights are averaged over ranks instead of taken from rank 0. The mean of random weights is
    smaller than an initialization is meant to be; broadcast those of rank 0."""

    def share_initial_state(self):
        for tensor in self.module.parameters():
            dist.all_reduce(tensor.data)
            tensor.data /= dist.get_world_size()
        data_parallel.broadcast_from_rank_0(self.module.buffers())


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class BroadcastFromTheLastRank(DDP):
    """The initial weights are those of the last rank. A checkpoint that rank 0 loaded is then overwritten by
    random weights; the source is rank 0."""

    def share_initial_state(self):
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            dist.broadcast(tensor.data, src=dist.get_world_size() - 1)


@step.mistake("data_parallel.DistributedDataParallel", source="public solutions of CS336")
class OnlyTrainedWeightsBroadcast(DDP):
    """Only parameters that require a gradient are broadcast, so frozen weights differ between ranks.
    Broadcast every parameter."""

    def share_initial_state(self):
        trained = [p for p in self.module.parameters() if p.requires_grad]
        data_parallel.broadcast_from_rank_0([*trained, *self.module.buffers()])


@step.mistake("data_parallel.DistributedDataParallel", source="public solutions of CS336; passes its suite")
class BuffersForgotten(DDP):
    """Buffers are never broadcast, so running statistics differ by rank, and with them the outputs. Broadcast
    them at the start and before each forward pass in training."""

    def share_initial_state(self):
        data_parallel.broadcast_from_rank_0(self.module.parameters())

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class BuffersOnlyAtTheStart(DDP):
    """Buffers are broadcast when the module is wrapped and drift apart afterwards. Broadcast them before each
    forward pass in training too."""

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class BuffersAlsoInEvaluation(DDP):
    """Buffers are broadcast in evaluation as well, so an evaluation on one rank waits for the others and
    hangs. Broadcast only in training."""

    def forward(self, *args, **kwargs):
        data_parallel.broadcast_from_rank_0(self.module.buffers())
        return self.module(*args, **kwargs)


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class TiedWeightsReducedTwice(DDP):
    """A weight under two names gets two hooks, and its gradient is communicated twice; where the sum is
    divided once, it is also twice too large. Count a tied weight once, as parameters() does."""

    def finish_gradient_synchronization(self):
        super().finish_gradient_synchronization()
        counts = {}
        for _, parameter in self.module.named_parameters(remove_duplicate=False):
            counts[parameter] = counts.get(parameter, 0) + 1
        for parameter, count in counts.items():
            if count > 1:
                dist.all_reduce(parameter.grad)


@step.mistake("data_parallel.DistributedDataParallel", source="public solutions of CS336; passes its suite")
class NotOverlapped(DDP):
    """All gradients are reduced after backward, when the network has been idle for its whole duration. Start
    each all-reduce in a hook as soon as its gradient is complete."""

    def add_hooks(self):
        pass


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class HooksOnAccumulationSteps(DDP):
    """no_sync does not stop the hooks, so gradients that are still accumulated are averaged at every backward
    pass. Let the hooks return at once inside no_sync."""

    @contextlib.contextmanager
    def no_sync(self):
        yield
        super().finish_gradient_synchronization()


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class NoSyncIsNotEnded(DDP):
    """no_sync turns synchronization off and never on again, so from then on each rank trains on its own
    share. Restore the state at the end of the block."""

    @contextlib.contextmanager
    def no_sync(self):
        self._synchronizes = False
        self._stays_off = True
        yield

    def finish_gradient_synchronization(self):
        if getattr(self, "_stays_off", False):
            return
        super().finish_gradient_synchronization()


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class LastBatchOnly(DDP):
    """Gradients of batches under no_sync are discarded, so a step uses the last batch alone. Accumulate them:
    the all-reduce of the last backward pass takes the whole sum."""

    @contextlib.contextmanager
    def no_sync(self):
        with super().no_sync():
            yield
        for parameter in self._order:
            parameter.grad = None


@step.mistake("data_parallel.DistributedDataParallel", source="public solutions of CS336")
class HandlesNotWaitedFor(DDP):
    """The all-reduces are started and never waited for, so the optimizer steps with gradients of this rank,
    or half of a message. Call wait on every handle before the step."""

    def _start_all_reduces(self, end):
        for parameter in self._order[len(self._pending) : end]:
            work = dist.all_reduce(parameter.grad.clone(), async_op=True)
            self._pending.append((work, parameter.grad))


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class ReducedOnACopy(DDP):
    """The all-reduce runs on a copy of each gradient that is never written back, so ranks drift apart. Reduce
    parameter.grad itself, or copy the result into it."""

    def _start_all_reduces(self, end):
        for parameter in self._order[len(self._pending) : end]:
            copy = parameter.grad.clone()
            self._pending.append((dist.all_reduce(copy, async_op=True), copy))


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class FirstStepOnly(DDP):
    """Gradients are synchronized in the first step, and the list of handles is not cleared, so later steps
    wait for old ones and start no new ones. Clear the list at the end of each step."""

    def finish_gradient_synchronization(self):
        if not getattr(self, "_is_over", False):
            super().finish_gradient_synchronization()
        self._is_over, self._synchronizes = True, False


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class MatricesOnly(DDP):
    """Only gradients of matrices are reduced, so biases and gains drift apart between ranks. Reduce the
    gradient of every parameter that has one."""

    def order(self):
        return [p for p in super().order() if p.dim() > 1]


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class DifferentOrdersOfCollectives(DDP):
    """The ranks reduce gradients in different orders. Collectives match by order alone, so one parameter gets
    the gradient of another, or the sizes differ and the job fails. Use one order on every rank."""

    def order(self):
        order = super().order()
        return order if dist.get_rank() == 0 else order[::-1]


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class ZerosForUnusedParameters(DDP):
    """A parameter without a gradient on any rank gets one of zeros, so weight decay and momentum move a
    weight that took no part. Leave its gradient None."""

    def finish_gradient_synchronization(self):
        super().finish_gradient_synchronization()
        for parameter in self._order:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class MissingGradientNotExpected(DDP):
    """A parameter whose grad is None raises an error. Unused parts of a model have no gradient; let them
    contribute zeros, or skip them on every rank alike."""

    def finish_gradient_synchronization(self):
        for parameter in self._order:
            parameter.grad.add_(0)
        super().finish_gradient_synchronization()


@step.mistake("data_parallel.DistributedDataParallel", source="written for this catalogue")
class UsersAreAveraged(DDP):
    """The mean is taken over ranks that have a gradient, not over all ranks. The other rank's loss counts
    too, with a gradient of zero: divide by the number of ranks."""

    def finish_gradient_synchronization(self):
        n_users = [torch.tensor(float(p.grad is not None)) for p in self._order]
        for n in n_users:
            dist.all_reduce(n)
        super().finish_gradient_synchronization()
        for parameter, n in zip(self._order, n_users, strict=True):
            if n > 0:
                parameter.grad *= dist.get_world_size() / n


# -- after backward ------------------------------------------------------------------------------------


def averages(piece, reduce_one):
    def wrong(parameters):
        with_gradient = [p for p in parameters if p.grad is not None]
        if piece == "flat":
            by_dtype = {}
            for parameter in with_gradient:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
            for gradients in by_dtype.values():
                flat = torch.cat([g.flatten() for g in gradients])
                flat = reduce_one(flat)
                for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                    g.copy_(mean.view_as(g))
        else:
            for parameter in with_gradient:
                parameter.grad.copy_(reduce_one(parameter.grad.clone()))

    return wrong


def summed(tensor):
    dist.all_reduce(tensor)
    return tensor


@step.mistake("data_parallel.average_gradients_", source="public solutions of CS336")
def gradients_are_summed(parameters):
    """The all-reduce sums, and the division is missing, so gradients are too large by the number of ranks.
    Divide each by the number of ranks."""
    averages("each", summed)(parameters)


@step.mistake("data_parallel.average_gradients_", source="written for this catalogue")
def largest_gradient_taken(parameters):
    """The all-reduce uses MAX instead of SUM, so of each number only the largest remains. Sum, then
    divide."""

    def largest(tensor):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    averages("each", largest)(parameters)


@step.mistake("data_parallel.average_gradients_", source="written for this catalogue")
def weights_averaged(parameters):
    """The weights are averaged instead of their gradients, so each rank steps along the gradient of its own
    share. Reduce parameter.grad, not the parameter."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.data)
            parameter.data /= dist.get_world_size()


@step.mistake("data_parallel.average_gradients_", source="written for this catalogue")
def new_tensors_for_gradients(parameters):
    """Each parameter gets a new gradient tensor, and code that holds the old one does not see the mean.
    Reduce the gradient in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = summed(parameter.grad.clone()) / dist.get_world_size()


@step.mistake("data_parallel.average_gradients_", source="public solutions of CS336")
def none_not_expected(parameters):
    """A parameter whose grad is None raises an error. Frozen weights have no gradient; skip them."""
    for parameter in parameters:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


@step.mistake("data_parallel.average_flat_gradients_", source="written for this catalogue")
def flat_gradients_summed(parameters):
    """The long message holds sums, and the division is missing, so gradients are too large by the number of
    ranks. Divide it once before it is split."""
    averages("flat", summed)(parameters)


@step.mistake("data_parallel.average_flat_gradients_", source="public solutions of CS336")
def flat_message_not_written_back(parameters):
    """The concatenated gradients are averaged, but torch.cat made a copy, and parameters keep their own. Copy
    each part of the result into its gradient."""
    gradients = [p.grad.flatten().double() for p in parameters if p.grad is not None]
    summed(torch.cat([g for g in gradients][:2]))
    summed(torch.cat([g for g in gradients][2:]))


@step.mistake("data_parallel.average_flat_gradients_", source="written for this catalogue")
def one_message_for_each_gradient(parameters):
    """Each gradient is a message of its own, so the latency is paid for each. Concatenate them first and
    reduce once."""
    data_parallel.average_gradients_(parameters)


@step.mistake("data_parallel.average_flat_gradients_", source="written for this catalogue")
def split_in_the_wrong_order(parameters):
    """The message is split into gradients in another order than the one in which it was concatenated, so each
    gradient gets the numbers of another. Use one list for both."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in (torch.float32, torch.float64):
        alike = [g for g in gradients if g.dtype == dtype]
        flat = summed(torch.cat([g.flatten() for g in alike])) / dist.get_world_size()
        for gradient, mean in zip(alike[::-1], flat.split([g.numel() for g in alike[::-1]]), strict=True):
            gradient.copy_(mean.view_as(gradient))


@step.mistake("data_parallel.average_flat_gradients_", source="written for this catalogue")
def transposed_gradients_flattened_by_memory(parameters):
    """A gradient that is not contiguous is flattened in the order of its memory and read back in the order of
    its rows. Use flatten and view_as on both sides, or contiguous first."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    right_flat(_Holder(g) for g in gradients)
    for gradient in gradients:
        if gradient.dim() == 2:
            gradient.copy_(gradient.T.flatten().clone().view_as(gradient))


class _Holder:
    def __init__(self, grad):
        self.grad = grad


@step.mistake("data_parallel.average_flat_gradients_", source="written for this catalogue")
def one_dtype_expected(parameters):
    """Gradients of several dtypes are concatenated in one message, which converts all of them to one dtype
    and sends too many bytes. Make one message per dtype."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = summed(torch.cat([g.flatten() for g in gradients])) / dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
