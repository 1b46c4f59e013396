"""The Triton kernels, against the reference in float64. Alone: `uv run pytest tests/test_triton.py`.

On a card the kernels run there; elsewhere NumPy runs them, in Triton's interpreter. What that cannot say is
whether they compile, so they are compiled too, which needs no card.

In float32, outputs and gradients are right to 1e-5 of themselves or of 1; in half precision to some steps of
the dtype, since inputs are rounded before and results after, but never between.
"""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.core import config, generate, model
from llm_basics.core import functional as F
from llm_basics.fast import generate as fast_generate
from llm_basics.fast import trainer

SMALL = config.ModelConfig(vocab_size=50, context_length=9, d_model=16, n_layers=1, n_heads=2)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

triton = pytest.importorskip("triton", reason="there is no Triton for this system")

from llm_basics.fast.cuda import (  # noqa: E402
    availability,
    cross_entropy,
    cuda_graph,
    decode,
    triton_jit,
)

OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
if triton_jit.INTERPRETED and OLD and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    # the interpreter converts one-element arrays to integers, which NumPy no longer does
    pytest.skip("the interpreter of Triton 3.6 needs NumPy below 2.4", allow_module_level=True)

# twice the precision of a dtype
HALVES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
EXACT = {"rtol": 1e-5, "atol": 1e-5}

slow = pytest.mark.slow


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Seeded normal random numbers."""
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)


# --------------------------------------------------------------------------------------------------
# Cross-entropy


def ids(vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)


def assert_replaced(logits: Tensor, targets: Tensor, vocab_size: int | None = None, **options: Any) -> None:
    """Compare losses, and the gradients that replace `logits`, with the reference in float64."""
    vocab_size = vocab_size or logits.shape[-1]
    wide = logits[:, :vocab_size].double().requires_grad_()
    losses = F.cross_entropy(wide, targets, **options, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), wide)
    found = cross_entropy.replace_by_gradient_(logits, targets, vocab_size, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), losses, **EXACT)
    tolerance = HALVES.get(logits.dtype, 1e-5)
    torch.testing.assert_close(logits[:, :vocab_size].double(), gradient, rtol=tolerance, atol=tolerance)
    assert not logits[:, vocab_size:].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("vocab_size", "width"), [(50, 64), (4097, 4097), (5000, 5056)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_logits_are_replaced_by_gradients(normal, dtype, vocab_size, width, z_loss):
    logits, targets = (3 * normal(5, width)).to(dtype), ids(vocab_size, 5)
    targets[2] = -100
    assert_replaced(logits, targets, vocab_size, z_loss=z_loss)
    assert not logits[2].any()


@pytest.mark.parametrize("vocab_size", [1, 2, 4096, 70_001])
def test_cross_entropy_of_a_vocabulary(normal, vocab_size):
    assert_replaced(3 * normal(3, vocab_size), ids(vocab_size, 3))


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_cross_entropy_ignores_targets(normal, ignore_index):
    targets = ids(5000, 7)
    targets[2] = ignore_index
    assert_replaced(3 * normal(7, 5000), targets, ignore_index=ignore_index, z_loss=0.1)
    logits, targets = normal(3, 50), torch.full((3,), ignore_index, device=DEVICE)
    assert_replaced(logits, targets, ignore_index=ignore_index, z_loss=0.1)
    assert not logits.any()


def test_cross_entropy_of_large_logits(normal):
    # nearly equal logits, whose differences are exact in float32
    logits = (16 * normal(5, 20)).round() / 16
    for offset in (1e4, -1e4):
        assert_replaced(logits + offset, ids(20, 5))
    assert_replaced(1e4 * normal(5, 6000), ids(6000, 5))


@pytest.mark.parametrize("reverse", [False, True])
def test_cross_entropy_finds_the_peak_wherever_it_is(reverse):
    logits = torch.linspace(-50, 50, 9000, device=DEVICE).repeat(2, 1)
    assert_replaced(logits.flip(-1) if reverse else logits, ids(9000, 2))


def test_cross_entropy_of_impossible_tokens(normal):
    logits = normal(4, 10_000)
    logits[:, :4500] = -torch.inf
    logits[:, 9000:] = -torch.inf
    assert_replaced(logits, ids(4000, 4) + 4800)


@pytest.mark.parametrize("target", [-1, 60, 10**9])
def test_cross_entropy_of_no_id_is_nan(normal, target):
    targets = torch.tensor([0, target], device=DEVICE)
    losses = cross_entropy.replace_by_gradient_(normal(2, 60), targets, 60)
    assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize("changes", [{}, {"vocab_multiple": 64}, {"tie_embeddings": True}], ids=str)
def test_the_kernels_loss_matches(monkeypatch, changes):
    lm = model.TransformerLM(dataclasses.replace(SMALL, **changes)).to(DEVICE)
    targets = ids(50, 3, 9)
    targets[1, 2:5] = -100
    monkeypatch.setitem(trainer.MAX_LOGITS, DEVICE.type, 200)
    monkeypatch.setattr(trainer, "MIN_ROWS", 1)
    # which takes another code path
    monkeypatch.setattr(trainer.cpu_trainer, "learner_for", lambda *_: None)
    replace, pieces, found = cross_entropy.replace_by_gradient_, [], []
    monkeypatch.setattr(
        cross_entropy, "replace_by_gradient_", lambda *a: pieces.append(len(a[1])) or replace(*a)
    )
    for module in (None, cross_entropy):
        monkeypatch.setattr(trainer, "kernels_for", lambda lm, rows, module=module: module)
        loss = trainer.batch_loss(lm, ids(50, 3, 9), targets, 0.01)
        found.append([loss.detach(), *torch.autograd.grad(0.7 * loss, list(lm.parameters()))])
    n_rows = trainer.KERNEL_LOGITS_FACTOR * (200 // lm.config.padded_vocab_size)
    assert pieces == [n_rows] * (27 // n_rows) + [27 % n_rows]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_kernels_are_for_a_card_and_a_plain_output_projection():
    lm = model.TransformerLM(SMALL).to(DEVICE)
    rows = torch.zeros(3, SMALL.d_model, device=DEVICE)
    assert trainer.kernels_for(lm, rows) is (cross_entropy if DEVICE.type == "cuda" else None)
    assert trainer.has_plain_head(lm)
    with swap.replaced({"functional.linear": tF.linear}):
        assert not trainer.has_plain_head(lm)
    lm.lm_head = torch.nn.Linear(16, 50)
    assert not trainer.has_plain_head(lm)


def test_a_card_for_which_triton_does_not_work(monkeypatch, capsys):
    device = torch.device("cuda:7")  # used in no other test
    said = []

    def fails(place: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nand more")

    monkeypatch.setattr(triton_jit, "check_device", fails)
    for _ in range(2):
        assert not availability.has_triton(device)
        said.append(capsys.readouterr().err)
    assert "cuda:7 (Failed to find C compiler.)" in said[0] and not said[1]


def test_a_kernel_can_be_tried_out(monkeypatch):
    triton_jit.check_device(DEVICE)
    monkeypatch.setattr(triton_jit, "_add_one", {(1,): lambda number: None})
    with pytest.raises(RuntimeError, match="must give 1, got 0"):
        triton_jit.check_device(DEVICE)


# --------------------------------------------------------------------------------------------------
# Decoding

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {
        **{"norm": "layer", "position": "learned", "ffn": "gelu_tanh", "bias": True, "init": "gpt2"},
        **{"tie_embeddings": True, "vocab_multiple": 64},
    },
    "grouped, with normalized heads": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "ffn": "silu"},
    "heads alone normalized": {"norm": "none", "qk_norm": True, "norm_eps": 0.1, "position": "none"},
    "nothing normalized": {"norm": "none", "position": "none", "ffn": "gelu"},
    "odd sizes": {"d_model": 36, "n_heads": 3, "d_ff": 50, "ffn": "relu2", "norm": "layer"},
    "large": {"d_model": 320, "n_heads": 2, "context_length": 100, "vocab_size": 5000},
}
OTHER_MODELS = [name for name in MODELS if name not in ("gpt2", "odd sizes")]


def make_model(name: str) -> model.TransformerLM:
    shape = {"vocab_size": 50, "context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 2}
    torch.manual_seed(7)
    lm = model.TransformerLM(config.ModelConfig(**(shape | MODELS[name]))).to(DEVICE)
    with torch.no_grad():
        for parameter in lm.parameters():
            # norms and biases away from their initial values
            parameter += 0.2 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(8)).to(
                DEVICE
            )
    return lm.eval()


def reader_of(lm: model.TransformerLM) -> Any:
    reader = cuda_graph.StaticStep(lm)
    assert reader.kernels is (decode if DEVICE.type == "cuda" else None)
    reader.kernels = decode
    return reader


@pytest.mark.parametrize("n_tokens", [4, pytest.param(24, marks=slow)])
@pytest.mark.parametrize("name", ["gpt2", "odd sizes", *(pytest.param(n, marks=slow) for n in OTHER_MODELS)])
def test_scores_of_each_token(name, n_tokens):
    lm = make_model(name)
    reader, text = reader_of(lm), ids(lm.config.vocab_size, n_tokens if name != "large" else 5)
    with torch.no_grad():
        expected = lm(text)
        found = [reader.read_prompt(text[:3]).clone()]
    found += [reader.read_token(int(text[i]), i).clone() for i in range(3, len(text))]
    assert expected.std() > 0.2
    torch.testing.assert_close(torch.stack(found), expected[2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "n"), [("llama", 4), pytest.param("llama", 22, marks=slow), pytest.param("gpt2", 22, marks=slow)]
)
def test_the_likeliest_tokens_one_after_the_other(name, n, monkeypatch):
    monkeypatch.setattr(cuda_graph, "TOKENS_PER_SYNC", 2)
    lm = make_model(name)
    prompt = ids(50, 3)
    expected = list(generate.generate(lm, prompt, n, temperature=0.0))
    monkeypatch.setattr(fast_generate, "CPUDecoder", reader_of)
    assert list(fast_generate.generate(lm, prompt, n, temperature=0.0)) == expected
    # the stop token is not yielded
    stop = expected[n // 2]
    until = list(fast_generate.generate(lm, prompt, n, temperature=0.0, stop_id=stop))
    assert until == expected[: expected.index(stop)]


@slow
def test_equals_are_left_to_the_reference(monkeypatch):
    lm, prompt = make_model("llama"), ids(50, 3)
    with torch.no_grad():
        # each token has an equally likely one
        lm.lm_head.weight[25:] = lm.lm_head.weight[:25]
    expected = list(generate.generate(lm, prompt, 4, temperature=0.0))
    monkeypatch.setattr(fast_generate, "CPUDecoder", reader_of)
    assert reader_of(lm).greedy_tokens(7, 0, 5) == []
    assert list(fast_generate.generate(lm, prompt, 4, temperature=0.0)) == expected


def test_a_token_is_chosen_where_it_is_clear():
    for scores, likeliest in (
        ([1.0, 3.0, 2.9, 2.0], 1),
        ([-5.0, -4.0], 1),
        ([0.5], 0),
        ([-math.inf, -math.inf, 0.0], 2),
        ([*range(4096), 4096.0, 7.0], 4096),
        ([7.0, *range(5000)], 5000),
        # ties and near ties, in one block or in two
        ([1.0, 3.0, 3.0, 2.0], -1),
        ([3.0 + 5e-6, 3.0], -1),
        ([9.0, *[0.0] * 5000, 9.0], -1),
        ([9.0, *[0.0] * 5000, 9.0 - 5e-6], -1),
        # non-finite scores
        ([1.0, math.nan, 2.0], -1),
        ([math.inf, 1.0], -1),
        ([-math.inf, -math.inf], -1),
    ):
        token, position = (torch.tensor([n], device=DEVICE) for n in (9, 2))
        written = torch.full((5,), 7, device=DEVICE)
        decode.choose(torch.tensor(scores, device=DEVICE), token, position, written)
        assert written.tolist() == [7, 7, 7, likeliest, 7] and position.item() == 3, scores[:3]
        # an id that the next step can look up
        assert 0 <= token.item() < len(scores) and (likeliest < 0 or token.item() == likeliest)


def test_unsupported_models_use_their_modules():
    assert cuda_graph.is_supported(model.TransformerLM(SMALL))
    for changes in (
        {"norm_placement": "post"},
        {"d_model": 18, "position": "learned"},
    ):
        lm = model.TransformerLM(dataclasses.replace(SMALL, **changes)).to(DEVICE)
        assert not cuda_graph.is_supported(lm), changes
        reader = cuda_graph.StaticStep(lm)
        assert reader.kernels is None and reader.greedy_tokens(1, 0, 3) == []
    assert not cuda_graph.is_supported(model.TransformerLM(SMALL, dtype=torch.bfloat16))


@slow
def test_kernels_compile(tmp_path, monkeypatch):
    program = Path(__file__).parent / "fixtures" / "compile_kernels.py"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    environment = {**os.environ, "PYTHONPATH": str(program.parents[2]), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, program, "all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_on_a_card_as_torch_has_it(normal):
    logits, targets = normal(1024, 50_257).bfloat16(), ids(50_257, 1024)
    wide = logits.float().requires_grad_()
    losses = tF.cross_entropy(wide, targets, reduction="none")
    (right,) = torch.autograd.grad(losses.sum(), wide)
    found = cross_entropy.replace_by_gradient_(logits, targets, 50_257)
    torch.testing.assert_close(found, losses, **EXACT)
    torch.testing.assert_close(logits.float(), right, rtol=1.6e-2, atol=1.6e-2)


@pytest.mark.gpu
def test_on_a_card_with_more_elements_than_31_bits():
    logits = torch.zeros(45_000, 50_000, dtype=torch.float16, device=DEVICE)
    logits[-1, -1] = 5.0
    last, targets = logits[-1].float(), torch.full((45_000,), 49_999, device=DEVICE)
    losses = cross_entropy.replace_by_gradient_(logits, targets, 50_000)
    torch.testing.assert_close(losses[-1], F.cross_entropy(last, targets[-1]))
