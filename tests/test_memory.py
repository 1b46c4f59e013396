"""The estimate of memory, against torch's own count and against what the system gave.

Alone: uv run pytest tests/test_memory.py; with the large ones: uv run pytest -m slow tests/test_memory.py
"""

import dataclasses
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import profiler

from llm_basics import swap
from llm_basics.cli import parse
from llm_basics.core import config, device, evaluate, model, trainer
from llm_basics.runs import checkpoint, process
from llm_basics.training import job, memory, setup

TESTS = Path(__file__).parent

SMALL = {"vocab_size": 300, "context_length": 32, "d_model": 64, "n_layers": 2, "n_heads": 4}
GPT2 = {"norm": "layer", "position": "learned", "ffn": "gelu_tanh", "bias": True, "tie_embeddings": True}


def options_of(shape, settings):
    return config.Config(
        model=config.ModelConfig(**shape), train=config.TrainConfig(device="cpu", warmup_steps=0, **settings)
    )


def train_steps(options, steps):
    """Build a model, train it on noise and evaluate it, as a session does."""
    shape, settings = options.model, options.train
    network = model.TransformerLM(shape)
    optimizer = trainer.make_optimizer(network, settings)

    def batches(n):
        return [
            (torch.randint(shape.vocab_size, (settings.batch_size, shape.context_length)),) * 2
            for _ in range(n)
        ]

    for step in range(1, steps + 1):
        trainer.train_step(network, optimizer, batches(settings.grad_accumulation_steps), step, settings)
    with device.precision(torch.device("cpu"), settings.dtype):
        evaluate.evaluate(network, batches(3), torch.ones(shape.vocab_size))
    return network, optimizer


def estimate_of(options):
    return memory.estimate(options, trainer.make_optimizer, trainer.batch_loss)


@pytest.fixture
def no_checkpoint(monkeypatch):
    """Estimates without the copies that a checkpoint takes, which are no tensors."""
    monkeypatch.setattr(memory, "COPIES", 0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize(
    "shape, settings",
    [
        ({}, {}),
        pytest.param({"vocab_size": 5000}, {"z_loss": 1e-4}, marks=pytest.mark.slow),
        pytest.param(
            {"n_kv_heads": 2, "qk_norm": True, "ffn": "relu2", "norm_placement": "post"},
            {},
            marks=pytest.mark.slow,
        ),
        ({**GPT2, "dropout": 0.1}, {"grad_accumulation_steps": 3}),
        pytest.param({"d_model": 512}, {"batch_size": 1}, marks=pytest.mark.slow),
        pytest.param({"vocab_size": 5000}, {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"zero_init": True}, {"optimizer": "muon"}, marks=pytest.mark.slow),
        ({"n_kv_heads": 2, "qk_norm": True}, {"fast": True}),
        pytest.param({**GPT2}, {"fast": True, "grad_accumulation_steps": 3}, marks=pytest.mark.slow),
    ],
    ids=["llama", "vocabulary", "variants", "gpt2", "wide", "bfloat16", "muon", "kernels", "kernels gpt2"],
)
def test_agrees_with_what_torch_counts(shape, settings, no_checkpoint, two_threads):
    settings = dict(settings)
    if settings.pop("fast", False):
        swap.use("fast")
        if "trainer.batch_loss" not in swap.fast_pieces():
            pytest.skip("there are no CPU training kernels for this machine")
        train_steps(
            options_of(SMALL | shape, {"batch_size": 4}), 1
        )  # kernels are compiled, which takes memory
    options = options_of(SMALL | shape, {"batch_size": 4} | settings)
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_steps(options, 2)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert estimate_of(options).total == pytest.approx(peak, rel=0.02)


def test_parts_are_what_they_are_called(no_checkpoint):
    options = options_of(SMALL | {"d_model": 256}, {"batch_size": 1, "grad_accumulation_steps": 2})
    estimate = estimate_of(options)
    size = 4 * model.TransformerLM(options.model, device="meta").n_parameters()
    assert estimate.parameters == size
    assert estimate.gradients == size
    assert 2 * size <= estimate.optimizer <= 2.5 * size  # the new moments of one weight beside the old
    assert estimate.total == size + size + estimate.optimizer + estimate.activations


def test_the_kernels_of_a_cpu_count_on_a_cpu_only(two_threads, monkeypatch):
    swap.use("fast")
    options = options_of(SMALL, {"batch_size": 4})
    if "trainer.batch_loss" not in swap.fast_pieces():
        pytest.skip("there are no CPU training kernels for this machine")
    by_torch = estimate_of(options_of(SMALL, {"batch_size": 4, "compile": "on"}))
    on_cpu = estimate_of(options)
    assert (on_cpu.heap, by_torch.heap) == (memory.HEAP_OF_KERNELS, memory.HEAP_OF_TORCH)
    assert on_cpu.total != by_torch.total and on_cpu.resident == round(on_cpu.heap * on_cpu.total)
    monkeypatch.setattr(device, "choose", lambda name: torch.device("cuda"))
    on_gpu = estimate_of(options)
    assert on_gpu.checkpoint == 0 and on_gpu.heap == 1 and on_gpu.total < on_cpu.total


def test_a_checkpoint_takes_copies_of_weights_and_optimizer():
    """Of a wide model and few tokens, they are the peak."""
    estimate = estimate_of(options_of(SMALL | {"d_model": 256}, {"batch_size": 1}))
    assert estimate.optimizer == 2 * estimate.parameters
    assert estimate.checkpoint == 2 * (estimate.parameters + estimate.optimizer)


@pytest.mark.slow
def test_activations_grow_with_the_batch(no_checkpoint):
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


def measure(options, pieces, folder):
    """The bytes by which this process grows while it trains, evaluates and saves, and the estimate."""
    process.tune_allocator()
    if pieces == "fast":
        swap.use("fast")
    shape = options.model
    small = dataclasses.replace(
        shape, vocab_size=64, context_length=8, d_model=16 * shape.n_heads, n_layers=1, d_ff=16
    )
    train_steps(dataclasses.replace(options, model=small), 2)
    before = status("VmRSS")
    network, optimizer = train_steps(options, 2)
    checkpoint.save_checkpoint(network, optimizer, 2, Path(folder) / "a.safetensors")
    return status("VmHWM") - before, estimate_of(options).resident


SHAPES = {
    "2x64": ({"vocab_size": 256, "context_length": 32, "n_layers": 2, "d_model": 64}, 256),
    "4x128": ({"vocab_size": 2000, "context_length": 64, "n_layers": 4, "d_model": 128}, 12),
    "4x192": ({"vocab_size": 5000, "context_length": 128, "n_layers": 4, "d_model": 192}, 8),
    "6x256": ({"vocab_size": 512, "context_length": 256, "n_layers": 6, "d_model": 256}, 8),
    "6x384": ({"vocab_size": 8000, "context_length": 128, "n_layers": 6, "d_model": 384}, 16),
    "8x512": ({"vocab_size": 4000, "context_length": 256, "n_layers": 8, "d_model": 512}, 4),
}


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measures glibc's heap through /proc")
@pytest.mark.parametrize("pieces", ["fast", "reference"])
@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_what_the_system_gave(name, pieces, tmp_path):
    """Within memory.ERROR, in a process of its own: the heap of this one has a past."""
    shape, batch_size = SHAPES[name]
    options = f"t.options_of({shape | {'n_heads': 4}}, {dict(batch_size=batch_size)})"
    done = subprocess.run(
        [sys.executable, "-c", f"import test_memory as t; print(*t.measure({options}, {pieces!r}, '.'))"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        check=True,
    )
    measured, estimated = map(int, done.stdout.split()[-2:])
    ratio = estimated / measured
    print(f"{name} {pieces}: {estimated / 1e6:.0f} MB estimated, {measured / 1e6:.0f} measured: {ratio:.2f}")
    assert 1 / memory.ERROR <= ratio <= memory.ERROR or abs(estimated - measured) < 10e6


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


LARGE = SMALL | {"d_model": 256, "context_length": 256, "n_layers": 5}


@pytest.fixture
def large():
    """Options of a run, and a lower bound of the estimate: five equal blocks, a vocabulary of 1."""
    options = options_of(LARGE, {"batch_size": 64})
    return options, estimate_of(options_of(LARGE | {"vocab_size": 1}, {"batch_size": 64})).resident


@pytest.mark.whole_run
@pytest.mark.parametrize(
    ("share", "is_refused"), [(0.75, True), pytest.param(0.85, False, marks=pytest.mark.slow), (1.5, False)]
)
def test_memory_short_beyond_doubt_is_refused_before_anything_is_allocated(
    large, share, is_refused, monkeypatch, capsys
):
    began = []
    options, total = large
    monkeypatch.setattr(memory, "available", lambda device: int(share * total))
    monkeypatch.setattr(setup, "begin", lambda *_: began.append(True) or sys.exit(9))
    before, seconds = status("VmHWM"), time.process_time()
    if is_refused:
        assert job.main(dataclasses.replace(options, fast="off")) == parse.NO_MEMORY and not began
        error = capsys.readouterr().err
        assert "training needs at least" in error and error.count("\n") == 1
        assert error.endswith("lower --train.batch_size\n") and time.process_time() - seconds < 5
        assert status("VmHWM") - before < total / 10
    else:
        with pytest.raises(SystemExit, match="9"):
            job.main(dataclasses.replace(options, fast="off"))
        assert began


@pytest.mark.slow
def test_the_estimate_of_many_blocks_takes_no_longer(large):
    """It is that of all of them, for equal blocks, or below."""
    options, total = large
    calls = []

    def estimate(given):
        calls.append(given.model.n_layers)
        return estimate_of(given)

    assert memory._of_few_blocks(options, estimate) == pytest.approx(total, rel=0.02) and calls == [2, 3]


@pytest.mark.parametrize("share", [0.75, 1.1, 1.5])
def test_between_certain_and_uncertain_is_a_warning(share, monkeypatch, tmp_path, capsys):
    """The estimate with the final vocabulary, which is known once the text is prepared."""
    (tmp_path / "text.txt").write_text("All is well that ends well.\n" * 60)
    options = dataclasses.replace(
        options_of(SMALL, {"batch_size": 2, "steps": 1, "eval_batches": 1, "sample_tokens": 2}),
        **{name: str(tmp_path / name) for name in ("data_dir", "run_dir")},
        data=str(tmp_path / "text.txt"),
        tokenizer="bytes",
        fast="off",
    )
    needed = 10**6
    free = iter([None])
    monkeypatch.setattr(setup, "estimate", lambda options: memory.Estimate(7, needed // 2, needed // 2, 0))
    monkeypatch.setattr(memory, "available", lambda device: next(free, int(share * needed)))
    status = job.main(options)
    out, error = capsys.readouterr()
    assert (status == parse.NO_MEMORY) == ("training needs at least" in error) == (share < 0.8)
    assert ("warning: about 1,000,000 bytes of memory are needed" in out) == (0.8 < share < 1.25)
