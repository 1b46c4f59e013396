"""The language model: embed the tokens, refine them block by block, normalize, score the vocabulary."""

import dataclasses
import math

import torch

# what the first optimizer imports, before the time limit of a probe starts
import torch._dynamo  # noqa: F401
from torch import nn
from torch.func import functional_call
from torch.nn import functional as tF

from llm_basics.core import layers, model
from llm_basics.learn import grids, probes
from llm_basics.learn.mistakes import block, multi_head

step = probes.Step("transformer")
draw = probes.numbers(seed=1)

VOCAB, CONTEXT, D_MODEL, N_LAYERS, N_HEADS, D_FF, THETA = 23, 8, 12, 3, 3, 20, 500.0
SIZES = (VOCAB, CONTEXT, D_MODEL, N_LAYERS, N_HEADS, D_FF, THETA)
# distinct in each text, including 0; shorter than the context
TOKENS = torch.tensor([[5, 0, 17, 3, 22, 9], [11, 2, 8, 0, 19, 4]])
FULL = torch.tensor([[5, 0, 17, 3, 22, 9, 1, 14]])


# --------------------------------------------------------------------------------------------------
# What is right


def lm(tokens, theta=THETA, positions=None, **weights):
    """The model by torch; `weights` as in its state dict. Learned positions if there are weights for
    them."""
    x = tF.embedding(tokens, weights["token_embeddings.weight"])
    if "position_embeddings.weight" in weights:
        table, theta = weights["position_embeddings.weight"], None
        x = x + table[torch.arange(tokens.shape[-1]) if positions is None else positions]
    for i in range(N_LAYERS):
        prefix = f"layers.{i}."
        own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        x = block.block(x, N_HEADS, theta, positions, **own)
    x = tF.rms_norm(x, x.shape[-1:], weights["ln_final.weight"], block.EPS)
    return tF.linear(x, weights["lm_head.weight"])


def weights(**more):
    drawn = {
        "token_embeddings.weight": draw(VOCAB, D_MODEL),
        "ln_final.weight": 1 + 0.3 * draw(D_MODEL),
        "lm_head.weight": draw(VOCAB, D_MODEL) / 2,
    }
    for i in range(N_LAYERS):
        drawn |= {f"layers.{i}.{name}": w for name, w in block.weights(draw, D_MODEL, D_FF).items()}
    return drawn | more


def n_parameters(tied):
    attention, ffn, norms = 4 * D_MODEL**2, 3 * D_MODEL * D_FF, 2 * D_MODEL
    return N_LAYERS * (attention + ffn + norms) + D_MODEL + (2 - tied) * VOCAB * D_MODEL


# --------------------------------------------------------------------------------------------------
# Probes: the logits


def count(a, **choices):
    return sum(parameter.numel() for parameter in a.get_transformer_lm(*SIZES, **choices).parameters())


# first, since all following probes fail with an error if weights are shared or not registered
step.value("number of weights", count, n_parameters(tied=False))


def run(a, tokens, **weights):
    return a.run_transformer_lm(*SIZES, weights, tokens)


def given(a, weights, *inputs, **choices):
    """The logits of a model with these choices of its config."""
    lm = a.get_transformer_lm(*SIZES, **choices)
    buffers = dict(lm.named_buffers(remove_duplicate=False))
    return functional_call(lm, {**buffers, **weights}, inputs, strict=True)


def seen(a):
    """Which logits, rows, change with which token, columns."""
    n = FULL.shape[1]
    changed = torch.where(torch.eye(n, dtype=torch.bool), 20, FULL)
    logits = run(a, torch.cat([FULL, changed]), **SIGHT_WEIGHTS).detach()
    return ((logits[1:] - logits[0]).abs().flatten(2).amax(-1) > 1e-4).T


SIGHT_WEIGHTS = weights()
step.value(
    "which logits depend on which token: its own and all earlier ones",
    seen,
    torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril(),
    axes="position token",
    words=multi_head.visibility_difference,
    contract="transformer",
)

step.compare(
    "logits of short texts",
    run,
    lm,
    {"tokens": TOKENS},
    weights(),
    contract="transformer",
    axes="batch position token",
    rtol=1e-3,
    atol=1e-3,
)

step.compare(
    "logits of a text that fills the context",
    run,
    lm,
    {"tokens": FULL},
    weights(),
    contract="transformer",
    axes="batch position token",
    rtol=1e-3,
    atol=1e-3,
    gradients=False,
)

SILENT = {
    name: weight * (not name.endswith(("output_proj.weight", "w2.weight")))
    for name, weight in SIGHT_WEIGHTS.items()
}
TINY = 7e-3 * tF.rms_norm(SILENT["token_embeddings.weight"], (D_MODEL,))
# mean squares of 5e-5, as in the block's probe of its norms
step.compare(
    "a stream near zero, where the eps of the final norm matters",
    run,
    lm,
    {"tokens": TOKENS},
    SILENT | {"token_embeddings.weight": TINY},
    axes="batch position token",
    rtol=0.03,
    atol=0.02,
    gradients=False,
    beyond="the eps of the norms is no parameter of the public function; pretrained weights have 1e-5",
)


# --------------------------------------------------------------------------------------------------
# Probes: a new model


def first_loss(a, **choices):
    """In words, since it differs a little with the initial weights."""
    lm = a.get_transformer_lm(1000, 16, 48, 2, 3, 64, THETA, **choices)
    tokens = torch.randint(1000, (8, 17), generator=torch.Generator().manual_seed(3))
    loss = tF.cross_entropy(lm(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
    excess = loss - math.log(1000)
    return "near ln V" if -0.3 < excess < 0.7 else "above ln V" if excess > 0 else "below ln V"


step.value("the initial loss, near that of a uniform guess", first_loss, "near ln V")


def initial_state(a):
    """The std of each matrix and the mean of each gain, relative to the expected values."""
    state = {}
    for name, parameter in a.get_transformer_lm(300, 16, 48, 2, 3, 96, THETA).named_parameters():
        if parameter.dim() == 1:
            state[name] = parameter.mean().item()
        else:
            expected = 1 if name.startswith("token_embeddings") else math.sqrt(2 / sum(parameter.shape))
            state[name] = parameter.std().item() / expected
    return dict(sorted(state.items()))


PARAMETERS = sorted(
    ["token_embeddings.weight", "ln_final.weight", "lm_head.weight"]
    + [f"layers.{i}.{name}" for i in range(2) for name in block.weights(probes.numbers(seed=0))]
)
step.value(
    "initial weights: names, and std relative to the right one (gains: mean)",
    initial_state,
    dict.fromkeys(PARAMETERS, 1.0),
    rtol=0.1,
)


def without_gradient(a, **choices):
    """The parameters that a loss does not reach."""
    lm = a.get_transformer_lm(*SIZES, **choices)
    tF.cross_entropy(lm(FULL[:, :-1]).flatten(0, 1), FULL[:, 1:].flatten()).backward()
    return [name for name, p in lm.named_parameters() if p.grad is None or not p.grad.any()]


def nothing_reaches(expected, actual):
    shown = ", ".join(actual[:3]) + (f" and {len(actual) - 3} more" if len(actual) > 3 else "")
    return f"no gradient reaches {shown}"


step.value("gradients reach every weight", without_gradient, [], words=nothing_reaches)


def loss_by_heart(a):
    """Whether a tiny model has learned one batch, in which a token alone does not determine the next."""
    lm = a.get_transformer_lm(5, 8, 16, 1, 2, 24, THETA)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.02, weight_decay=0.0)
    tokens = torch.tensor([[0, 1, 0, 2, 0, 3, 1, 4, 1], [2, 2, 3, 2, 4, 3, 0, 3, 3]])
    for _ in range(30):
        loss = tF.cross_entropy(lm(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item() < 0.5


step.value(
    "it can memorize one batch",
    loss_by_heart,
    True,
    words=lambda expected, actual: "after 30 steps of AdamW on one batch the loss is not near 0",
)


# --------------------------------------------------------------------------------------------------
# Probes: choices of the config

step.compare(
    "given positions",
    lambda a, tokens, positions, **weights: given(a, weights, tokens, positions),
    lm,
    {"tokens": TOKENS, "positions": torch.tensor([[0, 1, 3, 4, 6, 7]])},
    weights(),
    axes="batch position token",
    rtol=1e-3,
    atol=1e-3,
    gradients=False,
)

step.compare(
    "learned positions",
    lambda a, tokens, **weights: given(a, weights, tokens, position="learned"),
    lm,
    {"tokens": TOKENS},
    weights(**{"position_embeddings.weight": draw(CONTEXT, D_MODEL)}),
    axes="batch position token",
    rtol=1e-3,
    atol=1e-3,
)

step.value(
    "number of weights with tied embeddings",
    lambda a: count(a, tie_embeddings=True),
    n_parameters(tied=True),
)

step.value("the initial loss with tied embeddings", lambda a: first_loss(a, tie_embeddings=True), "near ln V")


def in_chunks(a, tokens, **weights):
    lm = a.get_transformer_lm(*SIZES).to(weights["lm_head.weight"].dtype)
    lm.load_state_dict(weights)
    caches = lm.make_kv_caches(1)
    return torch.cat([lm(chunk, caches=caches) for chunk in tokens.split([3, 1, 4], dim=1)], dim=1)


step.compare(
    "a text in chunks of 3, 1 and 4 tokens, with caches",
    in_chunks,
    lm,
    {"tokens": FULL},
    weights(),
    axes="batch position token",
    rtol=1e-3,
    atol=1e-3,
    gradients=False,
)


def is_random(a):
    """Whether two passes with dropout differ."""
    lm = a.get_transformer_lm(*SIZES, dropout=0.5)
    differ = {}
    for name, is_training in (("in training", True), ("in evaluation", False)):
        lm.train(is_training)
        differ[name] = not torch.equal(lm(TOKENS), lm(TOKENS))
    return differ


step.value("dropout acts in training only", is_random, {"in training": True, "in evaluation": False})


def too_long(a):
    try:
        logits = a.get_transformer_lm(*SIZES)(torch.cat([FULL, FULL], dim=1))
    except NotImplementedError:
        raise
    except Exception:
        return "refused"
    return f"logits for {logits.shape[1]} positions"


step.value("a text of 16 tokens for a model that sees 8", too_long, "refused")


# --------------------------------------------------------------------------------------------------
# Mistakes


class Parts(model.TransformerLM):
    """The model in parts, of which each mistake replaces one."""

    def forward(self, tokens, token_positions=None, caches=None):
        start = caches[0].length if caches else 0
        end = start + tokens.shape[-1]
        if token_positions is None:
            if end > self.config.context_length:
                raise ValueError("too long")
            token_positions = torch.arange(start, end)
        x = self.dropout(self.embed(tokens, token_positions))
        return self.head(self.through_blocks(x, token_positions, caches))

    def embed(self, tokens, positions):
        x = self.token_embeddings(tokens)
        return x + self.position_embeddings(positions) if self.position_embeddings is not None else x

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(self.layers):
            x = one(x, positions, caches[i] if caches else None)
        return x

    def head(self, x):
        return self.lm_head(self.ln_final(x))


# the head


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class FinalNormMissing(Parts):
    """The residual stream goes to the output projection without ln_final, whose gain never learns. The stream
    grows with depth, and the logits with it. Normalize it first."""

    def head(self, x):
        return self.lm_head(x)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class FinalNormIsABlocksNorm(Parts):
    """The final norm is a norm of the last block instead of ln_final, which never learns. Gains are all 1 at
    initialization, which hides it at first."""

    def head(self, x):
        return self.lm_head(self.layers[-1].ln2(x))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class FinalNormTwice(Parts):
    """ln_final is applied twice, perhaps once after the blocks and once before the output projection. Gains
    are all 1 at initialization, which hides it at first."""

    def head(self, x):
        return super().head(self.ln_final(x))


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class FinalNormOfAnotherEpsilon(Parts):
    """ln_final has a smaller eps than the norms of the blocks, such as torch's default of 1e-7. It only shows
    where the stream is near zero, and then differs from pretrained weights. Pass norm_eps to all norms."""

    def head(self, x):
        return self.lm_head(tF.rms_norm(x, x.shape[-1:], self.ln_final.weight, 1e-8))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class AxesOfSize1Removed(Parts):
    """squeeze() without an axis removes every axis of size 1, so a batch of one or a single token has another
    shape than any other. The logits must have shape (batch, seq, vocab)."""

    def head(self, x):
        return super().head(x).squeeze()


@step.mistake("model.TransformerLM", source="written for this catalogue")
class WeightsInHalfPrecision(Parts):
    """The weights are rounded to bfloat16, which keeps two to three digits, although the model is float32.
    Keep the dtype that is passed, and leave lower precision to autocast."""

    rounded, dtype = False, torch.bfloat16

    def forward(self, tokens, token_positions=None, caches=None):
        if self.rounded:
            return super().forward(tokens, token_positions, caches)
        self.rounded = True
        weights = {name: p.to(self.dtype).to(p.dtype) for name, p in self.named_parameters()}
        logits = functional_call(self, weights, (tokens, token_positions, caches))
        self.rounded = False
        return logits


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class SoftmaxInside(Parts):
    """The model returns probabilities, and the loss applies softmax to them again, so it cannot fall below
    about ln V - 1, and its gradient is tiny. Return logits."""

    def head(self, x):
        return super().head(x).softmax(-1)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LogProbabilities(Parts):
    """The model returns log-probabilities. The loss is the same, since softmax recovers the probabilities, so
    no loss curve shows it, but everything that needs logits (pretrained weights, z-loss, tests) gets wrong
    values."""

    def head(self, x):
        return super().head(x).log_softmax(-1)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LogitsScaled(Parts):
    """The logits are divided by sqrt(d_model), which belongs to attention scores. The model must learn to
    compensate for it, and pretrained weights do not fit."""

    def head(self, x):
        return super().head(x) / math.sqrt(self.config.d_model)


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class LastLogitsOnly(Parts):
    """Only the logits of the last position are returned, which is enough for generation. Training learns from
    all positions at once; return them all."""

    def head(self, x):
        return super().head(x[:, -1:])


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LastLogitsDropped(Parts):
    """The logits of the last position are dropped, as for targets that are shifted inside the loss. Here
    targets are already shifted in the batch, and generation needs exactly the last position."""

    def head(self, x):
        return super().head(x)[:, :-1]


@step.mistake("model.TransformerLM", source="written for this catalogue")
class VocabularyInTheMiddle(Parts):
    """The logits have shape (batch, vocab, seq), which torch's cross_entropy expects. Everything else here
    expects (batch, seq, vocab); flatten or transpose where the loss is computed."""

    def head(self, x):
        return super().head(x).mT


@step.mistake("model.TransformerLM", source="written for this catalogue")
class EmbeddingAsHead(Parts):
    """The logits are dot products with the token embeddings, and lm_head never learns, although
    tie_embeddings is off. Use lm_head."""

    def head(self, x):
        return tF.linear(self.ln_final(x), self.token_embeddings.weight)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LastStateDetached(Parts):
    """The logits are correct, but no gradient passes below the output projection: blocks and embeddings keep
    their initial weights, while the loss still falls a little. Look for detach, .data or no_grad."""

    def head(self, x):
        return self.lm_head(self.ln_final(x).detach())


# the blocks


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LastBlockSkipped(Parts):
    """The loop ends one block early, so the weights of the last block never learn. Iterate over the blocks
    themselves instead of a range of indices."""

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(self.layers[:-1]):
            x = one(x, positions, caches[i] if caches else None)
        return x


@step.mistake("model.TransformerLM", source="written for this catalogue")
class FirstBlockSkipped(Parts):
    """The loop starts at the second block, so the weights of the first block never learn. Count from 0, or
    iterate over the blocks themselves."""

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(self.layers[1:]):
            x = one(x, positions, caches[i] if caches else None)
        return x


@step.mistake("model.TransformerLM", source="written for this catalogue")
class BlocksReversed(Parts):
    """The blocks run from last to first. A new model learns just as well, so no loss curve shows it, but
    pretrained weights do not fit."""

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(reversed(self.layers)):
            x = one(x, positions, caches[i] if caches else None)
        return x


@step.mistake("model.TransformerLM", source="written for this catalogue")
class FirstBlockUsedThroughout(Parts):
    """The first block runs n_layers times, and the others never do. The model learns nearly as well, so only
    their missing gradients show it. Use the loop variable."""

    def through_blocks(self, x, positions, caches):
        for i in range(len(self.layers)):
            x = self.layers[0](x, positions, caches[i] if caches else None)
        return x


@step.mistake("model.TransformerLM", source="written for this catalogue")
class OneBlockMade(Parts):
    """`[block] * n_layers` is the same block n times: all layers share their weights, and the model has far
    fewer parameters than configured. Create a new block for each layer."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        self.layers = nn.ModuleList([self.layers[0]] * config.n_layers)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class BlocksInAPlainList(Parts):
    """The blocks are in a Python list, in which torch does not register modules: parameters() lacks them, so
    they are never trained, saved or moved to a device. Use nn.ModuleList."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        blocks = list(self.layers)
        del self.layers
        self.layers = blocks


@step.mistake("model.TransformerLM", source="written for this catalogue")
class EveryBlockReadsTheEmbedding(Parts):
    """Each block gets the embeddings instead of the output of the previous block, so only the last block
    counts. Assign the output of each block to the variable that the next one reads."""

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(self.layers):
            result = one(x, positions, caches[i] if caches else None)
        return result


# the embedding


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class EmbeddingScaled(Parts):
    """The embeddings are multiplied by sqrt(d_model), as in the original transformer, but not in this config.
    The outputs of the blocks are then small beside them, and pretrained weights do not fit."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions) * math.sqrt(self.config.d_model)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class EmbeddingNormalized(Parts):
    """The embeddings are normalized before the first block, which normalizes its input itself. That changes
    their scale in the residual stream, and pretrained weights do not fit."""

    def embed(self, tokens, positions):
        return tF.rms_norm(super().embed(tokens, positions), (self.config.d_model,))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class EmbeddingDetached(Parts):
    """The logits are correct, but no gradient reaches the embeddings, which keep their initial values. The
    loss falls nearly as well; look for detach, .data or no_grad."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions).detach()


@step.mistake("model.TransformerLM", source="written for this catalogue")
class TokenZeroIsPadding(Parts):
    """Token 0 never learns, as with padding_idx=0 of nn.Embedding. Here it is an ordinary token; leave
    padding_idx out."""

    def embed(self, tokens, positions):
        x = super().embed(tokens, positions)
        return torch.where(tokens[..., None] == 0, x.detach(), x)


# positions


@step.mistake("model.TransformerLM", source="public solutions of CS336; passes its suite")
class ThetaIgnored(Parts):
    """RoPE uses the default theta instead of that of the config. Pass rope_theta on; models with long
    contexts use larger values."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(dataclasses.replace(config, rope_theta=10000.0), device, dtype)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class NoRope(Parts):
    """The blocks are created without RoPE, so the model has no positions except those implied by the causal
    mask. The loss falls, but less. Pass the rotary embedding to each block."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for one in self.layers:
            one.attn.rope = None


@step.mistake("model.TransformerLM", source="written for this catalogue")
class PositionsNotHandedOn(Parts):
    """token_positions is not passed to the blocks, so attention counts from 0. That is right for whole
    sequences, and wrong if positions are given. Pass them to each block."""

    def through_blocks(self, x, positions, caches):
        return super().through_blocks(x, None, caches)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LearnedPositionsNotAdded(Parts):
    """The learned position embeddings are created but never added to the token embeddings, so the model has
    no positions except those implied by the causal mask. Add position_embeddings(positions)."""

    def embed(self, tokens, positions):
        return self.token_embeddings(tokens)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LearnedPositionsReversed(Parts):
    """Learned positions count from the end of the sequence, so a token's position changes with each token
    that follows, which leaks the future. Count from the start: arange(seq)."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions.flip(-1))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LearnedPositionsFromOne(Parts):
    """Learned positions count from 1, so the first row is never trained, and a sequence that fills the
    context needs a row that does not exist. Count from 0."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions + 1)


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class PositionsNotCutToTheInput(Parts):
    """All context_length position embeddings are added, whatever the length of the sequence, which fails or
    broadcasts unless it fills the context. Slice the table to the length of the input."""

    def forward(self, tokens, token_positions=None, caches=None):
        if self.position_embeddings is None or tokens.shape[-1] == self.config.context_length:
            return super().forward(tokens, token_positions, caches)
        return self.token_embeddings(tokens) + self.position_embeddings.weight


# the start, tied weights


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class TiedWhenNotAsked(Parts):
    """Embedding and output projection share one matrix, although tie_embeddings is False. The model has fewer
    parameters than configured, and pretrained weights do not fit."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(dataclasses.replace(config, tie_embeddings=True), device, dtype)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class NotTiedWhenAsked(Parts):
    """tie_embeddings is True, but embedding and output projection are two matrices; perhaps the values were
    copied. Both must be the same nn.Parameter."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(dataclasses.replace(config, tie_embeddings=False), device, dtype)


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class TiedWithStd1(Parts):
    """The tied matrix is initialized as an embedding, with std 1, so logits have a std of about
    sqrt(d_model), and the first loss is far above ln V. Initialize it as an output projection."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        if config.tie_embeddings:
            layers.init_truncated_normal_(self.lm_head.weight, std=1.0)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class AllMatricesOfStd1(Parts):
    """Every matrix is initialized with std 1, as by torch.randn. Logits are then far too large, the first
    loss is far above ln V, and the softmax is saturated. Use std sqrt(2 / (d_in + d_out))."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class AllMatricesOfStd002(Parts):
    """Every matrix is initialized with std 0.02, as in GPT-2, but in this config the std depends on the
    matrix's shape. Small models then learn very slowly at first."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class TorchsDefaultStart(Parts):
    """The matrices are initialized like nn.Linear, uniformly with std 1 / sqrt(3 d_in), which for square
    matrices is 0.58 of what is required. Use a normal distribution with std sqrt(2 / (d_in + d_out))."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith(("token", "position")):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class GainsFromZero(Parts):
    """The gains of the norms are initialized to 0, so all sublayers and logits are 0. Nearly all gradients
    are 0 too, and the model hardly learns. Initialize them to 1."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)


# caches, dropout, length


@step.mistake("model.TransformerLM", source="written for this catalogue")
class CachesNotHandedOn(Parts):
    """The caches are not passed to the blocks, so each chunk is treated as a separate sequence, and in
    generation the model forgets all earlier tokens. Pass one cache to each block."""

    def through_blocks(self, x, positions, caches):
        return super().through_blocks(x, positions, None)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class OneCacheForAllBlocks(Parts):
    """All blocks write to the same cache, so each sees the keys of the others as if they were earlier tokens.
    It overflows, or samples are nonsense. Use one cache per block."""

    def through_blocks(self, x, positions, caches):
        return super().through_blocks(x, positions, caches and [caches[0]] * len(self.layers))


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class CachedPositionsRestart(Parts):
    """With caches the positions of each chunk start at 0 again, so new tokens are rotated as if they came
    first. Continue from the length of the cache."""

    def through_blocks(self, x, positions, caches):
        return super().through_blocks(x, positions - (caches[0].length if caches else 0), caches)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class DropoutInEvaluation(Parts):
    """Dropout is active in evaluation: losses are too high, samples worse, and two passes differ. Pass
    training=self.training to F.dropout, or use a dropout module."""

    def embed(self, tokens, positions):
        return tF.dropout(super().embed(tokens, positions), self.config.dropout, training=True)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class DropoutNever(Parts):
    """The dropout of the config has no effect in training, since it is not passed on. A model then memorizes
    a small data set sooner."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(dataclasses.replace(config, dropout=0.0), device, dtype)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LongTextsCut(Parts):
    """A sequence longer than the context is silently truncated, so there are fewer logits than tokens. Raise
    an error; generation truncates the sequence beforehand."""

    def forward(self, tokens, token_positions=None, caches=None):
        return super().forward(tokens[..., -self.config.context_length :], token_positions, caches)


# mistakes in a part, seen in the whole
PARTS = {
    "layers.MultiHeadSelfAttention": (
        multi_head.NoCausalMask,
        multi_head.MaskOneTooFar,
        multi_head.MaskOneTooShort,
        multi_head.OnlyItselfIsSeen,
        multi_head.HeadsSplitByView,
        multi_head.NoScale,
        multi_head.ScaledTwice,
        multi_head.ProbabilitiesDetached,
    ),
    "model.TransformerBlock": (
        block.NoResiduals,
        block.ResidualsFromTheNormalizedInput,
        block.PostNorm,
        block.NoNorms,
        block.Parallel,
        block.FfnBeforeAttention,
        block.AttentionDetached,
        block.AttentionSkipped,
    ),
}
SOURCES = {mistake.wrong: mistake.source for mistake in multi_head.step.mistakes + block.step.mistakes}
for piece, wrongs in PARTS.items():
    for wrong in wrongs:
        step.mistake(piece, SOURCES[wrong])(wrong)


# --------------------------------------------------------------------------------------------------
# Mistakes with a parameter that is found from the observations


@step.family("model.TransformerLM", grids.DTYPES, unknown="a dtype of fewer bits")
def weights_in_another_dtype(value):
    """All weights are rounded to {value}, which keeps three digits or fewer, although the model is float32.
    Keep the dtype that is passed, and leave lower precision to autocast."""
    return type("WeightsInAnotherDtype", (WeightsInHalfPrecision,), {"dtype": value})
