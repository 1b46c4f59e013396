"""Shared fixtures: the adapters under test, snapshots, random tensors and comparisons."""

import contextlib
import dataclasses
import gc
import json
import os
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Bytecode halves the imports of every process of the suite: write it, whatever the environment says.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jaxtyping
import numpy as np
import pytest
import torch
from matplotlib import figure
from torch import Tensor
from torch.nn import functional as tF

TESTS = Path(__file__).parent
ADAPTERS = str(TESTS / "adapters.py")

EXAMINER = pytest.StashKey[Any]()

# the longest files, longest first: the workers start with them and share the short ones at the end
LONGEST_FILES = [
    f"test_{name}"
    for name in (
        "lab_browser survival sft lr_finder mistakes triton sweep fast_generate shard_builder memory "
        "fast_tokenizer fast_bpe train warm_start generate learn fast_trainer tokenizer_commands "
        "compare_models chat_session steps vocabulary"
    ).split()
]
MAX_WORKERS = 4

# tests of whole programs, whose parts are tested alone: to check the shapes of each call takes five times the
# time of a small model, so it is done here with -m "slow or not slow"
WHOLE = {
    f"test_{name}"
    for name in (
        "chat_session disk compare_models families fast_generate fast_trainer lr_finder loggers generate "
        "post_training warm_start learn memory mistakes monitor muon probe sft survival sweep train "
        "diagnostics"
    ).split()
}

# no test loses power
os.fsync = lambda file: None

# beartype draws which elements of a list it checks: from a generator of its own, since checkpoints hold the
# state of the global one
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(random, "getrandbits", random.Random(0).getrandbits)
    import beartype  # noqa: F401

# tensors here are too small for several threads
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # read when Triton is imported: NumPy then runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--adapters", default=ADAPTERS, help="adapters file of the implementation to test")
    parser.addoption("--mine", help="Python file with your pieces to test")
    parser.addoption("--fast", action="store_true", help="test the pieces, on the fast implementations")
    parser.addoption("--report", help="write a report to this JSON file, and a Markdown page beside it")
    parser.addoption("--update-snapshots", action="store_true", help="regenerate tests/fixtures/snapshots")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute the files over worker processes (pytest-xdist), unless an option forbids or decides it."""
    option = config.option
    files = {argument.split("::")[0] for argument in config.args}
    is_one_file = len(files) == 1 and Path(*files).is_file()
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # pieces of other authors are graded in one process, which writes one report
    in_one_process = option.collectonly or option.usepdb or option.maxfail or option.update_snapshots
    in_one_process = in_one_process or option.mine or option.report or option.adapters != ADAPTERS
    has_xdist = config.pluginmanager.has_plugin("xdist") and "PYTEST_XDIST_WORKER" not in os.environ
    if has_xdist and option.numprocesses is None and not (is_one_file or in_one_process) and n_cpus > 1:
        option.numprocesses, option.dist = min(n_cpus, MAX_WORKERS), "loadfile"
        # the order is that of LONGEST_FILES
        option.loadscopereorder = False


def pytest_configure(config: pytest.Config) -> None:
    path = Path(config.getoption("--adapters"))
    if not path.is_file():
        raise pytest.UsageError(f"--adapters must be a Python file, got {path}")
    if config.getoption("--report") and not Path(config.getoption("--report")).resolve().parent.is_dir():
        raise pytest.UsageError(f"the folder of --report must exist, got {config.getoption('--report')}")
    if config.getoption("--update-snapshots"):
        runpy.run_path(str(TESTS / "fixtures" / "make_fixtures.py"), run_name="__main__")
    mine = config.getoption("--mine")
    if not mine and config.getoption("--adapters") == ADAPTERS:
        # from before the package is imported; not with user classes, whose types do not match the
        # annotations, nor for foreign code, which the reference is timed beside
        jaxtyping.install_import_hook(with_shapes(), "beartype.beartype")
    import examiner
    import trials

    from llm_basics import swap
    from llm_basics.learn import checks, sandbox

    try:
        if mine:
            with sandbox.time_limit(examiner.LIMIT_SECONDS), sandbox.unchanged_state():
                swap.use(mine, prepare=checks.check_shapes)
        if config.getoption("--fast"):
            swap.use("fast")
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    trials.set_from(config.option.markexpr)
    config.stash[EXAMINER] = examiner.Examiner(config)
    # as a plugin, since session fixtures are not of this folder alone
    config.pluginmanager.register(config.stash[EXAMINER])


def with_shapes() -> list[str]:
    """The modules whose signatures give shapes, but those of `learn`, which runs wrong code."""
    root = TESTS.parent
    sources = [path for path in (root / "llm_basics").rglob("*.py") if "jaxtyping" in path.read_text("utf-8")]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in sources]
    return [name for name in names if not name.startswith("llm_basics.learn.")]


def pytest_report_header(config: pytest.Config) -> list[str]:
    from llm_basics import swap

    return [f"pieces: {swap.describe()}"] if config.getoption("--mine") else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if config.stash[EXAMINER].is_grading or config.getoption("--fast"):
        # only tests that use pieces; of foreign code only the steps, which know what the contract promises
        fixtures = {"judged"} if config.stash[EXAMINER].is_foreign else {"adapters", "judged"}
        about_pieces = [item for item in items if fixtures & set(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=[item for item in items if item not in about_pieces])
        items[:] = about_pieces


def pytest_collection_finish() -> None:
    # what was imported and collected stays: automatic collections leave it out
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield from item.config.stash[EXAMINER].run(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    item.config.stash[EXAMINER].examine(item, call, report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[EXAMINER].write()


# --------------------------------------------------------------------------------------------------
# The implementation under test


@pytest.fixture(scope="session")
def adapters(pytestconfig: pytest.Config) -> Any:
    """The adapters of `--adapters`; a test that uses a missing one is skipped."""
    return pytestconfig.stash[EXAMINER].adapters


@pytest.fixture(scope="session")
def judged(pytestconfig: pytest.Config) -> Callable[[str], Any]:
    """The verdict on a step of the implementation under test."""
    return pytestconfig.stash[EXAMINER].judged


@pytest.fixture(scope="session")
def next_step(pytestconfig: pytest.Config) -> Callable[[str], str]:
    """The command to run next for a step that does not pass."""
    return pytestconfig.stash[EXAMINER].next_step


# --------------------------------------------------------------------------------------------------
# Inputs


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    # without a GPU, torch.manual_seed would record a traceback to seed one that appears later
    torch.manual_seed(0) if torch.cuda.is_available() else torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def checked_shapes(request: pytest.FixtureRequest) -> None:
    """Check the shapes in signatures, but in tests of whole programs only where all trials run."""
    import trials

    is_left_out = request.path.stem in WHOLE and not trials.is_full
    jaxtyping.config.update("jaxtyping_disable", is_left_out)


@pytest.fixture(autouse=True)
def restored_pieces() -> Iterator[None]:
    """Restore after each test the pieces that were in use before it."""
    from llm_basics import swap

    with swap.restored():
        yield


@pytest.fixture(autouse=True)
def short_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training runs without memory estimate, loss curve and garbage collection, unless marked `whole_run`."""
    if request.node.get_closest_marker("whole_run") or "llm_basics.training.setup" not in sys.modules:
        return
    from llm_basics.analysis import figures
    from llm_basics.runs import process
    from llm_basics.training import memory, setup

    # a collection goes through the objects of all tests: half the time of a short run
    monkeypatch.setattr(process, "gc_frozen", contextlib.nullcontext)
    monkeypatch.setattr(setup, "estimate", lambda options: memory.Estimate(1, 1, 1, 9))
    monkeypatch.setattr(figures, "plot_loss", lambda folder, unigram_entropy=None: Path(folder) / "loss.png")


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    """Normal random tensors in float64, the same in every run of the test."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def snapshot() -> Callable[[str], dict[str, Tensor]]:
    """Recorded inputs and results of an independent library."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(TESTS / "fixtures" / "snapshots" / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays}

    return load


@pytest.fixture
def untrained_run(tmp_path: Path) -> Callable[..., Path]:
    """Create a run directory with an untrained model and a byte tokenizer."""
    from llm_basics.core import config, model, tokenizer
    from llm_basics.runs import checkpoint, run_dir

    def make(name: str, specials: tuple[str, ...] = (), context_length: int = 64) -> Path:
        chosen = tokenizer.Tokenizer.byte_level(("<|endoftext|>", *specials))
        shape = config.ModelConfig(chosen.vocab_size, context_length, 16, 1, 2, d_ff=24)
        folder = tmp_path / name
        (folder / run_dir.CHECKPOINTS).mkdir(parents=True)
        options = config.Config(model=shape, train=config.TrainConfig(device="cpu"))
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(options)))
        chosen.save(folder / "tokenizer")
        lm = model.TransformerLM(shape)
        with torch.no_grad():  # far from uniform
            for parameter in lm.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        path = folder / run_dir.CHECKPOINTS / "step_00000000.safetensors"
        checkpoint.save_checkpoint(lm, torch.optim.SGD(lm.parameters()), 0, path)
        return folder

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[figure.Figure]:
    """The figures that are saved, for inspection."""
    figures: list[figure.Figure] = []
    savefig = figure.Figure.savefig

    def save(self: figure.Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(figure.Figure, "savefig", save)
    return figures


# --------------------------------------------------------------------------------------------------
# Comparisons


@pytest.fixture(params=["output", "gradients"])
def assert_matches(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare two functions of the same tensors: their outputs, then all gradients.

    The gradients are those of a random weighting of the output; with a plain sum, softmax has gradient 0.
    """

    def outputs_match(
        piece: Callable[..., Tensor],
        oracle: Callable[..., Tensor],
        rtol: float = 1e-5,
        atol: float = 1e-7,
        **tensors: Tensor,
    ) -> None:
        torch.testing.assert_close(piece(**tensors), oracle(**tensors), rtol=rtol, atol=atol)

    def gradients_match(
        piece: Callable[..., Tensor],
        oracle: Callable[..., Tensor],
        rtol: float = 1e-5,
        atol: float = 1e-7,
        **tensors: Tensor,
    ) -> None:
        actual, expected = gradients(piece, tensors), gradients(oracle, tensors)
        for name in expected:
            assert actual[name] is not None, f"no gradient reaches {name}; it was copied or detached"
            torch.testing.assert_close(
                actual[name],
                expected[name],
                rtol=rtol,
                atol=atol,
                msg=lambda m, n=name: f"gradient of {n}: {m}",
            )

    return outputs_match if request.param == "output" else gradients_match


def gradients(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    leaves = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in tensors.items()}
    output = function(**leaves)
    assert output.requires_grad, "the output has no gradient; it was detached"
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(output, list(wanted.values()), weighting, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


# --------------------------------------------------------------------------------------------------
# Oracles composed of torch functions


class Oracle:
    """RoPE, attention and SwiGLU, from torch functions."""

    @staticmethod
    def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
        """Each pair (2i, 2i+1) as a complex number, rotated by its angle."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        frequencies = theta ** -(torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
        angles = positions[..., None].to(x.dtype) * frequencies
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    @staticmethod
    def attention(
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        n_heads: int,
        theta: float | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Causal multi-head attention with the weights q, k, v and o, with RoPE if `theta` is given."""
        queries, keys, values = (
            tF.linear(x, w).unflatten(-1, (n_heads, -1)).transpose(-3, -2) for w in (q, k, v)
        )
        if theta is not None:
            positions = torch.arange(x.shape[-2]) if positions is None else positions.unsqueeze(-2)
            queries, keys = (Oracle.rope(t, positions, theta) for t in (queries, keys))
        mixed = tF.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return tF.linear(mixed.transpose(-3, -2).flatten(-2), o)

    @staticmethod
    def ffn(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        return tF.linear(tF.silu(tF.linear(x, w1)) * tF.linear(x, w3), w2)


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    return Oracle
