"""`doctor plan`: memory by strategy, the batch that fits, the command.

Run alone: uv run pytest tests/test_plan.py; against measured peaks: uv run pytest -m slow tests/test_plan.py
"""

import dataclasses
import json

import pytest
import test_memory
from torch import profiler

from llm_basics.cli import subcommands
from llm_basics.core import config, model, trainer
from llm_basics.doctor import __main__ as doctor
from llm_basics.doctor import cards, plan
from llm_basics.training import activation_checkpointing, memory

SMALL = config.ModelConfig(vocab_size=300, context_length=32, d_model=64, n_layers=5, n_heads=4)
MARGIN = 0.15


@pytest.fixture
def preset(tmp_path):
    """A file with the options of a small model."""
    path = tmp_path / "small.yaml"
    shape = dataclasses.asdict(SMALL) | {"n_layers": 1}
    lines = [f"  {name}: {shape[name]}" for name in ("context_length", "d_model", "n_layers", "n_heads")]
    path.write_text("\n".join(["tokenizer: bytes", "model:", *lines, "train:", "  batch_size: 8"]))
    return str(path)


def options_of(**train):
    return config.Config(model=SMALL, train=config.TrainConfig(device="cpu", **train))


@pytest.mark.slow
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_more_blocks_and_batches_are_near_the_line_of_few(is_recomputed):
    needs = plan.needs(options_of(batch_size=8), is_recomputed)
    for batch, error in ((8, 0.05), (16, 0.1)):
        train = {"batch_size": batch, "activation_checkpointing": is_recomputed}
        direct = memory.trial(options_of(**train), trainer.make_optimizer, trainer.batch_loss)
        found = needs(batch)
        assert found.weights == direct.peak("training").parameters
        assert 0 < found.logits < found.activations
        evaluation = max(0, found.evaluation - found.activations)
        assert found.total - evaluation == pytest.approx(direct.peak("training").total, rel=error)


def test_devices_share_weights_by_strategy():
    one = plan.Need(4000, 4000, 8000, activations=500, logits=100, evaluation=300)
    options = options_of()
    whole, block, rest = plan.sizes(options)
    assert whole == model.TransformerLM(SMALL).n_parameters() == 5 * block + rest

    def on(parallel, offload=False):
        strategy = plan.Strategy(parallel, False, offload)
        return plan.spread(lambda batch: one, strategy, 4, options)(1)

    assert on("none") == one and one.total == 16500
    assert on("ddp") == dataclasses.replace(one, communication=4 * whole)
    shards, offloaded = on("fsdp2"), on("fsdp2", offload=True)
    assert (shards.weights, shards.gradients, shards.optimizer, shards.host) == (1000, 1000, 2000, 0)
    assert shards.communication == 4 * (rest + 2 * block) + 8 * max(rest, block)
    assert offloaded.host == 4000 and offloaded.total == shards.communication + 500
    assert offloaded.activations == shards.activations == one.activations


@pytest.mark.parametrize("usable", [99, 100, 110, 119, 120, 12345])
def test_the_largest_batch_fits_and_one_more_does_not(usable):
    def total(batch):
        return 90 + 10 * batch

    assert plan.largest_batch(total, usable) == max(0, (usable - 90) // 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "H1000"}, "unknown GPU H1000; did you mean H100?"),
        ({"gpus": 2}, "--gpu or --gpu_memory must be given for --gpus, got 2"),
        ({"config": "tine"}, "--config must be a preset"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        plan.make(subcommands.DoctorPlan(**options))


@pytest.mark.parametrize(
    ("largest", "batch", "accumulation"), [(100, 32, 1), (4, 16, 2), (3, 12, 3), (1, 4, 8)]
)
def test_the_command_keeps_the_tokens_of_a_step(largest, batch, accumulation):
    options = subcommands.DoctorPlan(config="tiny", gpus=4, gpu="L4")
    strategy = plan.Strategy("fsdp2", activation_checkpointing=True, offload=True)
    found = plan.command(options, options_of(batch_size=32), strategy, largest)
    assert found == (
        "uv run torchrun --nproc_per_node 4 -m llm_basics.train --config tiny --train.parallel fsdp2 "
        "--train.activation_checkpointing --train.offload "
        f"--train.batch_size {batch} --train.grad_accumulation_steps {accumulation}"
    )
    assert batch * accumulation >= 32 and batch // 4 <= largest
    assert plan.command(options, options_of(batch_size=32), strategy, 0) == ""


def test_speed_is_bound_by_products_or_links():
    options, none = options_of(batch_size=32), plan.Strategy("none", False)
    fast_link = cards.Card(80, 100, 1000, 1e6)

    def speed(strategy, n_gpus, card=fast_link):
        return plan.tokens_per_second(options, strategy, n_gpus, 8, card)

    one = speed(none, 1)
    assert one < 100e12 * plan.UTILIZATION / SMALL.flops_per_token
    ddp = plan.Strategy("ddp", False)
    assert 3.9 * one < speed(ddp, 4) < 4.01 * one
    # an all-reduce of float32 gradients sends and receives three quarters of them
    seconds = 8 * SMALL.n_parameters * 3 / 4 / 1e6
    slow_link = dataclasses.replace(fast_link, link=1e-3)
    assert speed(ddp, 4, slow_link) == pytest.approx(4 * 8 * SMALL.context_length / seconds, rel=0.01)
    assert 0.7 * one < speed(plan.Strategy("none", True), 1) < 0.9 * one
    assert plan.tokens_per_second(options, none, 1, 0, fast_link) is None
    assert speed(none, 1, cards.Card(24, 0, 0, 32)) is None


@pytest.mark.slow
def test_a_plan_for_gpus_and_for_this_cpu(preset, capsys, monkeypatch):
    assert doctor.main(subcommands.DoctorPlan(preset, gpus=2, gpu_memory=1.0, json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = [tuple(row["strategy"].values()) for row in found["rows"]]
    assert len(kinds) == len(set(kinds)) == 6 and found["usable"] == 0.9e9
    by_kind = dict(zip(kinds, found["rows"], strict=True))
    kept, recomputed = (by_kind[("ddp", on, False)]["need"]["activations"] for on in (False, True))
    assert recomputed < 0.7 * kept
    assert by_kind[("fsdp2", False, False)]["batch_size"] >= by_kind[("ddp", False, False)]["batch_size"]
    need = plan.Need(10**6, 10**6, 2 * 10**6, activations=10**7, logits=10**6, evaluation=1)
    monkeypatch.setattr(plan, "needs", lambda options, is_recomputed: lambda batch: need)
    assert doctor.main(subcommands.DoctorPlan(preset)) == 0
    text = capsys.readouterr().out
    assert "this CPU" in text and "arithmetic only" in text
    rows = [line.split() for line in text.split("\n\n")[1].splitlines()]
    assert [row[0] for row in rows] == ["strategy", "none", "recompute"]
    assert text.count("uv run python -m llm_basics.train") == 2


def measured_peak(options, monkeypatch):
    """Bytes of tensors at the peak of two training steps and an evaluation, as torch counts them."""
    original = model.TransformerLM

    def recomputing(shape):
        made = original(shape)
        activation_checkpointing.apply(made)
        return made

    if options.train.activation_checkpointing:
        monkeypatch.setattr(model, "TransformerLM", recomputing)
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        test_memory.train_steps(options, 2)
    monkeypatch.undo()
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("is_recomputed", [False, True])
@pytest.mark.parametrize("name", test_memory.SHAPES)
def test_agrees_with_measured_peaks(name, is_recomputed, monkeypatch):
    shape, batch_size = test_memory.SHAPES[name]
    settings = {"batch_size": batch_size, "activation_checkpointing": is_recomputed}
    options = test_memory.options_of(shape | {"n_heads": 4}, settings)
    planned = plan.needs(options, is_recomputed)(batch_size).total
    measured = measured_peak(options, monkeypatch)
    print(f"{name} {is_recomputed}: {planned / 1e6:.1f} MB planned, {measured / 1e6:.1f} measured")
    assert planned == pytest.approx(measured, rel=MARGIN)
