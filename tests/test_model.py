"""The block and the language model. Alone: `uv run pytest tests/test_model.py`."""

import dataclasses
import math

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as tF

from llm_basics.core import config, layers, model, presets
from llm_basics.core import functional as F

VOCAB, CONTEXT, D_MODEL, N_LAYERS, N_HEADS, D_FF, SEQ = 23, 16, 12, 2, 3, 20, 7
THETA = 500.0
# the tables of angles may be float32
ROPE_TOLERANCE = {"rtol": 1e-5, "atol": 5e-5}
# snapshots are compared in float32
SNAPSHOT_TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
# two float32 implementations of a whole model, one of them with its own RoPE tables
TRANSFORMERS_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

LLAMA = config.ModelConfig(
    vocab_size=VOCAB, context_length=CONTEXT, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=D_FF
)
GPT2 = config.ModelConfig(
    vocab_size=VOCAB,
    context_length=CONTEXT,
    d_model=24,
    n_layers=2,
    n_heads=6,
    norm="layer",
    position="learned",
    ffn="gelu_tanh",
    bias=True,
    tie_embeddings=True,
    init="gpt2",
)
FAMILIES = pytest.mark.parametrize("settings", [LLAMA, GPT2], ids=["llama", "gpt2"])
PRESETS = sorted(path.stem for path in presets.PRESETS.glob("*.yaml"))


def weights_of_block(randn, prefix=""):
    shapes = {f"attn.{name}_proj.weight": (D_MODEL, D_MODEL) for name in ("q", "k", "v", "output")}
    shapes |= {
        "ffn.w1.weight": (D_FF, D_MODEL),
        "ffn.w2.weight": (D_MODEL, D_FF),
        "ffn.w3.weight": (D_FF, D_MODEL),
    }
    shapes |= {"ln1.weight": (D_MODEL,), "ln2.weight": (D_MODEL,)}
    return {prefix + name: randn(*shape) / 2 for name, shape in shapes.items()}


def weights_of_lm(randn):
    weights = {
        "token_embeddings.weight": randn(VOCAB, D_MODEL),
        "ln_final.weight": randn(D_MODEL),
        "lm_head.weight": randn(VOCAB, D_MODEL) / 2,
    }
    for i in range(N_LAYERS):
        weights |= weights_of_block(randn, prefix=f"layers.{i}.")
    return weights


def some_tokens(*shape):
    return torch.randint(VOCAB, shape)


def randomized(settings, dtype=torch.float64):
    """A model in evaluation, no two of whose parameters are alike, norms and biases included."""
    lm = model.TransformerLM(settings, dtype=dtype).eval()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.4)
    return lm


@pytest.fixture
def run_block(adapters):
    return lambda x, **weights: adapters.run_transformer_block(
        D_MODEL, N_HEADS, D_FF, CONTEXT, THETA, weights, x
    )


@pytest.fixture
def run_lm(adapters):
    return lambda tokens, **weights: adapters.run_transformer_lm(
        VOCAB, CONTEXT, D_MODEL, N_LAYERS, N_HEADS, D_FF, THETA, weights, tokens
    )


# --------------------------------------------------------------------------------------------------
# Oracle: torch


def test_post_norm_block_matches_torch(randn, oracle):
    settings = config.ModelConfig(
        d_model=D_MODEL, n_heads=N_HEADS, d_ff=D_FF, norm_placement="post", position="none", norm_eps=1e-2
    )
    weights, x = weights_of_block(randn), randn(2, SEQ, D_MODEL)
    block = model.TransformerBlock(settings, dtype=torch.float64)
    block.load_state_dict(weights)
    q, k, v, o, w1, w2, w3, gain1, gain2 = weights.values()
    middle = tF.rms_norm(x + oracle.attention(x, q, k, v, o, N_HEADS), (D_MODEL,), gain1, 1e-2)
    expected = tF.rms_norm(middle + oracle.ffn(middle, w1, w2, w3), (D_MODEL,), gain2, 1e-2)
    torch.testing.assert_close(block(x), expected)


# --------------------------------------------------------------------------------------------------
# Oracle: transformers


def gpt2_names(theirs):
    """Tensors named as in transformers' GPT-2, under our names. Its matrices are (d_in, d_out)."""
    ours = {
        "token_embeddings.weight": theirs["transformer.wte.weight"],
        "position_embeddings.weight": theirs["transformer.wpe.weight"],
        "ln_final.weight": theirs["transformer.ln_f.weight"],
        "ln_final.bias": theirs["transformer.ln_f.bias"],
    }
    for i in range(GPT2.n_layers):
        for kind in ("weight", "bias"):
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"):
                source = theirs[f"transformer.h.{i}.{name}.{kind}"]
                source = source.T if source.dim() == 2 else source
                if name == "attn.c_attn":
                    for part, rows in zip("qkv", source.chunk(3), strict=True):
                        ours[f"layers.{i}.attn.{part}_proj.{kind}"] = rows
                else:
                    ours[f"layers.{i}.{GPT2_NAMES[name]}.{kind}"] = source
    return ours


GPT2_NAMES = {
    "attn.c_proj": "attn.output_proj",
    "mlp.c_fc": "ffn.w1",
    "mlp.c_proj": "ffn.w2",
    "ln_1": "ln1",
    "ln_2": "ln2",
}
LLAMA_NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "ffn.w1",
    "mlp.up_proj": "ffn.w3",
    "mlp.down_proj": "ffn.w2",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
}


def llama_names(theirs):
    """Tensors named as in transformers' Llama, under our names.

    Its RoPE turns feature i together with feature i + d_head/2, ours neighbours: same pairs, other order.
    """
    ours = {
        "token_embeddings.weight": theirs["model.embed_tokens.weight"],
        "ln_final.weight": theirs["model.norm.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for i in range(LLAMA.n_layers):
        for name, our_name in LLAMA_NAMES.items():
            weight = theirs[f"model.layers.{i}.{name}.weight"]
            if our_name in ("attn.q_proj", "attn.k_proj"):
                weight = rearrange(
                    weight, "(heads pair half) d -> (heads half pair) d", pair=2, half=LLAMA.d_head // 2
                )
            ours[f"layers.{i}.{our_name}.weight"] = weight
    return ours


def gpt2_of_transformers(transformers):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=CONTEXT,
            n_embd=GPT2.d_model,
            n_layer=GPT2.n_layers,
            n_head=GPT2.n_heads,
            layer_norm_epsilon=1e-3,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        )
    )


def llama_of_transformers(transformers):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            max_position_embeddings=CONTEXT,
            hidden_size=LLAMA.d_model,
            intermediate_size=D_FF,
            num_hidden_layers=LLAMA.n_layers,
            num_attention_heads=LLAMA.n_heads,
            num_key_value_heads=LLAMA.n_kv_heads,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            attn_implementation="eager",
        )
    )


@pytest.mark.parametrize(
    "settings, make, our_names",
    [(LLAMA, llama_of_transformers, llama_names), (GPT2, gpt2_of_transformers, gpt2_names)],
    ids=["llama", "gpt2"],
)
def test_lm_matches_transformers(settings, make, our_names):
    theirs = make(pytest.importorskip("transformers")).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    settings = dataclasses.replace(settings, norm_eps=1e-3, rope_theta=THETA)
    ours = model.TransformerLM(settings).eval()
    weights = our_names(theirs.state_dict())
    if settings.tie_embeddings:
        weights["lm_head.weight"] = weights["token_embeddings.weight"]
    ours.load_state_dict(weights)

    tokens, targets = some_tokens(3, CONTEXT), some_tokens(3, CONTEXT)
    our_logits, their_logits = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(our_logits, their_logits, **TRANSFORMERS_TOLERANCE)
    # summed, so that the smallest gradients stand well above the tolerance
    F.cross_entropy(our_logits, targets, reduction="sum").backward()
    tF.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    expected = our_names({name: parameter.grad for name, parameter in theirs.named_parameters()})
    actual = {name: parameter.grad for name, parameter in ours.named_parameters()}
    torch.testing.assert_close(actual, expected, **TRANSFORMERS_TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Property: what the model sees


def test_logits_see_tokens_up_to_their_own_and_never_later_ones(run_lm, randn):
    weights, tokens = weights_of_lm(randn), torch.arange(3, 3 + SEQ)  # each token stands for its position

    def logits(embeddings):
        return run_lm(tokens[None], **(weights | {"token_embeddings.weight": embeddings}))[0]

    jacobian = torch.autograd.functional.jacobian(logits, weights["token_embeddings.weight"])
    seen = jacobian.abs().sum((1, 3))
    assert torch.equal(seen[:, tokens] > 1e-6, torch.ones(SEQ, SEQ).tril().bool())
    assert seen[:, tokens].triu(1).max() == 0
    assert seen[:, :3].max() == 0 and seen[:, 3 + SEQ :].max() == 0


def test_logits_of_a_prefix_are_a_prefix_of_the_logits(run_lm, randn):
    weights, tokens = weights_of_lm(randn), some_tokens(2, CONTEXT)
    torch.testing.assert_close(run_lm(tokens[:, :4], **weights), run_lm(tokens, **weights)[:, :4])


def test_sequences_of_a_batch_are_independent(run_lm, randn):
    weights, tokens = weights_of_lm(randn), some_tokens(3, SEQ)
    alone = torch.cat([run_lm(row[None], **weights) for row in tokens])
    torch.testing.assert_close(run_lm(tokens, **weights), alone)


def test_lm_keeps_dtype_and_device(run_lm, randn):
    weights = weights_of_lm(randn)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        own = {name: weight.to(dtype) for name, weight in weights.items()}
        assert run_lm(some_tokens(2, SEQ), **own).dtype == dtype
    own = {name: weight.to("meta") for name, weight in weights.items()}
    assert run_lm(some_tokens(2, SEQ).to("meta"), **own).device.type == "meta"


@FAMILIES
def test_order_of_tokens_matters(settings):
    logits = randomized(settings)(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_without_positions_the_last_logits_see_a_bag_of_tokens():
    lm = randomized(dataclasses.replace(LLAMA, position="none", n_layers=1))
    logits = lm(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    torch.testing.assert_close(logits[0], logits[1])


@FAMILIES
def test_positions_can_be_given(settings):
    lm, tokens = randomized(settings), some_tokens(2, SEQ)
    torch.testing.assert_close(lm(tokens, torch.arange(SEQ)), lm(tokens))
    assert (lm(tokens, torch.arange(SEQ) * 2) - lm(tokens)).abs().max() > 1e-2


@FAMILIES
def test_dropout_acts_in_training_only(settings):
    lm, tokens = model.TransformerLM(dataclasses.replace(settings, dropout=0.5)), some_tokens(2, SEQ)
    assert not torch.equal(lm(tokens), lm(tokens))
    without = model.TransformerLM(settings).eval()
    without.load_state_dict(lm.state_dict())
    torch.testing.assert_close(lm.eval()(tokens), without(tokens))


def test_dropout_acts_on_embeddings_attention_and_both_sublayers(monkeypatch):
    dropped = []
    monkeypatch.setattr(F, "dropout", lambda x, p: dropped.append((tuple(x.shape), p)) or x)
    model.TransformerLM(dataclasses.replace(LLAMA, dropout=0.3))(some_tokens(2, SEQ))
    residual, probabilities = ((2, SEQ, 24), 0.3), ((2, 6, SEQ, SEQ), 0.3)
    assert dropped == [residual] + 2 * [probabilities, residual, residual]


@FAMILIES
def test_longer_text_than_the_context_is_refused(settings):
    with pytest.raises(ValueError, match="the model sees 16 tokens at most, got 17"):
        model.TransformerLM(settings)(some_tokens(1, CONTEXT + 1))


# --------------------------------------------------------------------------------------------------
# Property: weights


def test_queries_and_keys_are_normalized_if_asked():
    names = set(model.TransformerLM(dataclasses.replace(LLAMA, qk_norm=True)).state_dict())
    new = {f"layers.{i}.attn.{name}_norm.weight" for i in range(2) for name in "qk"}
    assert names - set(model.TransformerLM(LLAMA).state_dict()) == new


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_are_tied_only_if_asked(tie):
    lm = model.TransformerLM(dataclasses.replace(LLAMA, tie_embeddings=tie))
    assert (lm.lm_head.weight is lm.token_embeddings.weight) == tie
    assert lm.n_parameters() == sum(p.numel() for p in lm.state_dict().values()) - tie * VOCAB * 24


@FAMILIES
@pytest.mark.parametrize("tie", [False, True])
def test_first_loss_is_near_that_of_a_uniform_guess(settings, tie):
    settings = dataclasses.replace(settings, vocab_size=1000, d_model=96, tie_embeddings=tie)
    tokens = torch.randint(1000, (8, CONTEXT))
    loss = F.cross_entropy(model.TransformerLM(settings)(tokens[:, :-1]), tokens[:, 1:]).item()
    assert math.log(1000) - 0.2 < loss < math.log(1000) + 0.5


def test_initial_weights_of_gpt2():
    lm = model.TransformerLM(
        dataclasses.replace(GPT2, vocab_size=300, context_length=80, d_model=96, n_layers=8)
    )
    for name, parameter in lm.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            into_residual = "output_proj" in name or "w2" in name
            std = 0.02 / math.sqrt(2 * 8) if into_residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert parameter.abs().max() > 3.1 * std, f"{name} is cut"


@pytest.mark.parametrize("tie", [False, True])
def test_initial_weights_of_llama(tie):
    lm = model.TransformerLM(
        dataclasses.replace(LLAMA, vocab_size=300, d_model=96, d_ff=200, tie_embeddings=tie)
    )
    cut = 0.98658  # std of a standard normal distribution cut at 3
    for name, parameter in lm.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            embeds = name == "token_embeddings.weight" and not tie
            std = 1.0 if embeds else math.sqrt(2 / sum(parameter.shape))
            assert parameter.std().item() == pytest.approx(cut * std, rel=0.05), name


# --------------------------------------------------------------------------------------------------
# Property: size


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_build(preset):
    settings = presets.load(preset).model
    lm = model.TransformerLM(settings, device="meta")
    logits = lm(torch.zeros(1, settings.context_length, dtype=torch.long, device="meta"))
    assert logits.shape == (1, settings.context_length, settings.vocab_size)


@pytest.mark.parametrize(
    "preset, n_parameters",
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("ts-17m", 2 * 10_000 * 512 + 4 * (4 * 512**2 + 3 * 512 * 1344 + 2 * 512) + 512),
    ],
)
def test_parameters_are_counted_exactly(preset, n_parameters):
    assert model.TransformerLM(presets.load(preset).model, device="meta").n_parameters() == n_parameters


@FAMILIES
def test_flops_per_token_by_hand(settings):
    d_kv = 8 if settings is LLAMA else 24
    attention = 24 * 24 + 2 * 24 * d_kv + 24 * 24
    ffn = 3 * 24 * D_FF if settings is LLAMA else 2 * 24 * 96
    weights = 2 * (attention + ffn) + 24 * VOCAB
    scores_and_mixtures = 2 * 2 * (24 * CONTEXT) * 2  # multiply and add; in two products; in two layers
    assert model.TransformerLM(settings).flops_per_token() == 3 * (2 * weights + scores_and_mixtures)


def test_print_of_a_model_tells_its_size():
    lm = model.TransformerLM(LLAMA)
    text = str(lm)
    assert text.startswith("TransformerLM(\n")
    for detail in (
        f"{lm.n_parameters():,} parameters",
        f"{lm.flops_per_token():,} FLOPs per token",
        "2 layers, d_model=24, context_length=16",
        "(token_embeddings): Embedding(23 ids -> 24)",
        "6 heads, 2 key/value heads, d_head=4",
        "(lm_head): Linear(24 -> 23)",
    ):
        assert detail in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_model": 100, "n_heads": 12}, "model.d_model must be divisible by model.n_heads, got 100 and 12"),
        ({"d_model": 100, "n_heads": 12}, "try d_model 96 or 108"),
        ({"n_heads": 4, "n_kv_heads": 3}, "model.n_heads must be divisible by model.n_kv_heads, got 4 and 3"),
        (
            {"d_model": 12, "n_heads": 4},
            "d_model / n_heads must be even with position rope, got 3 from d_model 12",
        ),
        ({"n_layers": 0}, "model.n_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, "model.dropout must be at least 0 and below 1, got 1.0"),
        ({"bias": True}, "model.bias must be off with ffn swiglu"),
    ],
)
def test_shapes_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config.ModelConfig(**options)


# --------------------------------------------------------------------------------------------------
# Snapshot


@pytest.fixture
def frozen_lm(snapshot):
    arrays = snapshot("transformer_lm")
    weights = {k.removeprefix("weights."): w for k, w in arrays.items() if k.startswith("weights.")}
    return arrays, weights


def test_lm_snapshot(run_lm, frozen_lm):
    arrays, weights = frozen_lm
    torch.testing.assert_close(run_lm(arrays["tokens"], **weights), arrays["logits"], **SNAPSHOT_TOLERANCE)


def test_block_snapshot(run_block, frozen_lm):
    arrays, weights = frozen_lm
    first = {k.removeprefix("layers.0."): w for k, w in weights.items() if k.startswith("layers.0.")}
    torch.testing.assert_close(
        run_block(arrays["embedded"], **first), arrays["first_block"], **SNAPSHOT_TOLERANCE
    )


# --------------------------------------------------------------------------------------------------
# Parity


@FAMILIES
@pytest.mark.parametrize("chunks", [[CONTEXT], [1] * CONTEXT, [5, 1, 1, 9]], ids=str)
def test_cached_logits_equal_uncached_ones(settings, chunks):
    lm, tokens = randomized(settings), some_tokens(2, CONTEXT)
    caches = lm.make_kv_caches(batch=2)
    logits = torch.cat([lm(chunk, caches=caches) for chunk in tokens.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, lm(tokens))


@FAMILIES
def test_cache_refuses_more_than_the_context(settings):
    lm, tokens = randomized(settings), some_tokens(1, CONTEXT)
    caches = lm.make_kv_caches(batch=1)
    lm(tokens, caches=caches)
    with pytest.raises(ValueError, match="the model sees 16 tokens at most, got 17"):
        lm(tokens[:, :1], caches=caches)


@FAMILIES
def test_caches_follow_the_model(settings):
    lm = model.TransformerLM(settings, device="meta", dtype=torch.bfloat16)
    caches = lm.make_kv_caches(batch=3)
    assert len(caches) == 2 and all(isinstance(cache, layers.KVCache) for cache in caches)
    for cache in caches:
        assert cache.keys.shape == (3, settings.n_kv_heads or settings.n_heads, CONTEXT, 4)
        assert (cache.keys.device.type, cache.keys.dtype) == ("meta", torch.bfloat16)


def test_every_norm_has_the_eps_of_the_config():
    shape = config.ModelConfig(50, 8, 16, 2, 2, norm_eps=1e-2, qk_norm=True)
    eps = [module.eps for module in model.TransformerLM(shape).modules() if hasattr(module, "eps")]
    assert eps == [1e-2] * (2 * 4 + 1)
