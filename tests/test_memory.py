"""The estimate of memory, against torch's own count and against what the system gave.

Alone: uv run pytest tests/test_memory.py; with the large ones: uv run pytest -m slow tests/test_memory.py
"""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import profiler

from llm_basics.cli import parse
from llm_basics.core import config, model, trainer
from llm_basics.training import job, memory, setup

SMALL = {"vocab_size": 300, "context_length": 32, "d_model": 64, "n_layers": 2, "n_heads": 4}
GPT2 = {"norm": "layer", "position": "learned", "ffn": "gelu_tanh", "bias": True, "tie_embeddings": True}


def options_of(shape, settings):
    return config.Config(
        model=config.ModelConfig(**shape), train=config.TrainConfig(device="cpu", warmup_steps=0, **settings)
    )


def train_steps(options, steps):
    """Build a model and train it on noise, as a session does."""
    shape, settings = options.model, options.train
    network = model.TransformerLM(shape)
    optimizer = trainer.make_optimizer(network, settings)
    for step in range(1, steps + 1):
        batches = [
            tuple(torch.randint(shape.vocab_size, (settings.batch_size, shape.context_length)).chunk(1) * 2)
            for _ in range(settings.grad_accumulation_steps)
        ]
        trainer.train_step(network, optimizer, batches, step, settings)


def estimate_of(options):
    return memory.estimate(options, trainer.make_optimizer, trainer.batch_loss)


# --------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize(
    "shape, settings",
    [
        ({}, {}),
        pytest.param({"vocab_size": 5000}, {"z_loss": 1e-4}, marks=pytest.mark.slow),
        ({"n_kv_heads": 2, "qk_norm": True, "ffn": "relu2", "norm_placement": "post"}, {}),
        ({**GPT2, "dropout": 0.1}, {"grad_accumulation_steps": 3}),
        pytest.param({"d_model": 512}, {"batch_size": 1}, marks=pytest.mark.slow),
        pytest.param({"vocab_size": 5000}, {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        ({"zero_init": True}, {"optimizer": "muon"}),
    ],
    ids=["llama", "vocabulary", "variants", "gpt2", "wide", "bfloat16", "muon"],
)
def test_agrees_with_what_torch_counts(shape, settings):
    options = options_of(SMALL | shape, {"batch_size": 4} | settings)
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_steps(options, 2)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert estimate_of(options).total == pytest.approx(peak, rel=0.02)


def test_parts_are_what_they_are_called():
    options = options_of(SMALL | {"d_model": 256}, {"batch_size": 1, "grad_accumulation_steps": 2})
    estimate = estimate_of(options)
    size = 4 * model.TransformerLM(options.model, device="meta").n_parameters()
    assert estimate.parameters == size
    assert estimate.gradients == size
    assert 2 * size <= estimate.optimizer <= 2.5 * size  # the new moments of one weight beside the old
    assert estimate.total == size + size + estimate.optimizer + estimate.activations


def test_activations_grow_with_the_batch():
    two, four, six = (estimate_of(options_of(SMALL, {"batch_size": n})).activations for n in (16, 32, 48))
    assert six - four == pytest.approx(four - two, rel=0.01)


def test_a_model_of_many_gigabytes_takes_none():
    shape = {"vocab_size": 50000, "context_length": 256, "d_model": 8192, "n_layers": 2, "n_heads": 64}
    estimate_of(options_of(SMALL, {}))  # what is imported is imported
    before = status("VmHWM")
    estimate = estimate_of(options_of(shape, {}))
    assert estimate.parameters > 7e9 and estimate.total > 2.8e10
    assert status("VmHWM") - before < 1e8


def test_random_numbers_go_on_as_if_nothing_had_been_asked():
    state = torch.get_rng_state()
    estimate_of(options_of(SMALL | {"dropout": 0.1}, {}))
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------
# What the system gave


def status(key):
    """A size of this process in bytes, as Linux tells it."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return 1024 * int(line.split()[1])


def measure(options):
    """How far the memory of this process rises while it trains, in bytes."""
    torch.set_num_threads(1)
    shape = options.model
    small = dataclasses.replace(
        shape, vocab_size=64, context_length=8, d_model=8 * shape.n_heads, n_layers=1, d_ff=16
    )
    train_steps(dataclasses.replace(options, model=small), 3)
    before = status("VmRSS")
    train_steps(options, 3)
    return status("VmHWM") - before


MEDIUM = {"vocab_size": 2000, "context_length": 128, "d_model": 192, "n_layers": 4, "n_heads": 4}
CASES = [
    *(
        pytest.param(MEDIUM | shape, settings, id=name, marks=pytest.mark.slow)
        for name, shape, settings in [
            ("medium", {}, {"batch_size": 6}),
            ("vocabulary", {"vocab_size": 32000, "d_model": 256, "n_layers": 2}, {"batch_size": 6}),
            (
                "deep",
                {"vocab_size": 512, "d_model": 128, "n_layers": 24, "n_kv_heads": 2, "qk_norm": True},
                {"batch_size": 8},
            ),
            (
                "wide",
                {"context_length": 64, "d_model": 1536, "n_layers": 2, "ffn": "relu2"},
                {"batch_size": 2},
            ),
            (
                "long",
                {"vocab_size": 512, "context_length": 1024, "d_model": 128, "n_layers": 3},
                {"batch_size": 2},
            ),
            (
                "gpt2",
                {"vocab_size": 8000, "d_model": 384, "n_layers": 6, "n_heads": 6, "dropout": 0.1, **GPT2},
                {"batch_size": 8, "grad_accumulation_steps": 3},
            ),
        ]
    ),
]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measures glibc's heap through /proc")
@pytest.mark.parametrize("shape, settings", CASES)
def test_agrees_with_what_the_system_gave(shape, settings):
    """Within 20%; where each tensor is a mapping of its own, so that a heap leaves no holes between them."""
    # a process of its own: the heap of this one has a past
    program = f"import test_memory as t; print(t.measure(t.options_of({shape!r}, {settings!r})))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        check=True,
    )
    estimated = estimate_of(options_of(shape, settings)).total
    ratio = estimated / int(done.stdout)
    print(f"{estimated / 1e6:.0f} MB estimated, {int(done.stdout) / 1e6:.0f} measured: {ratio:.2f}")
    assert 0.8 <= ratio <= 1.2


# --------------------------------------------------------------------------------------------------
# What is said, and what there is


def test_the_strongest_option_is_named_first():
    weights = memory.Estimate(10**9, 10**9, 2 * 10**9, 10**8)
    activations = memory.Estimate(10**7, 10**7, 2 * 10**7, 10**9)
    options = options_of(SMALL, {"batch_size": 4})
    lines = [memory.describe(e, options).splitlines() for e in (weights, activations)]
    assert [text[2].split()[0] for text in lines] == ["--model.d_model", "--train.batch_size"]
    # a terminal of 80 columns breaks no option
    assert all(len(line) < 80 for text in lines for line in text[1:])
    assert "batch_size" not in memory.describe(weights, options_of(SMALL, {"batch_size": 1}))
    assert "4.1 GB of tensors at the peak: 1.0 parameters, 1.0 gradients" in memory.describe(weights, options)
    # no advice where memory suffices, or where the free memory is unknown
    assert all(memory.describe(weights, options, free).count("\n") == 0 for free in (10**10, None))


def test_available_is_below_what_the_machine_has():
    there = memory.available(torch.device("cpu"))
    assert there is None or 0 < there < 2**50
    assert memory.available(torch.device("meta")) is None


def test_the_tightest_control_group_counts(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (inner.parent, "1000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("600\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    assert memory._left_in_groups(tmp_path, "0::/a/b\n") == [500]
    old = tmp_path / "memory" / "c"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("900\n")
    (old / "memory.usage_in_bytes").write_text("600\n")
    assert memory._left_in_groups(tmp_path, "4:cpu,memory:/c\n3:cpuset:/\n") == [300]


@pytest.mark.parametrize(
    ("shape", "settings", "said"),
    [
        ({"d_model": 1_000_000, "n_heads": 5}, {}, "lower --model.d_model or --model.n_layers"),
        ({"n_layers": 1_000_000}, {}, "lower --model.d_model or --model.n_layers"),
        (SMALL, {"batch_size": 1_000_000_000}, "lower --train.batch_size"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_before_anything_is_allocated(
    shape, settings, said, monkeypatch, capsys
):
    monkeypatch.setattr(setup, "begin", lambda *_: pytest.fail("began"))
    assert job.main(options_of(shape, settings)) == parse.NO_MEMORY
    error = capsys.readouterr().err
    assert "training needs at least" in error and error.count("\n") == 1 and error.endswith(f"{said}\n")
