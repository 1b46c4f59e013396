"""The CPU training kernels against autograd. Alone: `uv run pytest tests/test_fast_trainer.py`."""

import copy
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llm_basics import swap
from llm_basics.core import config, dataloader, evaluate, layers, model, optim, trainer
from llm_basics.core import functional as F
from llm_basics.fast import evaluate as fast_evaluate
from llm_basics.fast import kernel_cache, numba_jit
from llm_basics.fast import optim as fast_optim
from llm_basics.fast import trainer as fast
from llm_basics.fast.cpu import amx, attention, interpreter, matmul, threads
from llm_basics.fast.cpu import trainer as cpu_trainer
from llm_basics.runs import checkpoint, run_dir

pytestmark = pytest.mark.skipif(
    cpu_trainer.LEAST_VECTOR > matmul.VECTOR, reason="the processor has no 256-bit vectors, so torch is used"
)

# vocabularies that are not a multiple of a vector, heads of one and of three vectors, one and two groups
SHAPES = {
    "llama": {},
    "gpt2": {
        "norm": "layer",
        "position": "learned",
        "ffn": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    "gelu": {"ffn": "gelu", "bias": True, "vocab_multiple": 7},
    "relu2": {"ffn": "relu2", "norm": "layer", "n_layers": 1},
    "silu": {"ffn": "silu", "position": "none", "tie_embeddings": True},
    "qk norm": {"qk_norm": True, "norm_eps": 0.1},
    "qk norm without positions": {"qk_norm": True, "position": "none"},
    "two groups": {"n_kv_heads": 2, "qk_norm": True},
    "one group, wide heads": {"n_kv_heads": 1, "n_heads": 2, "d_model": 96, "d_ff": 144},
    "one score": {"vocab_size": 1},
    "many scores": {"vocab_size": 700, "vocab_multiple": 64},
}
# texts, tokens of each, threads
BATCHES = {
    "one token": (3, 1, 1),
    "some at a time": (11, 20, 1),
    "two threads": (5, 31, 2),
    "three threads": (8, 64, 3),
    "long": (2, 200, 2),
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Run on one thread by default, without a minimum number of tokens."""
    monkeypatch.setattr(cpu_trainer, "MOST_WEIGHTS_PER_TOKEN", 10**9)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(context_length=200, **options):
    shape = {"vocab_size": 61, "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 80, **options}
    lm = model.TransformerLM(config.ModelConfig(context_length=context_length, **shape))
    with torch.no_grad():  # norms and biases too, and values that begin at 0
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lm


def random_batch(lm, n_texts=4, seq=20):
    tokens = torch.randint(lm.config.vocab_size, (n_texts, seq + 1))
    return tokens[:, :-1], tokens[:, 1:].clone()


def gradients(lm, batch, batch_loss, z_loss=0.0):
    lm.zero_grad(set_to_none=True)
    loss = batch_loss(lm, *batch, z_loss)
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in lm.named_parameters()}


def assert_same(found, expected):
    # the gradient of a key bias is 0 up to rounding: it shifts all scores of a row
    largest = max(gradient_of.norm() for gradient_of in expected.values())
    for name, gradient_of in expected.items():
        scale = gradient_of.norm() + 1e-2 * largest
        assert (found[name] - gradient_of).norm() < 2e-5 * scale, name


def uses_kernels(loss):
    return "CPULoss" in type(loss.grad_fn).__name__


# --------------------------------------------------------------------------------------------------
# Loss and gradients


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_match_autograd(shape):
    lm, exact = make(**SHAPES[shape]), make(**SHAPES[shape]).double()
    exact.load_state_dict(lm.state_dict())
    inputs, targets = random_batch(lm)
    targets[0, :5], targets[2] = dataloader.IGNORE_INDEX, dataloader.IGNORE_INDEX
    expected, of_weights = gradients(exact, (inputs, targets), trainer.batch_loss, 0.01)
    loss, found = gradients(lm, (inputs, targets), fast.batch_loss, 0.01)
    assert uses_kernels(loss)
    assert abs(loss.item() - expected.item()) < 1e-5
    assert_same(found, {name: g.float() for name, g in of_weights.items()})


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", ["gpt2", "two groups"])
def test_batches_of_any_size(shape, batch):
    n_texts, seq, n_threads = BATCHES[batch]
    lm = make(**SHAPES[shape])
    texts = random_batch(lm, n_texts, seq)
    torch.set_num_threads(n_threads)
    expected, of_weights = gradients(lm, texts, trainer.batch_loss)
    loss, found = gradients(lm, texts, fast.batch_loss)
    assert uses_kernels(loss) and abs(loss.item() - expected.item()) < 1e-5
    assert_same(found, of_weights)


@torch.no_grad()
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_matches_the_reference(shape, batch, monkeypatch):
    n_texts, seq, n_threads = BATCHES[batch]
    torch.set_num_threads(n_threads)
    lm = make(**SHAPES[shape]).eval()
    inputs, targets = random_batch(lm, n_texts, seq)
    # a third of the targets is right, and some do not count
    likeliest = lm(inputs).argmax(-1)
    targets[:, ::3], targets[:, 1::4] = likeliest[:, ::3], dataloader.IGNORE_INDEX
    expected = evaluate.batch_metrics(lm, inputs, targets)
    assert expected[1] > 0
    monkeypatch.setattr(fast_evaluate, "reference_metrics", pytest.fail)
    found = fast_evaluate.batch_metrics(lm, inputs, targets)
    assert found[1] == expected[1] and found[0] == pytest.approx(expected[0], rel=2e-6)
    # nothing is left of the batch before
    assert fast_evaluate.batch_metrics(lm, inputs, targets) == found
    assert all(parameter.grad is None for parameter in lm.parameters())


@torch.no_grad()
def test_evaluation_of_no_targets_and_of_other_models():
    lm = make().eval()
    inputs, targets = random_batch(lm)
    nothing = torch.full_like(targets, dataloader.IGNORE_INDEX)
    assert fast_evaluate.batch_metrics(lm, inputs, nothing) == (0.0, 0)
    half = make().eval().double()
    assert fast_evaluate.batch_metrics(half, inputs, targets) == evaluate.batch_metrics(half, inputs, targets)


def test_the_same_batch_has_the_same_bits():
    lm = make()
    torch.set_num_threads(2)
    batch, other = random_batch(lm, 6, 50), random_batch(lm, 9, 33)
    loss, first = gradients(lm, batch, fast.batch_loss)
    gradients(lm, other, fast.batch_loss)
    again, second = gradients(copy.deepcopy(lm), batch, fast.batch_loss)
    assert loss == again and all(torch.equal(first[name], second[name]) for name in first)


def test_a_later_batch_leaves_gradients_alone_and_adds_to_them():
    lm = make()
    one, two = random_batch(lm), random_batch(lm)
    _, first = gradients(lm, one, fast.batch_loss)
    kept = {name: g.clone() for name, g in first.items()}
    _, second = gradients(lm, two, fast.batch_loss)
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    lm.zero_grad(set_to_none=True)
    for batch, share in ((one, 0.25), (two, 0.75)):
        (share * fast.batch_loss(lm, *batch, 0.0)).backward()
    found = {name: p.grad for name, p in lm.named_parameters()}
    assert_same(found, {name: 0.25 * kept[name] + 0.75 * second[name] for name in kept})


def test_a_second_backward_is_refused():
    lm = make()
    loss = fast.batch_loss(lm, *random_batch(lm), 0.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once for each loss"):
        loss.backward()


def test_all_targets_ignored():
    lm = make()
    inputs, targets = random_batch(lm)
    loss, found = gradients(
        lm, (inputs, torch.full_like(targets, dataloader.IGNORE_INDEX)), fast.batch_loss, 0.1
    )
    assert uses_kernels(loss) and loss == 0
    assert all(not g.any() for g in found.values())


def test_reads_current_weights():
    lm = make()
    batch = random_batch(lm)
    gradients(lm, batch, fast.batch_loss)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.1)
    moved = copy.deepcopy(lm)
    for parameter in lm.parameters():  # elsewhere in memory
        parameter.data = parameter.data.clone()
    expected, of_weights = gradients(moved, batch, trainer.batch_loss)
    for lm_now in (lm, moved):
        loss, found = gradients(lm_now, batch, fast.batch_loss)
        assert uses_kernels(loss) and abs(loss - expected) < 1e-5
        assert_same(found, of_weights)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", ["attn.q_proj", "attn.k_proj", "attn.v_proj", "ffn.w1", "ffn.w2", "ln2"])
def test_nonfinite_values_propagate(place, number):
    """Neither exp nor max may hide a NaN."""
    lm = make(qk_norm=True)
    settings, name = config.TrainConfig(10, dtype="float32"), f"layers.0.{place}.weight"
    with torch.no_grad():
        lm.get_parameter(name).view(-1)[7] = float(number)
    loss, found = gradients(lm, random_batch(lm), fast.batch_loss)
    assert uses_kernels(loss) and not (loss.isfinite() and found[name].isfinite().all())
    with swap.using("fast"), pytest.raises(FloatingPointError, match="step 1: loss nan"):
        trainer.train_step(lm, trainer.make_optimizer(lm, settings), [random_batch(lm)], 1, settings)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_hundred_steps_learn_the_same(shape):
    losses = []
    for twins in (False, True):
        torch.manual_seed(0)
        lm = make(context_length=32, init="gpt2", **SHAPES[shape])
        settings = config.TrainConfig(100, lr=3e-3, warmup_steps=10, dtype="float32")
        optimizer, text = trainer.make_optimizer(lm, settings), torch.randint(61, (500,)).repeat(2)
        curve = []
        with swap.using("fast") if twins else swap.reference_only():
            for step in range(1, 101):
                places = torch.randint(500, (8,), generator=torch.Generator().manual_seed(step))
                windows = text[places[:, None] + torch.arange(33)]
                batch = windows[:, :-1], windows[:, 1:]
                curve.append(trainer.train_step(lm, optimizer, [batch], step, settings).train_loss.item())
        losses.append(torch.tensor(curve))
    assert losses[0][-1] < losses[0][0] - 1
    assert (losses[0] - losses[1]).abs().max() < 1e-3


# --------------------------------------------------------------------------------------------------
# Fallbacks to torch


def with_hook(lm):
    lm.layers[0].register_forward_hook(lambda *_: None)


def with_a_layer_of_its_own(lm):
    class Own(layers.MLP):
        pass

    lm.layers[0].ffn = Own(64, 80)


def compiled(lm):
    vars(lm)["hidden_states"] = lm.hidden_states


def with_frozen_weights(lm):
    lm.ln_final.weight.requires_grad_(False)


def in_double_precision(lm):
    lm.double()


@pytest.mark.parametrize(
    "change", [with_hook, with_a_layer_of_its_own, compiled, with_frozen_weights, in_double_precision]
)
def test_is_left_to_torch_if_the_model_is_not_as_it_was_made(change):
    lm = make()
    batch = random_batch(lm)
    assert uses_kernels(fast.batch_loss(lm, *batch, 0.0))
    change(lm)
    loss = fast.batch_loss(lm, *batch, 0.0)
    assert not uses_kernels(loss) and torch.equal(loss, fast.batch_loss(copy.deepcopy(lm), *batch, 0.0))


@pytest.mark.parametrize(
    "options",
    [
        {"norm_placement": "post"},
        {"dropout": 0.1},
        {"norm": "none"},
        {"d_model": 60, "position": "learned"},
        {"d_ff": 81},
    ],
    ids=str,
)
def test_unsupported_configs_use_torch(options):
    lm = make(**options)
    assert cpu_trainer.unsupported(lm, random_batch(lm)[0])
    assert not uses_kernels(fast.batch_loss(lm, *random_batch(lm), 0.0))


def test_dropout_is_none_in_evaluation():
    lm = make(dropout=0.5).eval()
    assert uses_kernels(fast.batch_loss(lm, *random_batch(lm), 0.0))


def test_fewer_texts_than_threads_use_torch():
    lm = make()
    torch.set_num_threads(3)
    assert "the batch has 2 sequences for 3 threads" in cpu_trainer.unsupported(lm, random_batch(lm, 2)[0])
    assert not cpu_trainer.unsupported(lm, random_batch(lm, 3)[0])


def test_is_left_to_torch_where_that_is_faster(monkeypatch):
    lm, wide = make(), make(d_model=400, n_layers=1, n_heads=25)
    assert "d_model 400" in cpu_trainer.unsupported(wide, random_batch(wide)[0])
    monkeypatch.setattr(cpu_trainer, "MOST_WEIGHTS_PER_TOKEN", lm.n_parameters() / 80)
    assert not cpu_trainer.unsupported(lm, random_batch(lm, 4, 20)[0])
    assert "torch is faster for" in cpu_trainer.unsupported(lm, random_batch(lm, 4, 19)[0])


def test_too_many_gradients_use_torch(monkeypatch):
    lm = make()
    monkeypatch.setattr(cpu_trainer, "MOST_GRADIENTS", 2 * lm.n_parameters())
    torch.set_num_threads(2)
    assert not cpu_trainer.unsupported(lm, random_batch(lm)[0])
    torch.set_num_threads(3)
    assert "memory" in cpu_trainer.unsupported(lm, random_batch(lm)[0])


@pytest.mark.parametrize(
    "inputs, targets",
    [((0, 61), (0, 0)), ((-1, 0), (0, 0)), ((0, 0), (0, 61)), ((0, 0), (-1, 0)), ((0, 0), (-101, 0))],
)
def test_unknown_tokens_raise(inputs, targets):
    lm = make()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        fast.batch_loss(lm, torch.tensor([inputs]), torch.tensor([targets]), 0.0)


def test_texts_that_are_too_long_raise():
    lm = make(context_length=8)
    with pytest.raises(ValueError, match="sees 8 tokens at most, got 9"):
        fast.batch_loss(lm, *random_batch(lm, 2, 9), 0.0)


def test_kernels_of_a_step_are_compiled_before_the_first(monkeypatch):
    lm = make()
    before = copy.deepcopy(lm.state_dict())
    requested, used = [], []
    monkeypatch.setattr(kernel_cache, "start_compiling", lambda *groups: requested.extend(groups))
    swap.prepare_model(lm, 4, 20)
    assert not requested
    with swap.using("fast", lambda line: None):
        swap.prepare_model(lm, 4, 20)
        assert requested == ["training"]
        swap.prepare_model(lm.double(), 4, 20)
        assert requested == ["training"], "these weights are for torch"
    assert all(torch.equal(before[name], weight.float()) for name, weight in lm.state_dict().items())
    assert all(parameter.grad is None for parameter in lm.parameters())
    # the work of the compiling process
    monkeypatch.setattr(cpu_trainer.muon, "update", lambda *arguments: used.append("muon"))
    learn = cpu_trainer.Learner.learn
    monkeypatch.setattr(cpu_trainer.Learner, "learn", lambda *a: used.append("gradient") or learn(*a))
    cpu_trainer.compile_kernels()
    assert used == ["gradient"] * (1 + amx.is_available()) + ["muon"]


@pytest.mark.slow
def test_a_run_that_compiles_learns_the_same_to_the_last_bit(tmp_path):
    home = Path(cpu_trainer.__file__).parents[2]
    shutil.copytree(home, tmp_path / "llm_basics", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(900)))
    options = "--tokenizer bytes --data text.txt --config gpt2-nano --train.steps 3 --train.sample_tokens 1"
    weights = []
    for number in range(2):
        command = [sys.executable, "-m", "llm_basics.train", *options.split(), "--run_dir", f"run{number}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # the second run may find the decoding kernels, which the first does not wait for, still missing
        assert number or "compiling CPU kernels" in done.stderr
        path = tmp_path / f"run{number}" / run_dir.CHECKPOINTS / "step_00000003.safetensors"
        weights.append(checkpoint.read_checkpoint(path)[0])
    for name, tensor in weights[0].items():
        assert name.startswith("rng.") or torch.equal(tensor, weights[1][name]), name


def test_without_a_gradient_there_is_none():
    lm = make()
    with torch.no_grad():
        assert not fast.batch_loss(lm, *random_batch(lm), 0.0).requires_grad


# --------------------------------------------------------------------------------------------------
# Threads and memory


def test_unreferenced_models_are_freed():
    lm = make()
    gradients(lm, random_batch(lm), fast.batch_loss)
    lm, gone = None, weakref.ref(lm)
    gc.collect()
    assert gone() is None


def test_an_interruption_waits_for_the_others(monkeypatch):
    lm = make()
    torch.set_num_threads(2)
    batch = random_batch(lm, 4, 30)
    fast.batch_loss(lm, *batch, 0.0)
    learn, running, caller = interpreter.learn, [], threading.current_thread()
    may_end = threading.Event()

    def interrupted(*arguments):
        if threading.current_thread() is caller:
            threading.Timer(0.2, may_end.set).start()
            raise KeyboardInterrupt
        running.append(True)
        may_end.wait(10)
        running.clear()
        return learn(*arguments)

    monkeypatch.setattr(interpreter, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast.batch_loss(lm, *batch, 0.0)
    assert not running and may_end.is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_has_helpers_of_its_own():
    threads.helpers(1).submit(int).result()
    child = os.fork()
    if child == 0:
        # only this: the child lacks threads that torch may need
        os._exit(0 if threads.helpers(1).submit(lambda: 7).result(timeout=20) == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_gradients_that_lie_in_a_row_are_clipped_in_one_go(monkeypatch):
    lm = make()
    gradients(lm, random_batch(lm), fast.batch_loss)
    parameters = list(lm.parameters())
    own = [p.grad for p in parameters]
    (whole,) = fast_optim.as_flat_view(own)
    assert whole.numel() == lm.n_parameters() and whole.data_ptr() == own[0].data_ptr()
    apart = copy.deepcopy(parameters)
    for parameter, gradient_of in zip(apart, own, strict=True):
        parameter.grad = gradient_of.clone()
    norms = [fast_optim.clip_grad_norm_(parameters, 0.5), optim.clip_grad_norm_(apart, 0.5)]
    assert torch.allclose(*norms) and all(
        torch.allclose(p.grad, q.grad) for p, q in zip(parameters, apart, strict=True)
    )
    assert fast_optim.as_flat_view([own[1], own[0]])[0] is own[1]
    assert fast_optim.as_flat_view([own[0].T, own[1]])[1] is own[1]
    assert fast_optim.as_flat_view([]) == []
    # adjacent in memory, as often on GPUs, but in separate storages
    numbers = np.zeros(8, np.float32)
    neighbors = [torch.from_numpy(numbers[:4]), torch.from_numpy(numbers[4:])]
    assert neighbors[0].data_ptr() + 16 == neighbors[1].data_ptr()
    assert fast_optim.as_flat_view(neighbors) == neighbors


# --------------------------------------------------------------------------------------------------
# Products


def matrix(x, column=1, tile=0):
    return matmul.Matrix(x.data_ptr(), x.stride(0), column, tile)


@pytest.mark.parametrize(
    "m, n, k", [(1, 1, 1), (8, 2, 3), (13, 1, 40), (33, 5, 17), (64, 3, 128), (7, 4, 1), (9, 3, 1100)]
)
def test_product(m, n, k):
    """`n` is a number of vectors."""
    n *= matmul.VECTOR
    a, b, start = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    # memory around the output must stay unchanged
    room = torch.full((m + 1, n + 5), 7.0)
    left, right = matrix(a, tile=matmul.ROWS * k), matrix(b, tile=matmul.COLUMNS)
    matmul.product(left, right, matrix(start), matrix(room), m, n, k)
    assert torch.allclose(room[:m, :n], start + a @ b, atol=1e-3)
    assert (room[m:] == 7).all() and (room[:, n:] == 7).all()
    matmul.product(left, right, matrix(room), matrix(room), m, n, k)
    assert torch.allclose(room[:m, :n], start + 2 * (a @ b), atol=1e-3)
    matmul.product(left, right, matmul.start_at(start.data_ptr(), 0, n), matrix(room), m, n, k)
    assert torch.allclose(room[:m, :n], start[0] + a @ b, atol=1e-3)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 61])
def test_pack_turns_a_matrix_and_ends_it_with_zeros(n):
    k = 2 * matmul.VECTOR
    weight, x = torch.randn(n, k + 3)[:, :k], torch.randn(5, k)
    packed = torch.full((matmul.packed_size(n, k),), float("nan"))
    matmul.pack(weight.data_ptr(), weight.stride(0), n, k, packed.data_ptr())
    out = torch.full((5, matmul.padded(n)), float("nan"))
    nothing, right = torch.zeros(matmul.padded(n)), matmul.packed(packed.data_ptr(), k)
    left = matrix(x, tile=matmul.ROWS * k)
    matmul.product(left, right, matmul.broadcast_at(nothing.data_ptr()), matrix(out), 5, n, k)
    assert torch.allclose(out[:, :n], x @ weight.T, atol=1e-4) and (out[:, n:] == 0).all()


@pytest.mark.parametrize("m", [1, 7, 8, 21])
def test_turn_makes_columns_rows(m):
    a, b = torch.randn(30, m + 2)[:, :m], torch.randn(30, matmul.VECTOR)
    turned, out = torch.zeros(matmul.whole_tiles(m) * 30), torch.zeros(m, matmul.VECTOR)
    matmul.transpose(a.data_ptr(), a.stride(0), 30, m, turned.data_ptr())
    left, right = matmul.transposed(turned.data_ptr(), 30), matrix(b, tile=matmul.COLUMNS)
    matmul.product(left, right, matrix(out), matrix(out), m, matmul.VECTOR, 30)
    assert torch.allclose(out, a.T @ b, atol=1e-4)
    out.zero_()
    left = matmul.transposed_at(a.data_ptr(), a.stride(0))
    matmul.product(left, right, matrix(out), matrix(out), m, matmul.VECTOR, 30)
    assert torch.allclose(out, a.T @ b, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# bfloat16

needs_amx = pytest.mark.skipif(not amx.is_available(), reason="the processor has no AMX for bfloat16")


def rounded(x):
    return x.bfloat16().float()


def paired(x):
    """`x` as the right operand of `amx.product`."""
    out = torch.full((amx.padded(len(x)) // 2, x.shape[1]), float("nan"))
    amx.pair_rows(x.data_ptr(), *x.shape, out.data_ptr())
    return out


@needs_amx
@pytest.mark.parametrize("m, n, k", [(32, 32, 32), (96, 64, 160), (64, 160, 96)])
def test_product_in_bfloat16(m, n, k):
    a, b, start = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    left, right, room = torch.empty(m, k // 2), paired(b), torch.full((m + 1, n + 5), 7.0)
    amx.round_rows(a.data_ptr(), a.numel(), left.data_ptr())
    assert torch.equal(left.view(torch.bfloat16), a.bfloat16())
    operands = matrix(left), matrix(right, tile=matmul.COLUMNS)
    sizes = m, n, k, amx.CONFIGURATION.ctypes.data
    amx.product(*operands, matrix(start), matrix(room), *sizes)
    expected = rounded(a) @ rounded(b)
    assert torch.allclose(room[:m, :n], start + expected, atol=1e-4)
    assert (room[m:] == 7).all() and (room[:, n:] == 7).all()
    amx.product(*operands, matrix(room), matrix(room), *sizes)
    assert torch.allclose(room[:m, :n], start + 2 * expected, atol=1e-4)
    amx.product(*operands, matmul.start_at(start.data_ptr(), 0, n), matrix(room), *sizes)
    assert torch.allclose(room[:m, :n], start[0] + expected, atol=1e-4)


@needs_amx
@pytest.mark.parametrize("n", [1, 31, 32, 33, 64])
def test_a_product_with_a_transpose_ends_with_zeros(n):
    a, b, out = torch.randn(n, 64), torch.randn(n, 32), torch.zeros(64, 32)
    left, pairs, right = torch.full((64, amx.padded(n) // 2), float("nan")), paired(a), paired(b)
    amx.transpose(pairs.data_ptr(), n, 64, left.data_ptr())
    sizes = 64, 32, amx.padded(n), amx.CONFIGURATION.ctypes.data
    amx.product(matrix(left), matrix(right, tile=matmul.COLUMNS), matrix(out), matrix(out), *sizes)
    assert torch.allclose(out, rounded(a).T @ rounded(b), atol=1e-4)


@needs_amx
def test_special_numbers_stay_special_in_bfloat16():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -1e-40, 1.00390625] + [1.0] * 24)
    found = torch.empty(16)
    amx.round_rows(x.data_ptr(), 32, found.data_ptr())
    assert torch.equal(found.view(torch.bfloat16).nan_to_num(7), x.bfloat16().nan_to_num(7))


class RoundedLinear(torch.autograd.Function):
    """A linear layer whose operands are rounded to bfloat16, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return rounded(x) @ rounded(weight).T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return rounded(dy) @ rounded(weight), rounded(dy).flatten(0, -2).T @ rounded(x).flatten(0, -2)


def rounded_linear(x, weight, bias=None):
    # sizes that are not a multiple of 32 stay in float32
    is_rounded = not any(size % amx.TILE for size in weight.shape)
    product = RoundedLinear.apply(x, weight) if is_rounded else x @ weight.T
    return product if bias is None else product + bias


@needs_amx
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {**SHAPES["gpt2"], "d_ff": 96, "vocab_size": 64},
        {"vocab_multiple": 32, "d_ff": 128, "n_kv_heads": 2, "qk_norm": True},
    ],
    ids=["d_ff of 80", "gpt2", "llama"],
)
def test_products_of_a_step_in_bfloat16(options, batch, monkeypatch):
    n_texts, seq, n_threads = BATCHES[batch]
    torch.set_num_threads(n_threads)
    lm = make(**options)
    texts = random_batch(lm, n_texts, seq)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = gradients(lm, texts, fast.batch_loss)
        assert uses_kernels(loss)
        evaluated, _ = fast_evaluate.batch_metrics(lm, *texts)
    in_float32, _ = gradients(lm, texts, fast.batch_loss)
    monkeypatch.setattr(F, "linear", rounded_linear)
    expected, of_weights = gradients(lm, texts, trainer.batch_loss)
    assert abs(loss - expected) < 1e-3 and loss != in_float32
    assert evaluated / texts[1].numel() == pytest.approx(loss.item(), abs=1e-4)
    largest = max(gradient_of.norm() for gradient_of in of_weights.values())
    for name, gradient_of in of_weights.items():
        # a sum in another order may be rounded to the next number of bfloat16
        difference = (found[name] - gradient_of).norm()
        assert difference < 5e-3 * (gradient_of.norm() + 0.1 * largest), name


@needs_amx
def test_steps_in_bfloat16_learn_as_in_float32():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        lm = make(**SHAPES["gpt2"])
        batch, options = random_batch(lm), config.TrainConfig(40, 4, lr=1e-2, warmup_steps=0, dtype=dtype)
        optimizer = trainer.make_optimizer(lm, options)
        steps = [fast.train_step(lm, optimizer, [batch], step, options) for step in range(1, 41)]
        losses[dtype] = torch.stack([step.train_loss for step in steps])
    assert losses["float32"][-1] < 0.5 * losses["float32"][0]
    difference = (losses["float32"] - losses["bfloat16"]).abs()
    assert 0 < difference.max() < 0.05


@needs_amx
def test_wider_models_are_trained_by_the_kernels_in_bfloat16():
    lm = make(d_model=768, n_layers=1, n_heads=12)
    assert "d_model 768" in cpu_trainer.unsupported(lm, random_batch(lm)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_trainer.unsupported(lm, random_batch(lm)[0])


def test_bfloat16_is_left_to_torch_without_amx(monkeypatch):
    monkeypatch.setattr(amx, "is_available", lambda: False)
    lm = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in cpu_trainer.unsupported(lm, random_batch(lm)[0])
        assert not uses_kernels(fast.batch_loss(lm, *random_batch(lm), 0.0))


# --------------------------------------------------------------------------------------------------
# Maxima


@numba_jit.jit
def highest(x):
    return matmul.maximum(x.ctypes.data, len(x))


def test_highest():
    for n in (1, 2, 5):
        for place in range(n * matmul.VECTOR):
            x = -np.random.rand(n * matmul.VECTOR).astype(np.float32)
            x[place] = 0.5
            assert highest(x) == 0.5


def test_scores_far_from_others_are_no_weight():
    """Softmax whose exponentials overflow or vanish, and with a single visible key."""
    seq, d_head = 2 * attention.QUERIES + 3, matmul.VECTOR
    q, k, v = (30 * torch.randn(seq, d_head) for _ in range(3))
    expected = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    sizes, out, zeros = torch.zeros(2 * seq), torch.zeros(seq, d_head), torch.zeros(seq + matmul.VECTOR)
    rooms = [torch.full((attention.QUERIES * matmul.padded(seq),), float("nan")) for _ in range(2)]
    rooms += [torch.full((matmul.packed_size(seq, d_head),), float("nan")) for _ in range(2)]
    room = attention.Workspace(*(part.data_ptr() for part in (*rooms, zeros)))
    places = [part.data_ptr() for part in (q, k, v, sizes)]
    attention.attend(*places, attention.Heads(1, seq, 1, 1, d_head), room, out.data_ptr())
    # scores in the thousands, where rounding matters
    assert torch.allclose(out, expected, atol=1e-2)
