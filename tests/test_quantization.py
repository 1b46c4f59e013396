"""Quantized weights and KV caches: error bounds, packing, layers, whole models, CPU kernels, the options.

uv run pytest tests/test_quantization.py
"""

import copy
import json
import re

import pytest
import small_models
import torch
from torch import nn

from llm_basics import swap
from llm_basics.cli import commands, parse
from llm_basics.core import config, generate, layers
from llm_basics.core import functional as F
from llm_basics.core import model as models
from llm_basics.data import chat_template
from llm_basics.evaluation import compare_models, log_likelihood
from llm_basics.fast.cpu import weights
from llm_basics.inference import chat_session, engine, quantized_model, samples
from llm_basics.systems import quantization

# float32 rounds the quotient and the product too
SLACK = 1e-5


@pytest.fixture
def matrix():
    torch.manual_seed(0)
    # rows of very different sizes, a row of zeros, and one outlier
    matrix = torch.randn(6, 37) * torch.tensor([1e-30, 1e-3, 1.0, 50.0, 1e30, 0.0])[:, None]
    matrix[2, 5] = 1000.0
    return matrix


# --------------------------------------------------------------------------------------------------
# Numbers and scales


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 1, 8, 37, 100])
def test_no_weight_is_off_by_more_than_half_a_scale(matrix, bits, group_size):
    numbers, scales = quantization.quantize(matrix, bits, group_size)
    restored = quantization.dequantize(numbers, scales, group_size)
    of_each = scales.repeat_interleave(group_size or 37, dim=1)[:, :37]
    assert ((matrix - restored).abs() <= of_each / 2 * (1 + SLACK)).all()
    assert int(numbers.abs().max()) == quantization.MOST[bits]
    assert not restored[-1].any()


def test_an_outlier_costs_its_own_group_alone(matrix):
    row = matrix[2:3]
    errors = []
    for group_size in (None, 8):
        restored = quantization.dequantize(*quantization.quantize(row, 4, group_size), group_size)
        errors.append((row - restored).abs()[0, 8:].max())
    assert errors[0] > 1.0 and errors[1] < 0.3


def test_a_scale_is_that_of_the_largest_weight(matrix):
    numbers, scales = quantization.quantize(matrix[1:4], bits=4, group_size=8)
    first = matrix[1:4, :8]
    torch.testing.assert_close(scales[:, 0], first.abs().amax(1) / 7)
    assert torch.equal(numbers[:, :8], (first / scales[:, :1]).round().to(torch.int8))
    assert scales.shape == (3, 5)


@pytest.mark.parametrize("columns", [1, 2, 7, 8])
def test_all_numbers_of_four_bits_are_packed_and_unpacked(columns):
    numbers = torch.arange(-8, 8, dtype=torch.int8).repeat(columns).view(-1, columns)
    packed = quantization.pack_int4(numbers)
    assert packed.shape == (16, -(-columns // 2)) and packed.dtype == torch.uint8
    assert torch.equal(quantization.unpack_int4(packed, columns), numbers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantization.quantize(torch.ones(2, 2), 3), "bits must be 8 or 4, got 3"),
        (lambda: quantization.quantize(torch.ones(2, 2), 8, 0), "group_size must be at least 1"),
        (lambda: quantization.quantize(torch.tensor([[torch.nan]]), 8), "must be finite"),
        (lambda: quantization.pack_int4(torch.tensor([[8]], dtype=torch.int8)), "from -8 to 7, got 8 to 8"),
        (lambda: quantization.unpack_int4(torch.zeros(1, 2, dtype=torch.uint8), 5), "5 .* must have 3 bytes"),
        (
            lambda: quantization.dequantize(torch.zeros(1, 8, dtype=torch.int8), torch.ones(1, 2), 2),
            "8 columns in groups of 2 must have 4 scales a row, got 2",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 16), (4, 16), (4, None)])
def test_a_linear_layer_is_off_by_what_its_weights_are_off(bits, group_size):
    torch.manual_seed(0)
    linear = layers.Linear(37, 5, bias=True)
    nn.init.normal_(linear.bias)
    quantized = quantization.QuantizedLinear(linear.weight, linear.bias, bits, group_size)
    x = torch.randn(3, 2, 37)
    bound = x.abs() @ (linear.weight - quantized.weight).abs().T
    error = (linear(x) - quantized(x)).abs()
    assert (error <= bound + 1e-5).all() and error.max() > 0
    torch.testing.assert_close(quantized(x), F.linear(x, quantized.weight, linear.bias))
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_a_cache_restores_keys_and_values_within_its_bound():
    torch.manual_seed(0)
    cache, exact = quantization.QuantizedKVCache(2, 3, 9, 16), layers.KVCache(2, 3, 9, 16)
    for n_new in (4, 1, 2):
        key, value = torch.randn(2, 2, 3, n_new, 16) * torch.rand(2, 3, n_new, 1) * 10
        found, expected = cache.append(key, value), exact.append(key, value)
        for x, restored in zip(expected, found, strict=True):
            assert restored.shape == x.shape
            assert ((x - restored).abs() <= x.abs().amax(-1, keepdim=True) / 254 * (1 + SLACK)).all()
    assert cache.n_bytes == 2 * 2 * 3 * 9 * (16 + 4)
    kept = torch.tensor([1])
    cache.select(kept)
    keys, _ = cache.append(*torch.zeros(2, 1, 3, 1, 16))
    assert torch.equal(keys[:, :, :7], found[0][kept]) and not keys[:, :, 7].any()
    cache.append(*torch.zeros(2, 1, 3, 1, 16))
    with pytest.raises(ValueError, match="holds 9 tokens, got token 10"):
        cache.append(*torch.zeros(2, 1, 3, 1, 16))


# --------------------------------------------------------------------------------------------------
# Models


def quantized(model, quantize="none", kv_cache="float32"):
    model = copy.deepcopy(model)
    quantized_model.quantize_(model, quantize, kv_cache)
    return model


@pytest.mark.parametrize("layout", ["llama-grouped", "gpt2", "qwen3-grouped-tied", "arcee-silu"])
def test_a_model_equals_the_model_with_dequantized_weights(layout):
    torch.manual_seed(0)
    model = small_models.randomize_(
        models.TransformerLM(small_models.shape(**small_models.SHAPES[layout][1]))
    )
    tokens = torch.randint(0, 200, (2, 20))
    for kind in ("int8", "int4"):
        lossy, expected = quantized(model, kind), copy.deepcopy(model)
        names = quantized_model.quantized_names(model)
        assert ("lm_head" in names) == (not model.config.tie_embeddings)
        for name in names:
            layer = lossy.get_submodule(name)
            assert (layer.bits, layer.group_size) == (
                (8, None) if name == "lm_head" or kind == "int8" else (4, 32)
            )
            expected.get_submodule(name).weight.data = layer.weight
        with torch.no_grad():
            torch.testing.assert_close(lossy(tokens), expected(tokens), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(lossy(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(
        small_models.randomize_(models.TransformerLM(model.config)).state_dict()
    )


def test_memory_is_counted():
    model = models.TransformerLM(config.ModelConfig(100, 16, d_model=32, n_layers=2, n_heads=2, d_ff=48))
    linears = 2 * (4 * 32 * 32 + 3 * 48 * 32)
    others = 4 * (100 * 32 + 5 * 32)
    assert quantized_model.weight_bytes(model) == 4 * model.n_parameters() == others + 4 * (linears + 3200)
    rows = 2 * (4 * 32 + 2 * 48 + 32)
    head = 3200 + 4 * 100
    assert quantized_model.weight_bytes(quantized(model, "int8")) == others + head + linears + 4 * rows
    # w2 has rows of 48 in groups of 32 and 16
    groups = rows + 2 * 32
    assert quantized_model.weight_bytes(quantized(model, "int4")) == others + head + linears // 2 + 4 * groups
    assert quantized_model.cache_bytes_per_token(model) == 2 * 2 * 2 * 16 * 4
    lossy = quantized(model, kv_cache="int8")
    (cache, _) = lossy.make_kv_caches(batch=1)
    assert quantized_model.cache_bytes_per_token(lossy) * 16 == 2 * cache.n_bytes


def test_perplexity_through_an_int8_cache_is_that_of_decoding():
    torch.manual_seed(0)
    model = quantized(small_models.model(n_kv_heads=2), "int8", "int8")
    tokens = torch.randint(0, 200, (41,))
    scored = torch.cat([each.log_probabilities for each in log_likelihood.score_text(model, tokens.numpy())])
    caches, found = model.make_kv_caches(batch=1), []
    with torch.no_grad():
        for position in range(40):
            logits = model(tokens[None, position : position + 1], caches=caches)[0, -1]
            found.append(F.log_softmax(logits)[tokens[position + 1]])
    torch.testing.assert_close(scored, torch.stack(found).double(), rtol=1e-4, atol=1e-4)
    plain = quantized(model)
    del plain.make_kv_caches
    without = torch.cat([each.log_probabilities for each in log_likelihood.score_text(plain, tokens.numpy())])
    assert not torch.allclose(scored, without, rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_finite_are_named():
    model = small_models.model()
    model.layers[1].ffn.w2.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"must be finite .*\(from layers\.1\.ffn\.w2\.weight"):
        quantized_model.quantize_(model, "int4")


def test_attention_of_user_code_without_a_cache_is_refused():
    (cache,) = quantized_model.make_int8_caches(small_models.model(n_layers=1), batch=1)
    with pytest.raises(ValueError, match="use --kv_cache float32"):
        cache.keys = torch.zeros(1)


# --------------------------------------------------------------------------------------------------
# CPU kernels


def test_cpu_kernels_decode_int8_rows():
    torch.manual_seed(0)
    # rows that are padded: 72 columns, and 206 outputs
    shape = config.ModelConfig(
        206, 64, d_model=72, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=90, qk_norm=True
    )
    model = quantized(models.TransformerLM(shape).eval(), "int8")
    before = {name: model.get_submodule(name).weight for name in quantized_model.quantized_names(model)}
    prompt = torch.randint(0, 200, (5,))
    assert weights.supports(model) == ""
    scores = {}
    for which in ("reference", "fast"):
        found = scores.setdefault(which, [])

        def record(ids, logits, found=found):
            found.append(logits.clone())
            return logits

        with swap.using("fast", log=lambda line: None) if which == "fast" else swap.reference_only():
            for _ in range(2):
                tokens = list(generate.generate(model, prompt, 40, temperature=0.0, adjust=record))
            greedy = list(generate.generate(model, prompt, 40, temperature=0.0))
        assert greedy == tokens
    # activations are rounded to 16 bits
    torch.testing.assert_close(
        torch.stack(scores["fast"]), torch.stack(scores["reference"]), rtol=2e-3, atol=2e-3
    )
    # padding has moved the numbers, not changed them
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("int4",), "kernels read int8 rows on a CPU, and layers.0.attn.q_proj is .* int4, groups of 32"),
     (("int8", "int8"), "the KV cache is quantized")],
)  # fmt: skip
def test_kernels_that_do_not_support_a_model_say_why(options, reason):
    assert re.search(reason, weights.supports(quantized(small_models.model(), *options)))


# --------------------------------------------------------------------------------------------------
# Programs


@pytest.fixture
def folder(untrained_run):
    return str(untrained_run("run"))


def test_generate_writes_what_the_quantized_model_writes(folder, capsys):
    arguments = [folder, "--device=cpu", "--fast=off", "--max_new_tokens=12", "--prompt=ab"]
    arguments += ["--quantize=int4", "--kv_cache=int8"]
    assert samples.main(parse.program_options(commands.GenerateConfig(), arguments, "generate")) == 0
    captured = capsys.readouterr()
    model, tokenizer = engine.load_run(folder)
    quantized_model.quantize_(model, "int4", "int8")
    assert captured.out == "ab" + "".join(engine.complete(model, tokenizer, "ab", 12, 0.8)) + "\n"
    assert captured.err.startswith("memory    weights ") and "bytes per token (int8)" in captured.err
    # several samples are a batch
    many = [*arguments, "--samples=3"]
    assert samples.main(parse.program_options(commands.GenerateConfig(), many, "generate")) == 0
    assert f"sample 1\n{captured.out}" in capsys.readouterr().out


def test_chat_and_evaluate_take_the_options(untrained_run, tmp_path, capsys, monkeypatch):
    folder = str(untrained_run("chat", chat_template.SPECIALS))
    options = ["--device=cpu", "--fast=off", "--quantize=int8", "--kv_cache=int8"]
    chat = [folder, *options, "--message=a", "--max_new_tokens=3"]
    assert chat_session.main(parse.program_options(commands.ChatConfig(), chat, "chat")) == 0
    assert "bytes per token (int8)" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("a few words of text, " * 20)
    losses = {}
    for name, chosen in (
        ("plain", options[:2]),
        ("quantized", options),
        ("int4", [*options, "--quantize=int4"]),
    ):
        out = str(tmp_path / f"{name}.json")
        arguments = [folder, *chosen, f"--data={text}", f"--out={out}"]
        assert (
            compare_models.main(parse.program_options(commands.EvaluateConfig(), arguments, "evaluate")) == 0
        )
        losses[name] = json.loads((tmp_path / f"{name}.json").read_text())[0]["report"]["val_loss"]
    difference = {name: abs(loss / losses["plain"] - 1) for name, loss in losses.items()}
    assert 0 < difference["quantized"] < 0.01 and difference["quantized"] < difference["int4"] < 0.2
