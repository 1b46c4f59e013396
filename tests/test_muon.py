"""Muon, the wsd schedule, and runs that train with them. Alone: uv run pytest tests/test_muon.py"""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from llm_basics import swap
from llm_basics.cli import parse
from llm_basics.core import config, model, optim, trainer
from llm_basics.fast import optim as fast_optim
from llm_basics.runs import checkpoint, run_dir
from llm_basics.training import job

STEPS = 5
OPTIONS = {"lr": 0.03, "momentum": 0.8, "weight_decay": 0.3}
# what bfloat16, of 8 bits, leaves of a direction: the length of the difference beside that of the direction
BFLOAT16_ERROR = 0.08
FLOAT64 = {"rtol": 1e-9, "atol": 1e-9}

# --------------------------------------------------------------------------------------------------
# The schedule that falls late


@pytest.mark.parametrize(
    "step, lr",
    [(-1, 0.0), (0, 0.0), (1, 0.75), (3, 2.25), (4, 3.0), (5, 3.0), (15, 3.0)]
    + [(16, 2.5), (17, 2.0), (19, 1.0), (20, 0.5), (21, 0.5), (60, 0.5)],
)
def test_wsd_by_hand(step, lr):
    assert optim.wsd_schedule(step, 3.0, 0.5, 4, total_steps=20, decay_steps=5) == pytest.approx(lr)


@pytest.mark.parametrize("warmup_steps", [0, 4, 20, 30])
def test_wsd_rises_stays_and_falls_within_bounds(warmup_steps):
    for decay in (0, 1, 5, 16, 20, 99):
        rates = [optim.wsd_schedule(step, 3.0, 0.5, warmup_steps, 20, decay) for step in range(-1, 61)]
        top = rates.index(max(rates))
        assert min(rates) >= 0 and max(rates) <= 3.0
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert set(rates[1 + max(20, warmup_steps) :]) == {0.5}
        assert warmup_steps >= 20 or rates[1 + warmup_steps] == 3.0


@pytest.mark.parametrize("warmup_steps, decay_steps", [(4, 5), (0, 5), (4, 99), (1, 19)])
def test_wsd_has_no_leaps(warmup_steps, decay_steps):
    rates = [optim.wsd_schedule(step, 3.0, 0.5, warmup_steps, 20, decay_steps) for step in range(61)]
    up = 3.0 / max(warmup_steps, 1)
    down = 2.5 / min(decay_steps, 20 - warmup_steps)
    leaps = [later - earlier for earlier, later in zip(rates, rates[1:], strict=False)]
    assert max(leaps) <= up + 1e-9 and min(leaps) == pytest.approx(-down)


def test_wsd_without_decay_falls_with_the_last_step_alone():
    rates = [optim.wsd_schedule(step, 3.0, 0.5, 2, total_steps=6, decay_steps=0) for step in range(8)]
    assert rates == [0.0, 1.5, 3.0, 3.0, 3.0, 3.0, 0.5, 0.5]


def test_wsd_does_not_know_before_its_decay_how_long_training_will_be():
    short, long = ([optim.wsd_schedule(s, 3.0, 0.5, 4, n, 5) for s in range(16)] for n in (20, 1000))
    assert short == long


def test_the_schedule_of_the_options_is_the_one_that_is_followed():
    options = config.TrainConfig(
        steps=20, lr=3.0, min_lr=0.5, warmup_steps=4, schedule="wsd", decay_fraction=0.25
    )
    rates = [trainer.learning_rate(step, options) for step in range(25)]
    assert rates == [optim.wsd_schedule(step, 3.0, 0.5, 4, 20, 5) for step in range(25)]
    cosine = dataclasses.replace(options, schedule="cosine")
    assert trainer.learning_rate(12, cosine) == optim.cosine_schedule(12, 3.0, 0.5, 4, 20)


# --------------------------------------------------------------------------------------------------
# Making matrices orthogonal


def matrix_of(randn, rows, cols, condition):
    """U, the singular values from 1 down to 1 / condition, and V^T of a random matrix."""
    rank = min(rows, cols)
    u, v = (torch.linalg.qr(randn(size, rank))[0] for size in (rows, cols))
    return u, torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64), v.T


SHAPES = pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (1, 5), (5, 1)], ids=str)


@SHAPES
@pytest.mark.parametrize("condition", [1, 10, 100, 1000])
def test_directions_stay_and_lengths_become_alike(randn, shape, condition):
    u, s, vt = matrix_of(randn, *shape, condition)
    found = u.T @ optim.orthogonalize(u * s @ vt, dtype=torch.float64) @ vt.T
    torch.testing.assert_close(found, torch.diag(found.diag()), **FLOAT64)
    # what is shorter than 1/500 of all together has no time to grow to full length, but grows
    is_long = s / s.norm() > 1 / 500
    assert found.diag()[is_long].min() > 0.68 and found.diag()[is_long].max() < 1.21
    assert (found.diag() > 100 * (s / s.norm()).clamp(max=1 / 200)).all()


@SHAPES
def test_directions_are_those_of_the_singular_value_decomposition(randn, shape):
    matrix = randn(*shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = optim.orthogonalize(matrix, dtype=torch.float64)
    lengths = torch.linalg.svdvals(found)
    assert 0.65 < lengths.min() and lengths.max() < 1.25
    # beside UV^T itself, whose singular values are 1
    assert torch.linalg.matrix_norm(found - u @ vt, 2) < 0.35


@SHAPES
def test_matrices_at_once_are_as_one_at_a_time(randn, shape):
    matrices = randn(2, 3, *shape)
    found = optim.orthogonalize(matrices, dtype=torch.float64)
    alone = [optim.orthogonalize(matrix, dtype=torch.float64) for matrix in matrices.flatten(0, 1)]
    torch.testing.assert_close(found.flatten(0, 1), torch.stack(alone))


def test_nothing_has_no_direction():
    matrices = torch.stack([torch.zeros(4, 6), torch.eye(4, 6)])
    found = optim.orthogonalize(matrices)
    assert torch.equal(found[0], torch.zeros(4, 6)) and found[1].diag().min() > 0.6


def test_length_does_not_matter(randn):
    matrix = randn(6, 9)
    expected = optim.orthogonalize(matrix, dtype=torch.float64)
    for scale in (1e-3, 7.0, 1e8):
        found = optim.orthogonalize(scale * matrix, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(optim.orthogonalize(-matrix, dtype=torch.float64), -expected)


def test_more_steps_are_more_of_the_polynomial(randn):
    s = torch.tensor([0.6, 0.3, 0.05], dtype=torch.float64)
    by_hand = s / (s.norm() + 1e-7)
    for steps in range(4):
        found = optim.orthogonalize(torch.diag(s), steps, torch.float64).diag()
        torch.testing.assert_close(found, by_hand, **FLOAT64)
        by_hand = 3.4445 * by_hand - 4.7750 * by_hand**3 + 2.0315 * by_hand**5


@SHAPES
def test_bfloat16_is_near_and_gives_the_dtype_that_it_got(randn, shape):
    matrix = randn(*shape).float()
    precise, rough = (optim.orthogonalize(matrix, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32 and not torch.equal(rough, precise)
    assert (rough - precise).norm() < BFLOAT16_ERROR * precise.norm()


# --------------------------------------------------------------------------------------------------
# One step


def test_update_by_hand():
    """Two matrices of one element: each direction is a sign, stretched by the polynomial."""
    parameter, gradient = torch.tensor([[[2.0]], [[-1.0]]]), torch.tensor([[[4.0]], [[-3.0]]])
    before = torch.tensor([[[-1.0]], [[10.0]]])
    found, buffer = optim.muon_update(parameter, gradient, before, lr=0.1, momentum=0.5, weight_decay=2.0)
    # 0.5 * -1 + 0.5 * 4 and 0.5 * 10 - 0.5 * 3
    assert buffer.flatten().tolist() == [1.5, 3.5]
    # mixed once more: 0.5 * 1.5 + 0.5 * 4 > 0 and 0.5 * 3.5 - 0.5 * 3 > 0
    one = 1.0
    for _ in range(5):
        one = 3.4445 * one - 4.7750 * one**3 + 2.0315 * one**5
    expected = torch.tensor([[[2.0 * 0.8 - 0.1 * 0.2 * one]], [[-1.0 * 0.8 - 0.1 * 0.2 * one]]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("now", "sign"), [(-1.0, -1.0), (-0.2, 1.0)])
def test_the_newest_gradient_counts_once_more(now, sign):
    """Of a mean 0.6 and a gradient -1 the mean is still positive; the mixture is not."""
    before, gradient = torch.tensor([[1.0]]), torch.tensor([[now]])
    options = {"lr": 1.0, "momentum": 0.8, "weight_decay": 0.0}
    found, buffer = optim.muon_update(torch.zeros(1, 1), gradient, before * 0.5, **options)
    assert buffer.item() == pytest.approx(0.4 + 0.2 * now) and buffer.item() > 0
    # 0.8 * 0.2 - 0.2 * 1 < 0, and 0.8 * 0.36 - 0.2 * 0.2 > 0
    assert math.copysign(1, -found.item()) == sign


@pytest.mark.parametrize("shape", [(3, 4), (6, 2)], ids=str)
def test_decay_shortens_the_weights_and_is_no_part_of_the_direction(randn, shape):
    weight = randn(*shape)
    still = optim.muon_update(weight, torch.zeros_like(weight), torch.zeros_like(weight), 0.1, 0.9, 2.0)[0]
    torch.testing.assert_close(still, 0.8 * weight)
    gradient = randn(*shape)
    steps = [
        optim.muon_update(weight, gradient, torch.zeros_like(weight), 0.1, 0.9, decay, torch.float64)[0]
        for decay in (0.0, 2.0)
    ]
    torch.testing.assert_close(steps[0] - steps[1], 0.2 * weight)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)], ids=str)
def test_elements_of_a_step_are_as_large_as_those_of_adamw(randn, shape):
    step = optim.muon_update(torch.zeros(*shape).double(), randn(*shape), randn(*shape), 1.0, 0.95, 0.0)[0]
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_update_is_pure(randn):
    tensors = [randn(2, 3, 4), randn(2, 3, 4), randn(2, 3, 4)]
    before = [tensor.clone() for tensor in tensors]
    optim.muon_update(*tensors, **OPTIONS)
    assert all(map(torch.equal, tensors, before))


# --------------------------------------------------------------------------------------------------
# The optimizer


def gradients_for(randn, *shapes, steps=STEPS):
    """For each step a gradient of each shape, of every size."""
    return [[randn(*shape) * 10 ** randn(1) for shape in shapes] for _ in range(steps)]


def go(optimizer, parameters, gradients):
    """The parameters after the last step."""
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype, copy=True)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def muon_by_numbers(weight, gradients, lr, momentum, weight_decay):
    """Muon by singular values: the polynomial is applied to them, not to matrices."""
    mean = torch.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        u, s, vt = torch.linalg.svd(momentum * mean + (1 - momentum) * gradient, full_matrices=False)
        s = s / (s.square().sum().sqrt() + 1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        step = 0.2 * max(weight.shape) ** 0.5 * (u @ torch.diag(s) @ vt)
        weight = weight - lr * weight_decay * weight - lr * step
    return weight


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)], ids=str)
def test_muon_is_what_its_formula_says(randn, shape):
    weight = nn.Parameter(randn(*shape))
    expected = weight.detach().clone()
    gradients = gradients_for(randn, shape)
    group = {"params": [weight], **OPTIONS}
    (found,) = go(optim.Muon([group], dtype=torch.float64), [weight], gradients)
    by_numbers = muon_by_numbers(expected, [one for (one,) in gradients], **OPTIONS)
    torch.testing.assert_close(found, by_numbers, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)], ids=str)
def test_muon_is_torch_s(randn, shape):
    """Which computes its directions in bfloat16."""
    ours, theirs = (nn.Parameter(weight) for weight in randn(2, *shape)[:1].float().repeat(2, 1, 1))
    before = ours.detach().clone()
    gradients = gradients_for(randn, shape)
    (found,) = go(optim.Muon([{"params": [ours], **OPTIONS}], dtype=torch.bfloat16), [ours], gradients)
    (expected,) = go(
        torch.optim.Muon([theirs], **OPTIONS, adjust_lr_fn="match_rms_adamw"), [theirs], gradients
    )
    assert (found - expected).norm() < BFLOAT16_ERROR * (expected - before).norm()


def test_groups_without_momentum_are_adamw_s_to_the_last_bit(randn):
    shapes = [(3, 4), (4,), (5, 6)]
    parameters = [nn.Parameter(randn(*shape)) for shape in shapes]
    alone = copy.deepcopy(parameters)
    gradients = gradients_for(randn, *shapes)
    others = {"betas": (0.7, 0.9), "eps": 1e-3}
    matrices = {"params": parameters[:1], **OPTIONS}
    muon = optim.Muon(
        [{"params": parameters[1:2], "weight_decay": 0.0}, matrices, {"params": parameters[2:], **others}],
        lr=0.1,
    )
    adamw = optim.AdamW(
        [{"params": alone[1:2], "weight_decay": 0.0}, {"params": alone[2:], **others}], lr=0.1
    )
    found = go(muon, parameters, gradients)
    expected = go(adamw, alone[1:], [step[1:] for step in gradients])
    assert all(map(torch.equal, found[1:], expected)) and not torch.equal(found[0], alone[0])
    assert set(muon.state[parameters[0]]) == {"momentum_buffer"}
    assert set(muon.state[parameters[1]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_matrices_of_one_shape_go_the_way_that_each_would_go_alone(randn):
    shapes = [(4, 6), (6, 4), (4, 6), (4, 6), (3, 3)]
    parameters = [nn.Parameter(randn(*shape)) for shape in shapes]
    gradients = gradients_for(randn, *shapes)
    alone = copy.deepcopy(parameters)
    found = go(optim.Muon([{"params": parameters, **OPTIONS}], dtype=torch.float64), parameters, gradients)
    for i, parameter in enumerate(alone):
        optimizer = optim.Muon([{"params": [parameter], **OPTIONS}], dtype=torch.float64)
        (expected,) = go(optimizer, [parameter], [[step[i]] for step in gradients])
        torch.testing.assert_close(found[i], expected, **FLOAT64)


def test_what_has_no_gradient_stays_as_it_is(randn):
    parameters = [nn.Parameter(randn(3, 4)) for _ in range(3)]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = optim.Muon([{"params": parameters, **OPTIONS}])
    found = go(optimizer, parameters, [[randn(3, 4), None, randn(3, 4)], [None, None, randn(3, 4)]])
    assert torch.equal(found[1], before[1]) and not optimizer.state[parameters[1]]
    once = go(optim.Muon([{"params": [p := nn.Parameter(before[1].clone())], **OPTIONS}]), [p], [[None]])
    assert torch.equal(once[0], before[1])


def test_parameters_change_in_place_and_gradients_never(randn):
    weight = nn.Parameter(randn(3, 4))
    weight.grad = gradient = randn(3, 4)
    address, before, kept = weight.data_ptr(), weight.detach().clone(), gradient.clone()
    optim.Muon([{"params": [weight], **OPTIONS}]).step()
    assert weight.data_ptr() == address and not torch.equal(weight, before)
    assert weight.grad is gradient and torch.equal(gradient, kept)


@pytest.mark.parametrize("way", ["state_dict", "checkpoint"])
def test_muon_goes_on_from_its_state_to_the_last_bit(randn, tmp_path, way):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.gain = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))

    def optimizer_of(two, **options):
        return optim.Muon([{"params": [two.matrix], "momentum": 0.8}, {"params": [two.gain]}], **options)

    gradients = gradients_for(randn, (3, 4), (4,))
    whole, first, second = Two(), Two(), Two()
    expected = go(optimizer_of(whole, lr=0.1), [*whole.parameters()], gradients)
    before = optimizer_of(first, lr=0.1)
    go(before, [*first.parameters()], gradients[:2])
    # every setting of the second is another, until the state is loaded
    after = optimizer_of(second, lr=9.0, weight_decay=9.0)
    if way == "checkpoint":
        checkpoint.save_checkpoint(first, before, 2, tmp_path / "c")
        checkpoint.load_checkpoint(tmp_path / "c", second, after)
    else:
        second.load_state_dict(first.state_dict())
        after.load_state_dict(copy.deepcopy(before.state_dict()))
    found = go(after, [*second.parameters()], gradients[2:])
    assert all(map(torch.equal, found, expected))


def test_muon_follows_the_rate_of_each_group(randn):
    weight, gain = nn.Parameter(randn(3, 4)), nn.Parameter(randn(4))
    optimizer = optim.Muon([{"params": [weight], **OPTIONS}, {"params": [gain]}])
    before = [weight.detach().clone(), gain.detach().clone()]
    optimizer.param_groups[0]["lr"] = 0.0
    found = go(optimizer, [weight, gain], [[randn(3, 4), randn(4)]])
    assert torch.equal(found[0], before[0]) and not torch.equal(found[1], before[1])
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        optim.Muon([weight], lr=-1.0)


def test_groups_with_momentum_are_of_matrices():
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(
            ValueError, match=r"must hold only matrices, got a parameter of shape \(.*; put it into"
        ):
            optim.Muon([{"params": iter([nn.Parameter(torch.ones(shape))]), "momentum": 0.9}])


# --------------------------------------------------------------------------------------------------
# The model's parameters

SHAPE = config.ModelConfig(vocab_size=257, context_length=16, d_model=32, n_layers=2, n_heads=2, qk_norm=True)
RICH = dataclasses.replace(SHAPE, norm="layer", ffn="gelu", bias=True, position="learned")
SETTINGS = config.TrainConfig(
    steps=6,
    batch_size=4,
    lr=1e-2,
    warmup_steps=2,
    log_every=1,
    sample_tokens=5,
    eval_batches=1,
    checkpoint_every=2,
    keep_checkpoints=0,
    device="cpu",
    optimizer="muon",
    schedule="wsd",
)


def names_by_group(lm, optimizer):
    """For each group its weight decay, its momentum and the names of its parameters."""
    names = {parameter: name for name, parameter in lm.named_parameters()}
    return [
        (group["weight_decay"], group.get("momentum"), [names[p] for p in group["params"]])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("shape", [SHAPE, RICH], ids=["llama", "gpt2"])
@pytest.mark.parametrize("tie", [False, True])
def test_matrices_of_blocks_go_to_muon_and_the_rest_to_adamw(shape, tie):
    lm = model.TransformerLM(dataclasses.replace(shape, tie_embeddings=tie))
    settings = dataclasses.replace(SETTINGS, momentum=0.9, weight_decay=0.2, betas=(0.7, 0.9), eps=1e-6)
    optimizer = trainer.make_optimizer(lm, settings)
    assert type(optimizer) is optim.Muon
    (decay, none, decayed), (zero, also_none, kept), (of_matrices, momentum, matrices) = names_by_group(
        lm, optimizer
    )
    assert (decay, zero, of_matrices, momentum, none, also_none) == (0.2, 0.0, 0.2, 0.9, None, None)
    projections = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "ffn.w1", "ffn.w2"]
    projections += ["ffn.w3"] if shape is SHAPE else []
    assert sorted(matrices) == sorted(f"layers.{i}.{name}.weight" for i in (0, 1) for name in projections)
    embeddings = {"token_embeddings.weight"} | (set() if tie else {"lm_head.weight"})
    if shape is RICH:
        embeddings.add("position_embeddings.weight")
    assert set(decayed) == embeddings
    assert sorted(matrices + decayed + kept) == sorted(name for name, _ in lm.named_parameters())
    assert {"layers.1.attn.q_norm.weight", "ln_final.weight"} <= set(kept)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.7, 0.9), 1e-6)


def test_frozen_parameters_are_left_out():
    lm = model.TransformerLM(SHAPE)
    lm.layers[0].requires_grad_(False)
    groups = names_by_group(lm, trainer.make_optimizer(lm, SETTINGS))
    assert not [name for _, _, names in groups for name in names if name.startswith("layers.0")]


@pytest.mark.parametrize("shape", [SHAPE, RICH], ids=["llama", "gpt2"])
def test_twins_train_the_same_by_muon(shape):
    after = []
    inputs = torch.arange(32).view(2, 16)
    for pieces in ("reference", "fast"):
        with swap.using("fast", lambda line: None) if pieces == "fast" else swap.restored():
            torch.manual_seed(0)
            lm = model.TransformerLM(shape)
            optimizer = trainer.make_optimizer(lm, SETTINGS)
            for group in optimizer.param_groups:
                group["eps"] = 1e-4  # where a gradient is rounding alone, its sign would count
            optimizer.dtype = torch.float32
            for step in range(1, 4):
                trainer.train_step(lm, optimizer, [(inputs, inputs + 1)], step, SETTINGS)
            after.append(lm.state_dict())
    for name, weight in after[0].items():
        torch.testing.assert_close(after[1][name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"momentum": 1.0}, "train.momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": -0.1}, "train.momentum must be at least 0 and below 1, got -0.1"),
        ({"momentum": math.nan}, "train.momentum must be at least 0 and below 1, got nan"),
        ({"decay_fraction": 1.1}, "train.decay_fraction must be at least 0 and at most 1, got 1.1"),
        ({"decay_fraction": -0.1}, "train.decay_fraction must be at least 0 and at most 1, got -0.1"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        config.TrainConfig(**wrong)


# --------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    return config.Config(
        data=str(text),
        tokenizer="bytes",
        data_dir=str(tmp_path / "data"),
        run_dir=str(tmp_path / "run"),
        model=dataclasses.replace(RICH, vocab_multiple=64, zero_init=True),
        train=SETTINGS,
    )


def losses(folder):
    return {m["step"]: m["train_loss"] for m in run_dir.read_metrics(folder) if "train_loss" in m}


def test_a_run_by_muon_goes_on_as_if_it_had_not_been_stopped(options, tmp_path):
    assert job.main(options) == 0
    whole = losses(options.run_dir)
    assert whole[6] < whole[1]
    rates = {m["step"]: m["lr"] for m in run_dir.read_metrics(options.run_dir) if "lr" in m}
    assert rates == pytest.approx({1: 0.005, 2: 0.01, 3: 0.01, 4: 0.01, 5: 0.01, 6: 0.001})
    expected = checkpoint.read_checkpoint(run_dir.checkpoints(options.run_dir)[0])[0]
    stopped = dataclasses.replace(options, run_dir=str(tmp_path / "stopped"))
    job.main(stopped)
    run_dir.checkpoints(stopped.run_dir)[0].unlink()
    torch.manual_seed(12345)
    assert job.main(parse.train_options(["--resume", stopped.run_dir])) == 0
    found = checkpoint.read_checkpoint(run_dir.checkpoints(stopped.run_dir)[0])[0]
    assert losses(stopped.run_dir) == whole and found.keys() == expected.keys()
    # the type checker of these tests draws from Python's generator
    assert {name for name in found if not torch.equal(found[name], expected[name])} <= {"rng.python"}


def test_a_run_by_one_optimizer_is_not_gone_on_with_by_the_other(options, capsys):
    job.main(dataclasses.replace(options, train=dataclasses.replace(SETTINGS, optimizer="adamw")))
    with pytest.raises(SystemExit):
        job.main(parse.train_options(["--resume", options.run_dir, "--train.optimizer=muon"]))
    assert "was trained with adamw, got --train.optimizer muon" in capsys.readouterr().err


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("n_threads, shape", [(1, (32, 32)), (2, (48, 16)), (2, (16, 48)), (3, (64, 80))])
def test_a_step_by_loops_is_the_reference(n_threads, shape, momentum, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    called = []
    monkeypatch.setattr(fast_optim, "muon_of_reference", lambda *arguments: called.append(arguments))
    try:
        weights = [[nn.Parameter(w.clone()) for w in torch.randn(5, *shape)] for _ in range(1)]
        weights.append([nn.Parameter(w.detach().clone()) for w in weights[0]])
        states = [[{} for _ in range(5)] for _ in weights]
        for _ in range(3):
            gradients = torch.randn(5, *shape)
            gradients[3] = 0
            for parameters, state, step in zip(weights, states, (optim, fast_optim), strict=True):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone()
                with torch.no_grad():
                    step.muon_step_(parameters, state, 0.1, momentum, 0.5, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert not called
    for mine, theirs, state, other in zip(*weights, *states, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other["momentum_buffer"], state["momentum_buffer"])


@pytest.mark.parametrize("shape", [(17, 32), (32, 9), (1024, 528)], ids=str)
def test_a_step_by_loops_is_left_to_torch_where_that_is_better(shape, monkeypatch):
    called = []
    monkeypatch.setattr(fast_optim, "muon_of_reference", lambda *arguments: called.append(arguments))
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.zeros(shape)
    n = torch.get_num_threads()
    fast_optim.muon_step_([weight] * n, [{} for _ in range(n)], 0.1, 0.9, 0.0, torch.float32)
    assert len(called) == 1


@pytest.mark.parametrize("shape", [(3, 20, 12), (2, 12, 20), (8, 8), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_directions_by_products_are_the_same(shape, steps):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = optim.orthogonalize(matrices.double(), steps)
    found = fast_optim.orthogonalize_fused(matrices, steps, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    rough = fast_optim.orthogonalize_fused(matrices, steps, torch.bfloat16)
    # five steps of a number of 8 bits: half a hundredth of the length of a direction, each
    torch.testing.assert_close(rough.double(), expected, rtol=0, atol=0.05)
