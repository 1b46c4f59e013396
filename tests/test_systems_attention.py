"""Online softmax and FlashAttention by hand. Alone: `uv run pytest tests/test_systems_attention.py`."""

import math

import grading
import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.learn import checks, judge, sockets, stubs
from llm_basics.systems import activation_checkpointing, flash_attention, online_softmax

try:
    import triton
    from triton import language as tl
except ModuleNotFoundError:
    triton = tl = None

EXACT = {"rtol": 1e-10, "atol": 1e-10}
attention = flash_attention.FlashAttention.apply

# queries, keys: none is a multiple of the tile but the last
LENGTHS = [(1, 1), (37, 70), (70, 37), (31, 33), (64, 64)]
each_length = pytest.mark.parametrize("n_queries, n_keys", LENGTHS)
causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


# --------------------------------------------------------------------------------------------------
# Online softmax


@pytest.mark.parametrize("size", [1, 7, 50])
def test_online_softmax_is_softmax(randn, size):
    scores, values = 5 * randn(3, 50), randn(3, 50, 4)
    log_sum = online_softmax.log_sum_exp(scores.split(size, -1))
    torch.testing.assert_close(log_sum, scores.logsumexp(-1), **EXACT)
    torch.testing.assert_close((scores - log_sum[:, None]).exp(), scores.softmax(-1), **EXACT)
    mixed = online_softmax.online_weighted_sum(scores.split(size, -1), values.split(size, -2))
    torch.testing.assert_close(mixed, (scores.softmax(-1)[:, None] @ values)[:, 0], **EXACT)


def test_the_statistics_do_not_depend_on_the_tiles(randn):
    scores = 5 * randn(3, 50)
    whole = online_softmax.online_softmax([scores])
    for sizes in ([50 - 1, 1], [1, 50 - 1], [10, 0 + 30, 10]):
        parts = online_softmax.online_softmax(scores.split(sizes, -1))
        assert torch.equal(parts[0], whole[0])
        torch.testing.assert_close(parts[1], whole[1], **EXACT)


def test_a_shift_of_the_scores_moves_the_maximum_alone(randn):
    scores = randn(3, 12)
    peak, total = online_softmax.online_softmax(scores.split(5, -1))
    shifted = online_softmax.online_softmax((scores + 1e6).split(5, -1))
    torch.testing.assert_close(shifted[0] - 1e6, peak, rtol=0, atol=1e-9)
    torch.testing.assert_close(shifted[1], total, rtol=1e-8, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# FlashAttention in PyTorch


@causal
@each_length
def test_flash_attention_is_attention(randn, assert_matches, n_queries, n_keys, is_causal):
    tensors = {"q": randn(2, n_queries, 8), "k": randn(2, n_keys, 8), "v": randn(2, n_keys, 6)}
    assert_matches(
        lambda q, k, v: attention(q, k, v, is_causal),
        lambda q, k, v: tF.scaled_dot_product_attention(q, k, v, is_causal=is_causal),
        **EXACT,
        **tensors,
    )


def test_several_leading_axes_are_batches(randn):
    q, k, v = randn(2, 3, 40, 8), randn(2, 3, 50, 8), randn(2, 3, 50, 8)
    each = [
        attention(*one, True) for one in zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True)
    ]
    torch.testing.assert_close(attention(q, k, v, True), torch.stack(each).unflatten(0, (2, 3)), **EXACT)


def test_a_later_token_has_no_gradient(randn):
    q, k, v = (randn(1, 70, 8).requires_grad_() for _ in range(3))
    for query in (1, 31, 32, 40):
        gradients = torch.autograd.grad(attention(q, k, v, True)[:, query].sum(), (k, v))
        for gradient in gradients:
            assert gradient[:, query + 1 :].abs().max() == 0 and (gradient[:, : query + 1] != 0).any()


@causal
def test_one_saved_tensor_is_the_log_sum_exp(randn, is_causal):
    q, k, v = (randn(2, n, 8).requires_grad_() for n in (40, 70, 70))
    saved = attention(q, k, v, is_causal).grad_fn.saved_tensors
    assert [tuple(tensor.shape) for tensor in saved].count((2, 40)) == 1
    (log_sum,) = (tensor for tensor in saved if tensor.shape == (2, 40))
    scores = q @ k.mT / math.sqrt(8)
    if is_causal:
        scores = scores.masked_fill(torch.ones(40, 70, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(log_sum, scores.logsumexp(-1), **EXACT)


def test_memory_grows_with_the_length_and_not_with_its_square(randn):
    elements = []
    for n in (64, 256):
        q, k, v = (randn(1, n, 8).requires_grad_() for _ in range(3))
        elements.append(sum(tensor.numel() for tensor in attention(q, k, v, True).grad_fn.saved_tensors))
    assert elements[1] == 4 * elements[0] and elements[1] < 256 * 256


def test_tiles_above_the_diagonal_are_skipped(randn, monkeypatch):
    seen = []
    right = flash_attention.tile_scores

    def counted(query, key, rows, columns, is_causal):
        seen.append((rows.start, columns.start))
        return right(query, key, rows, columns, is_causal)

    monkeypatch.setattr(flash_attention, "tile_scores", counted)
    q, k, v = (randn(1, 3 * flash_attention.TILE, 8).requires_grad_() for _ in range(3))
    for is_causal, n_tiles in ((False, 9), (True, 6)):
        seen.clear()
        attention(q, k, v, is_causal).sum().backward()
        assert len(seen) == 2 * n_tiles and len(set(seen)) == n_tiles


def test_a_second_derivative_is_refused(randn):
    q = randn(1, 4, 8).requires_grad_()
    squares = attention(q, q, q, True).square().sum()
    (gradient,) = torch.autograd.grad(squares, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --------------------------------------------------------------------------------------------------
# FlashAttention in Triton: on a GPU where there is one, else in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def flash_triton():
    pytest.importorskip("triton", reason="there is no Triton for this system")
    from llm_basics.systems import flash_triton

    return flash_triton


@causal
@pytest.mark.parametrize(
    "n_queries, n_keys, tiles", [(37, 70, (32, 16)), (70, 37, (16, 32)), (1, 1, (64, 64))]
)
def test_the_kernels_are_attention(randn, flash_triton, monkeypatch, n_queries, n_keys, tiles, is_causal):
    monkeypatch.setattr(flash_triton, "QUERIES", tiles[0])
    monkeypatch.setattr(flash_triton, "KEYS", tiles[1])
    results = []
    shapes = (2, n_queries, 8), (2, n_keys, 8), (2, n_keys, 8), (2, n_queries, 8)
    wide = [randn(*shape).to(DEVICE) for shape in shapes]
    for function, dtype in (
        (flash_triton.FlashAttentionTriton.apply, torch.float32),
        (lambda q, k, v, c: tF.scaled_dot_product_attention(q, k, v, is_causal=c), torch.float64),
    ):
        *leaves, weighting = (tensor.to(dtype) for tensor in wide)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        output = function(*leaves, is_causal)
        results.append([output, *torch.autograd.grad(output, leaves, weighting)])
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def test_the_kernels_agree_with_pytorch_on_the_log_sum_exp(randn, flash_triton):
    tensors = [randn(1, n, 8).float().to(DEVICE).requires_grad_() for n in (40, 70, 70)]
    found = [
        next(t for t in function.apply(*tensors, True).grad_fn.saved_tensors if t.shape == (1, 40))
        for function in (flash_triton.FlashAttentionTriton, flash_attention.FlashAttention)
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_kernel_refuses_what_it_cannot_compute(randn, flash_triton):
    q, k = randn(1, 4, 8), randn(1, 5, 8)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16, got torch.float64; convert it"):
        flash_triton.FlashAttentionTriton.apply(q, k, k, False)
    jaxtyping.config.update("jaxtyping_disable", True)  # until the next test
    with pytest.raises(ValueError, match=r"got \(1, 4, 8\), \(1, 5, 8\), \(1, 4, 8\)"):
        flash_triton.FlashAttentionTriton.apply(q.float(), k.float(), q.float(), False)


def test_a_real_kernel_with_a_mistake_is_named(flash_triton, monkeypatch):
    """The catalogue computes in PyTorch what wrong kernels give: here is one."""

    @triton.jit
    def visible_scores(q, k, queries, keys, n_keys, scale, IS_CAUSAL: tl.constexpr):
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if IS_CAUSAL:
            scores = tl.where(keys[None, :] <= queries[:, None], scores, -float("inf"))
        return scores

    monkeypatch.setattr(flash_triton, "visible_scores", visible_scores)
    verdict = judge.judge(judge.load("flash_triton"), sockets.own())
    assert verdict.status == "failed" and verdict.sure
    assert verdict.mistake.name == "keys past the end count"


# --------------------------------------------------------------------------------------------------
# Activation checkpointing


def block(d_model):
    layers = (nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Dropout(0.3), nn.Linear(4 * d_model, d_model))
    return nn.Sequential(*layers).double()


def test_checkpoint_changes_no_number(randn):
    """Outputs, gradients of input and weights, and the random numbers drawn afterwards, bit by bit."""
    layer, x = block(8), randn(5, 8).requires_grad_()
    results = []
    for run in (layer, lambda x: activation_checkpointing.checkpoint(layer, x)):
        torch.default_generator.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        output = run(run(x))
        output.square().sum().backward()
        weights = [parameter.grad.clone() for parameter in layer.parameters()]
        results.append([output, x.grad, *weights, torch.rand(3)])
    assert all(map(torch.equal, *results)) and len(results[0]) == 7


def test_checkpoint_saves_one_input_per_layer(randn):
    layers, x = [block(8) for _ in range(4)], randn(5, 8).requires_grad_()
    n_saved = []
    for run in (lambda layer, x: layer(x), activation_checkpointing.checkpoint):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            output = x
            for layer in layers:
                output = run(layer, output)
        weights = {parameter.shape for layer in layers for parameter in layer.parameters()}
        own = {t.data_ptr(): t.numel() for t in saved if t.shape not in weights and t.mT.shape not in weights}
        n_saved.append(sum(own.values()))
    assert n_saved[1] == 4 * x.numel() and n_saved[0] > 10 * n_saved[1]


# --------------------------------------------------------------------------------------------------
# The learner's and anybody's


def test_a_mistake_with_another_tile_is_named():
    """Mistakes whose numbers depend on the size of a tile are found with the usual sizes."""
    catalogue = judge.load("flash_attention")
    families = {family.name: family for family in catalogue.families}
    assert len(families) >= 12
    for name, size in (("last keys dropped", "tiles of 16"), ("output not rescaled", "tiles of 64")):
        with swap.replaced({"flash_attention.FlashAttention": families[name].make(size)}):
            verdict = judge.judge(catalogue, sockets.own())
        assert verdict.status == "failed" and verdict.sure and verdict.mistake.name == name


@pytest.mark.parametrize("name", ["online_softmax", "flash_attention", "activation_checkpointing"])
def test_stubs_and_the_reference_written_down_are_judged(name, tmp_path):
    path = tmp_path / "mine.py"
    stubs.start(name, path)
    (result,) = checks.check(path)
    assert (result.step, result.status) == (name, "not started")
    source = "\n\n".join(stubs.solution(piece) for piece in swap.PIECES[name].split())
    for helper in ("tiles", "visible_keys", "tile_scores"):
        source = source.replace(f" {helper}(", f" flash_attention.{helper}(")
    source = source.replace("online_softmax.rescale(", "rescale(").replace("rescale(", "softmax.rescale(")
    source = source.replace("Checkpoint.apply", "activation_checkpointing.Checkpoint.apply")
    imports = (
        "import math\nfrom collections.abc import Callable, Iterable\nfrom typing import Any\nimport torch\n"
        "from jaxtyping import Float\nfrom torch import Tensor\nfrom llm_basics.core import functional as F\n"
        "from llm_basics.systems import activation_checkpointing, flash_attention\n"
        "from llm_basics.systems import online_softmax as softmax\n"
    )
    path.write_text(f"{imports}\n\n{source}")
    (result,) = checks.check(path)
    assert (result.step, result.status, result.text) == (name, "passed", f"{name}: passed")


def test_a_foreign_file_without_the_functions_is_skipped(tmp_path):
    path = tmp_path / "adapters.py"
    path.write_text("def run_silu(x):\n    return x\n")
    adapters = grading.Adapters(sockets.run_file(path, "foreign_without_flash"))
    verdict = grading.grade(judge.load("flash_attention"), adapters)
    assert verdict.status == "missing"
    assert verdict.missing == ("get_flashattention_autograd_function_pytorch",)
