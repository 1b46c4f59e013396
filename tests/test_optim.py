"""AdamW, clipping and the schedule. Alone: `uv run pytest tests/test_optim.py`."""

import copy
import math

import pytest
import torch
from torch import nn

from llm_basics.core import optim

STEPS = 8
# snapshots are compared in float32
SNAPSHOT_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}

# --------------------------------------------------------------------------------------------------
# AdamW, oracle


def parameters_with_gradients(randn, *shapes):
    """Parameters, and for each step their gradients: of every size, some far below eps."""
    parameters = [nn.Parameter(2 * randn(*shape)) for shape in shapes]
    gradients = [[randn(*shape) * 10 ** randn(*shape) for shape in shapes] for _ in range(STEPS)]
    return parameters, gradients


def train(optimizer, parameters, gradients, before_step=lambda step: None):
    """The parameters after each step."""
    trajectory = []
    for step, step_gradients in enumerate(gradients):
        before_step(step)
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        trajectory.append([parameter.detach().clone() for parameter in parameters])
    return trajectory


def assert_trains_like_torch(cls, make, parameters, gradients, change=lambda optimizer, step: None):
    """`make(cls, parameters)` and `make(torch.optim.AdamW, parameters)` go the same way."""
    trajectories = []
    for optimizer_class in (cls, torch.optim.AdamW):
        own = copy.deepcopy(parameters)
        optimizer = make(optimizer_class, own)
        trajectories.append(train(optimizer, own, gradients, lambda step, o=optimizer: change(o, step)))
    torch.testing.assert_close(*trajectories, rtol=1e-5, atol=1e-7)


OPTIONS = {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.3}


def test_adamw_matches_torch(adapters, randn):
    parameters, gradients = parameters_with_gradients(randn, (3, 4), (5,))
    assert_trains_like_torch(
        adapters.get_adamw_cls(), lambda cls, own: cls(own, **OPTIONS), parameters, gradients
    )


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.0)], ids=str)
def test_adamw_matches_torch_without_a_moment(adapters, randn, betas):
    parameters, gradients = parameters_with_gradients(randn, (3, 4))
    options = OPTIONS | {"betas": betas}
    assert_trains_like_torch(
        adapters.get_adamw_cls(), lambda cls, own: cls(own, **options), parameters, gradients
    )


def test_adamw_takes_parameters_from_a_generator(adapters, randn):
    parameters, gradients = parameters_with_gradients(randn, (3, 4), (5,))
    assert_trains_like_torch(
        adapters.get_adamw_cls(), lambda cls, own: cls((p for p in own), **OPTIONS), parameters, gradients
    )


def test_adamw_reads_the_lr_at_every_step(adapters, randn):
    parameters, gradients = parameters_with_gradients(randn, (3, 4), (5,))

    def make(cls, own):
        return cls([{"params": own[:1]}, {"params": own[1:], "lr": 0.1}], **OPTIONS)

    def change(optimizer, step):
        if step == 2:
            optimizer.param_groups[0]["lr"] = 0.3
        if step == 4:
            optimizer.param_groups[1]["weight_decay"] = 0.7

    assert_trains_like_torch(adapters.get_adamw_cls(), make, parameters, gradients, change)


# --------------------------------------------------------------------------------------------------
# AdamW, property


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adamw_keeps_dtype_and_device(adapters, dtype):
    weight = nn.Parameter(torch.empty(3, 4, dtype=dtype, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = adapters.get_adamw_cls()([weight], **OPTIONS)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.dim()]
    assert kept and {(t.dtype, t.device.type, t.shape) for t in kept} == {(dtype, "meta", weight.shape)}


def test_adamw_goes_on_from_its_state(adapters, randn):
    parameters, gradients = parameters_with_gradients(randn, (3, 4), (5,))
    cls, resumed = adapters.get_adamw_cls(), copy.deepcopy(parameters)
    uninterrupted = train(cls(parameters, **OPTIONS), parameters, gradients)
    first = cls(resumed, **OPTIONS)
    train(first, resumed, gradients[:3])
    second = cls(resumed, lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(map(torch.equal, train(second, resumed, gradients[3:])[-1], uninterrupted[-1]))


def test_adamw_follows_a_scheduler_of_torch(adapters):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = adapters.get_adamw_cls()([weight], lr=1.0, betas=(0.7, 0.9), eps=0.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.1, 0.01][step])
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert weight.item() == pytest.approx(-1.1)


def test_adamw_defaults():
    defaults = optim.AdamW([nn.Parameter(torch.zeros(1))]).defaults
    assert {name: defaults[name] for name in OPTIONS} == {
        "lr": 3e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"eps": -1e-8}, "eps must be at least 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
    ],
)
def test_adamw_refuses_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        optim.AdamW([nn.Parameter(torch.zeros(1))], **options)


def test_adamw_update_is_pure(randn):
    tensors = [randn(3, 4), randn(3, 4), randn(3, 4), randn(3, 4).square()]
    before = [tensor.clone() for tensor in tensors]
    optim.adamw_update(*tensors, step=3, **OPTIONS)
    assert all(map(torch.equal, tensors, before))


def test_adamw_snapshot(adapters, snapshot):
    arrays = snapshot("adamw")
    weight = nn.Parameter(arrays["weight"])
    optimizer = adapters.get_adamw_cls()([weight], lr=0.03, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2)
    trajectory = train(optimizer, [weight], [[gradient] for gradient in arrays["gradients"]])
    actual = torch.stack([weights[0] for weights in trajectory])
    torch.testing.assert_close(actual, arrays["trajectory"], **SNAPSHOT_TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Clipping, oracle


def parameters_to_clip(randn):
    """Parameters of several shapes with gradients of several sizes; the second has none."""
    parameters = [nn.Parameter(randn(*shape)) for shape in ((3, 4), (2,), (5,), (2, 2))]
    for parameter, size in zip(parameters, (1.0, None, 10.0, 0.01), strict=True):
        parameter.grad = None if size is None else size * randn(*parameter.shape)
    return parameters


def gradients_of(parameters):
    return [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize("max_norm", [0.07, 300.0])
def test_clipping_returns_the_norm_before(randn, max_norm):
    parameters = parameters_to_clip(randn)
    expected = torch.cat([gradient.flatten() for gradient in gradients_of(parameters)]).norm()
    torch.testing.assert_close(optim.clip_grad_norm_(parameters, max_norm), expected)


# --------------------------------------------------------------------------------------------------
# Clipping, property


def test_clipping_leaves_short_gradients_exactly_as_they_are(adapters, randn):
    parameters = parameters_to_clip(randn)
    before = [gradient.clone() for gradient in gradients_of(parameters)]
    norm = torch.cat([gradient.flatten() for gradient in before]).norm().item()
    adapters.run_gradient_clipping(parameters, 1.01 * norm)
    assert all(map(torch.equal, gradients_of(parameters), before))


def test_the_norm_of_no_gradient_is_zero():
    assert optim.clip_grad_norm_([], 0.5).item() == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clipping_refuses_what_is_not_finite_if_asked(randn, bad):
    parameters = parameters_to_clip(randn)
    parameters[0].grad[1, 2] = bad
    before = [gradient.clone() for gradient in gradients_of(parameters)]
    with pytest.raises(RuntimeError, match=f"must be finite, got {bad}; nothing was clipped"):
        optim.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    torch.testing.assert_close(gradients_of(parameters), before, rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------------------------------
# Schedule


@pytest.mark.parametrize("warmup_steps", [0, 4, 10])
def test_schedule_stays_within_bounds_at_any_step(warmup_steps):
    rates = [optim.cosine_schedule(step, 3.0, 0.5, warmup_steps, total_steps=10) for step in range(-1, 31)]
    assert all(0 <= rate <= 3.0 for rate in rates)
    assert all(rate >= 0.5 for rate in rates[warmup_steps + 1 :])


def test_schedule_snapshot(adapters, snapshot):
    rates = [adapters.run_get_lr_cosine_schedule(step, 3.0, 0.5, 7, 20) for step in range(25)]
    torch.testing.assert_close(torch.tensor(rates), snapshot("schedule")["lr"], **SNAPSHOT_TOLERANCE)
