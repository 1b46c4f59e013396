"""Online softmax and FlashAttention by hand. Alone: `uv run pytest tests/test_systems_attention.py`."""

import math

import grading
import pytest
import torch
from torch.nn import functional as tF

from llm_basics import swap
from llm_basics.learn import checks, judge, sockets, stubs
from llm_basics.systems import flash_attention, online_softmax

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
# The learner's and anybody's


def test_a_mistake_with_another_tile_is_named():
    """Mistakes whose numbers depend on the size of a tile are found with the usual sizes."""
    catalogue = judge.load("flash_attention")
    families = {family.name: family for family in catalogue.families}
    assert len(families) >= 8
    for name, size in (("last keys dropped", "tiles of 16"), ("diagonal tile doubled", "tiles of 64")):
        with swap.replaced({"flash_attention.FlashAttention": families[name].make(size)}):
            verdict = judge.judge(catalogue, sockets.own())
        assert verdict.status == "failed" and verdict.sure and verdict.mistake.name == name


@pytest.mark.parametrize("name", ["online_softmax", "flash_attention"])
def test_stubs_and_the_reference_written_down_are_judged(name, tmp_path):
    path = tmp_path / "mine.py"
    stubs.start(name, path)
    (result,) = checks.check(path)
    assert (result.step, result.status) == (name, "not started")
    source = "\n\n".join(stubs.solution(piece) for piece in swap.PIECES[name].split())
    for helper in ("tiles", "visible_keys", "tile_scores"):
        source = source.replace(f" {helper}(", f" flash_attention.{helper}(")
    source = source.replace("online_softmax.rescale(", "rescale(").replace("rescale(", "softmax.rescale(")
    imports = (
        "import math\nfrom collections.abc import Iterable\nfrom typing import Any\nimport torch\n"
        "from jaxtyping import Float\nfrom torch import Tensor\nfrom llm_basics.core import functional as F\n"
        "from llm_basics.systems import flash_attention\n"
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
