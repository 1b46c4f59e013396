"""A sharded optimizer: every rank updates a share of the parameters, on two ranks."""

import torch
import torch.distributed as dist
from torch import nn

from llm_basics import swap
from llm_basics.core import optim
from llm_basics.learn import probes, ranks

step = probes.Step("sharded_optimizer")
WORLD, STEPS = 2, 10
AdamW = optim.AdamW
OPTIONS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
SHAPES = {"first": (3, 4), "gain": (4,), "unused": (2,), "second": (4, 2), "bias": (2,)}


class Net(nn.Module):
    """Parameters of uneven sizes, one of them without a gradient."""

    def __init__(self):
        super().__init__()
        draw = probes.numbers(seed=50)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(draw(*shape)))

    def forward(self, x):
        return torch.tanh(x @ self.first * self.gain) @ self.second + self.bias


def loss_of(module, i):
    draw = probes.numbers(seed=60 + i)
    return (module(draw(5, 3)) - draw(5, 2)).square().mean()


def weights_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def train(module, optimizer, n=STEPS, closure=False):
    """Weights after each step, the results of the steps, and how often the loss was computed."""
    seen, results, n_calls = [], [], 0
    for i in range(n):

        def compute(i=i):
            nonlocal n_calls
            n_calls += 1
            optimizer.zero_grad()
            loss = loss_of(module, i)
            loss.backward()
            return loss

        if closure:
            results.append(optimizer.step(compute))
        else:
            compute()
            results.append(optimizer.step())
        seen.append(weights_of(module))
    return seen, results, n_calls


def groups_of(module):
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 0.02}]


# --------------------------------------------------------------------------------------------------
# Probes


def ten_steps(a):
    module = Net()
    optimizer = a.get_sharded_optimizer(module.parameters(), torch.optim.AdamW, **OPTIONS)
    seen, _, _ = train(module, optimizer)
    return {"weights after step 1": seen[0], "weights after step 10": seen[-1]}


def expected_ten_steps(rank):
    module = Net()
    seen, _, _ = train(module, torch.optim.AdamW(module.parameters(), **OPTIONS))
    return {"weights after step 1": seen[0], "weights after step 10": seen[-1]}


def numbers_in(state):
    return sum(v.numel() for each in state.values() for v in each.values() if torch.is_tensor(v) and v.dim())


def state(a):
    module = Net()
    optimizer = a.get_sharded_optimizer(module.parameters(), torch.optim.AdamW, **OPTIONS)
    train(module, optimizer, 1)
    n = torch.tensor(numbers_in(optimizer.state))
    stored = numbers_in(optimizer.state_dict()["state"])
    own, largest = int(n), n.clone()
    dist.all_reduce(n)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return {
        "numbers of state on all ranks": int(n),
        "at most 60% on one rank": bool(largest <= 0.6 * n),
        "numbers in state_dict are those of the rank": stored == own,
    }


def expected_state(rank):
    n = sum(p.numel() for name, p in Net().named_parameters() if name != "unused")
    return {
        "numbers of state on all ranks": 2 * n,
        "at most 60% on one rank": True,
        "numbers in state_dict are those of the rank": True,
    }


def with_schedule(make, module):
    """Groups with settings of their own, a learning rate that changes, and a group that comes later."""
    groups = groups_of(module)
    optimizer = make(groups[:1])
    train(module, optimizer, 2)
    optimizer.add_param_group(groups[1])
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    seen, _, _ = train(module, optimizer, 3)
    settings = [{k: group[k] for k in OPTIONS} for group in optimizer.param_groups]
    return {"weights": seen[-1], "settings of the groups": settings}


def groups(a):
    return with_schedule(lambda g: a.get_sharded_optimizer(g, torch.optim.AdamW, **OPTIONS), Net())


def expected_groups(rank):
    return with_schedule(lambda g: torch.optim.AdamW(g, **OPTIONS), Net())


def other_class(make, module):
    seen, losses, n_calls = train(module, make(module.parameters()), 3, closure=True)
    losses = [None if loss is None else float(loss.detach()) for loss in losses]
    return {"weights": seen[-1], "losses": losses, "calls of the closure": n_calls}


def closure(a):
    return other_class(
        lambda p: a.get_sharded_optimizer(p, torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), Net()
    )


def expected_closure(rank):
    return other_class(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), Net())


def resumed(a):
    module = Net()
    optimizer = a.get_sharded_optimizer(module.parameters(), torch.optim.AdamW, **OPTIONS)
    train(module, optimizer, 3)
    stored = optimizer.state_dict()
    again = a.get_sharded_optimizer(module.parameters(), torch.optim.AdamW, **OPTIONS)
    again.load_state_dict(stored)
    seen, _, _ = train(module, again, 2)
    return {"weights": seen[-1]}


def expected_resumed(rank):
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters(), **OPTIONS)
    train(module, optimizer, 3)
    seen, _, _ = train(module, optimizer, 2)
    return {"weights": seen[-1]}


NEEDS = "get_sharded_optimizer"
ranks.probe(step, "ten steps of AdamW", ten_steps, expected_ten_steps, NEEDS, contract="sharded_optimizer")
ranks.probe(
    step,
    "each rank keeps the state of its share alone",
    state,
    expected_state,
    NEEDS,
    beyond="the public tests see weights only; less state per rank is what a sharded optimizer is for",
)
ranks.probe(
    step,
    "groups with settings of their own, a schedule, and a group that is added",
    groups,
    expected_groups,
    NEEDS,
    beyond="the public tests use one group and one learning rate; training uses groups and a schedule",
)
ranks.probe(
    step,
    "SGD with Nesterov momentum, and a closure",
    closure,
    expected_closure,
    NEEDS,
    beyond="the public tests wrap AdamW alone, without a closure; any optimizer class may be given",
)
ranks.probe(
    step,
    "resumed from state_dict",
    resumed,
    expected_resumed,
    NEEDS,
    beyond="the public tests store nothing; training is resumed from a checkpoint",
)


# --------------------------------------------------------------------------------------------------
# Mistakes


class Sharded(swap.reference("sharded_optimizer.ShardedOptimizer")):
    """A right one, in parts: what the mistakes change."""

    def __init__(self, params, optimizer_cls, **kwargs):
        super().__init__(params, optimizer_cls, **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss(closure)
        self.take_settings()
        self._local.step()
        self.share()
        return loss

    def loss(self, closure):
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def take_settings(self):
        for group, local_group in zip(self.param_groups, self._local.param_groups, strict=True):
            local_group |= {name: value for name, value in group.items() if name != "params"}

    def share(self):
        for parameter, owner in self._owners.items():
            dist.broadcast(parameter.data, owner)


PIECE = "sharded_optimizer.ShardedOptimizer"


@step.mistake(PIECE, source="public solutions of CS336")
class UpdatesNotShared(Sharded):
    """The new weights are never sent, so each rank updates its share and keeps old weights elsewhere.
    Broadcast every parameter from its owner after the step."""

    def share(self):
        pass


@step.mistake(PIECE, source="public solutions of CS336")
class EverythingFromRank0(Sharded):
    """All parameters are broadcast from rank 0, which has the old weights of the other rank's share.
    Broadcast each from the rank that updated it."""

    def share(self):
        for parameter in self._owners:
            dist.broadcast(parameter.data, 0)


@step.mistake(PIECE, source="written for this catalogue")
class SharedBeforeTheStep(Sharded):
    """The weights are broadcast before they are updated, so other ranks are always a step behind. Step first,
    then broadcast."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.loss(closure)
        self.take_settings()
        self.share()
        self._local.step()
        return loss


@step.mistake(PIECE, source="public solutions of CS336")
class WeightsAveraged(Sharded):
    """The weights of all ranks are averaged after the step, which halves each update on two ranks. Take every
    parameter from its owner."""

    def share(self):
        for parameter in self._owners:
            dist.all_reduce(parameter.data)
            parameter.data /= dist.get_world_size()


@step.mistake(PIECE, source="written for this catalogue")
class UpdatesAddedUp(Sharded):
    """The all-reduce sums the weights of all ranks, so each is as many times too large as there are ranks.
    Broadcast each from its owner."""

    def share(self):
        for parameter in self._owners:
            dist.all_reduce(parameter.data)


@step.mistake(PIECE, source="public solutions of CS336; passes its suite")
class UnshardedStateKept(Sharded):
    """Every rank optimizes all parameters, so no state is saved and the broadcast changes nothing. Give the
    inner optimizer only the parameters of this rank."""

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self._local.param_groups[-1]["params"] = list(self.param_groups[-1]["params"])


@step.mistake(PIECE, source="written for this catalogue")
class OneRankOwnsAll(Sharded):
    """All parameters belong to rank 0, which keeps all of the state and does all of the work. Spread the
    numbers evenly over the ranks."""

    def add_param_group(self, param_group):
        self._loads = [0] + [10**9] * (dist.get_world_size() - 1)
        super().add_param_group(param_group)


@step.mistake(PIECE, source="public solutions of CS336")
class EveryRankOwnsTheSameHalf(Sharded):
    """The share does not depend on the rank, so every rank updates the same parameters and the others never
    move. Compare the index of a parameter with dist.get_rank()."""

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        own = [p for p in self.param_groups[-1]["params"] if self._owners[p] == 0]
        self._local.param_groups[-1]["params"] = own
        self._owners |= dict.fromkeys(self.param_groups[-1]["params"], 0)


@step.mistake(PIECE, source="written for this catalogue")
class LastParameterUnowned(Sharded):
    """The parameters are cut into equal parts by a division that rounds down, and the last one belongs to no
    rank. Every parameter needs an owner; take the index modulo the number of ranks."""

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        last = self.param_groups[-1]["params"][-1]
        own = self._local.param_groups[-1]["params"]
        self._local.param_groups[-1]["params"] = [p for p in own if p is not last]


@step.mistake(PIECE, source="public solutions of CS336; passes its suite")
class LearningRateFixed(Sharded):
    """The inner optimizer keeps the learning rate it was made with, and a schedule that sets param_groups has
    no effect. Copy the settings of each group before the step, or share the groups."""

    def take_settings(self):
        pass


@step.mistake(PIECE, source="written for this catalogue")
class SettingsOfTheFirstGroup(Sharded):
    """All groups use the settings of the first one, so parameters without weight decay are decayed. Take the
    settings of each group from its own."""

    def take_settings(self):
        first = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        for local_group in self._local.param_groups:
            local_group |= first


@step.mistake(PIECE, source="public solutions of CS336; passes its suite")
class AddedGroupIgnored(Sharded):
    """A group that is added later reaches the list of the wrapper but not the inner optimizer, so its
    parameters never move. Assign owners and pass it on in add_param_group."""

    def add_param_group(self, param_group):
        is_later = self._local is not None and len(self.param_groups) > 0 and self._is_made
        super().add_param_group(param_group)
        if is_later:
            self._local.param_groups[-1]["params"] = []

    def __init__(self, params, optimizer_cls, **kwargs):
        self._is_made = False
        super().__init__(params, optimizer_cls, **kwargs)
        self._is_made = True


@step.mistake(PIECE, source="written for this catalogue")
class OptionsNotPassedOn(Sharded):
    """The keyword arguments do not reach the inner optimizer, which runs with its defaults. Pass **kwargs to
    optimizer_cls."""

    def __init__(self, params, optimizer_cls, **kwargs):
        super().__init__(params, optimizer_cls, lr=kwargs["lr"])


@step.mistake(PIECE, source="written for this catalogue")
class ClosureCalledTwice(Sharded):
    """The closure is called by the wrapper and passed to the inner optimizer, which calls it again with
    weights that did not change; its loss is lost. Call it once and return its result."""

    def loss(self, closure):
        super().loss(closure)
        return super().loss(closure)


@step.mistake(PIECE, source="public solutions of CS336; passes its suite")
class ClosureIgnored(Sharded):
    """A closure is accepted and never called, so there are no gradients and no loss. Call it, with gradients
    enabled, before the inner step."""

    def loss(self, closure):
        return None


@step.mistake(PIECE, source="written for this catalogue")
class StateNotLoaded(Sharded):
    """load_state_dict fills the wrapper's state, but the inner optimizer keeps its empty one, so a resumed
    run starts with means of zero. Give the inner optimizer the loaded state."""

    def load_state_dict(self, state_dict):
        pass


@step.mistake(PIECE, source="public solutions of CS336")
class StateAnewInEachStep(Sharded):
    """The inner optimizer is made again in every step, so running means start at zero each time. Make it once
    and keep it."""

    def take_settings(self):
        super().take_settings()
        self._local.state.clear()
