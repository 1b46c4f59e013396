"""The language model: embed the tokens, refine them block by block, normalize, score the vocabulary."""

import dataclasses
import math

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as tF

from llm_basics.core import layers, model
from llm_basics.learn import probes
from llm_basics.learn.mistakes import block, multi_head

step = probes.Step("transformer")
draw = probes.numbers(seed=1)

VOCAB, CONTEXT, D_MODEL, N_LAYERS, N_HEADS, D_FF, THETA = 23, 8, 12, 3, 3, 20, 500.0
SIZES = (VOCAB, CONTEXT, D_MODEL, N_LAYERS, N_HEADS, D_FF, THETA)
# no two alike in a text, 0 among them; shorter than the context
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


# first, since weights that are shared or not registered let all that follows fail with an error
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
    "whose logits depend on which token: its own and all earlier ones",
    seen,
    torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril(),
    axes="position token",
    words=multi_head.who_sees_whom,
)

step.compare(
    "logits of short texts",
    run,
    lm,
    {"tokens": TOKENS},
    weights(),
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
    axes="batch position token",
    rtol=1e-3,
    atol=1e-3,
    gradients=False,
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
    """The std of each matrix and the mean of each gain, against what they shall be."""
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
    """Whether a tiny model has learned one batch, in which a token alone does not tell the next."""
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
    """The residual stream goes to the output projection without ln_final, whose gain never learns. The
    stream grows with depth, and the logits with it; normalize it first."""

    def head(self, x):
        return self.lm_head(x)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class FinalNormIsABlocksNorm(Parts):
    """The stream is normalized with a norm of the last block instead of ln_final, which never learns. New
    gains are all 1, which hides it at the start."""

    def head(self, x):
        return self.lm_head(self.layers[-1].ln2(x))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class FinalNormTwice(Parts):
    """ln_final is applied twice, perhaps once after the blocks and once before the output projection. New
    gains are all 1, which hides it at the start."""

    def head(self, x):
        return super().head(self.ln_final(x))


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class SoftmaxInside(Parts):
    """The model returns probabilities, and the loss takes a softmax of them again. It then cannot fall
    below about ln V - 1, and its gradient is tiny; return logits."""

    def head(self, x):
        return super().head(x).softmax(-1)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LogProbabilities(Parts):
    """The model returns log-probabilities. The loss is the same, as a softmax undoes them, so no curve shows
    it, but every reader of logits (pretrained weights, z-loss, tests) is misled."""

    def head(self, x):
        return super().head(x).log_softmax(-1)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LogitsScaled(Parts):
    """The logits are divided by sqrt(d_model), which belongs to attention's scores. The model must outgrow
    it, and pretrained weights do not fit."""

    def head(self, x):
        return super().head(x) / math.sqrt(self.config.d_model)


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class LastLogitsOnly(Parts):
    """Only the last position's logits are returned, which is all that generating needs. Training learns
    from every position at once; return them all."""

    def head(self, x):
        return super().head(x[:, -1:])


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LastLogitsDropped(Parts):
    """The last position's logits are cut off, as for targets that are shifted inside. Here the batch brings
    its targets already shifted, and generating needs just the last."""

    def head(self, x):
        return super().head(x)[:, :-1]


@step.mistake("model.TransformerLM", source="written for this catalogue")
class VocabularyInTheMiddle(Parts):
    """The logits are (batch, vocab, seq), as torch's cross_entropy wants them. All else reads (batch, seq,
    vocab); flatten or transpose where the loss is taken."""

    def head(self, x):
        return super().head(x).mT


@step.mistake("model.TransformerLM", source="written for this catalogue")
class EmbeddingAsHead(Parts):
    """The logits are dot products with the token embeddings, and lm_head never learns, although tied
    embeddings were not configured. Use lm_head."""

    def head(self, x):
        return tF.linear(self.ln_final(x), self.token_embeddings.weight)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LastStateDetached(Parts):
    """The logits are right, but no gradient passes below the output projection: blocks and embeddings keep
    their initial weights while the loss falls a little. Look for detach, .data or no_grad."""

    def head(self, x):
        return self.lm_head(self.ln_final(x).detach())


# the blocks


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LastBlockSkipped(Parts):
    """The loop ends one block too early, so the last one's weights never learn. Loop over the blocks
    themselves, not over a range of numbers."""

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(self.layers[:-1]):
            x = one(x, positions, caches[i] if caches else None)
        return x


@step.mistake("model.TransformerLM", source="written for this catalogue")
class FirstBlockSkipped(Parts):
    """The loop starts at the second block, so the first one's weights never learn. Count from 0, or loop
    over the blocks themselves."""

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(self.layers[1:]):
            x = one(x, positions, caches[i] if caches else None)
        return x


@step.mistake("model.TransformerLM", source="written for this catalogue")
class BlocksReversed(Parts):
    """The blocks run from the last to the first. A new model learns all the same, so no curve shows it, but
    pretrained weights do not fit."""

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(reversed(self.layers)):
            x = one(x, positions, caches[i] if caches else None)
        return x


@step.mistake("model.TransformerLM", source="written for this catalogue")
class FirstBlockUsedThroughout(Parts):
    """The first block is run n_layers times, and the others never. It learns nearly as well, so only their
    missing gradients show it; use the variable of the loop."""

    def through_blocks(self, x, positions, caches):
        for i in range(len(self.layers)):
            x = self.layers[0](x, positions, caches[i] if caches else None)
        return x


@step.mistake("model.TransformerLM", source="written for this catalogue")
class OneBlockMade(Parts):
    """`[block] * n_layers` is one block in n places: all layers share their weights, and the model has far
    fewer than configured. Make a new one for each place."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        self.layers = nn.ModuleList([self.layers[0]] * config.n_layers)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class BlocksInAPlainList(Parts):
    """The blocks are in a Python list, which torch does not look into: parameters() lacks them, so they are
    never trained, saved or moved to a device. Use nn.ModuleList."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        blocks = list(self.layers)
        del self.layers
        self.layers = blocks


@step.mistake("model.TransformerLM", source="written for this catalogue")
class EveryBlockReadsTheEmbedding(Parts):
    """Each block is given the embeddings instead of the result of the block before, so only the last one
    counts. Assign the loop's result to the variable that it reads."""

    def through_blocks(self, x, positions, caches):
        for i, one in enumerate(self.layers):
            result = one(x, positions, caches[i] if caches else None)
        return result


# the embedding


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class EmbeddingScaled(Parts):
    """The embeddings are multiplied by sqrt(d_model), as in the first transformer, which this config does not
    set. What the blocks add then hardly counts beside them, and pretrained weights do not fit."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions) * math.sqrt(self.config.d_model)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class EmbeddingNormalized(Parts):
    """The embeddings are normalized before the first block, which normalizes its input itself. It changes how
    much they count in the residual stream, and pretrained weights do not fit."""

    def embed(self, tokens, positions):
        return tF.rms_norm(super().embed(tokens, positions), (self.config.d_model,))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class EmbeddingDetached(Parts):
    """The logits are right, but no gradient reaches the embeddings, which keep their initial values. The
    loss falls nearly as well; look for detach, .data or no_grad."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions).detach()


@step.mistake("model.TransformerLM", source="written for this catalogue")
class TokenZeroIsPadding(Parts):
    """Token 0 never learns, as with padding_idx=0 of nn.Embedding. It is a token like all others here;
    leave padding_idx away."""

    def embed(self, tokens, positions):
        x = super().embed(tokens, positions)
        return torch.where(tokens[..., None] == 0, x.detach(), x)


# positions


@step.mistake("model.TransformerLM", source="public solutions of CS336; passes its suite")
class ThetaIgnored(Parts):
    """RoPE has the usual base of 10,000 whatever the config says. Pass rope_theta on; models with long
    contexts have larger ones."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(dataclasses.replace(config, rope_theta=10000.0), device, dtype)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class NoRope(Parts):
    """The blocks are made without RoPE, so the model knows no order beyond what the causal mask gives away.
    The loss falls, only less; hand the rotary tables to each block."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for one in self.layers:
            one.attn.rope = None


@step.mistake("model.TransformerLM", source="written for this catalogue")
class PositionsNotHandedOn(Parts):
    """The blocks do not get the positions, so attention counts from 0 by itself. Right for whole texts, wrong
    for positions that are given; pass them to each block."""

    def through_blocks(self, x, positions, caches):
        return super().through_blocks(x, None, caches)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LearnedPositionsNotAdded(Parts):
    """The table of learned positions is made and never added to the embeddings. The model knows no order
    beyond what the causal mask gives away; add position_embeddings(positions)."""

    def embed(self, tokens, positions):
        return self.token_embeddings(tokens)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LearnedPositionsReversed(Parts):
    """Learned positions count from the end of the text, so that a token's place changes with each one that
    follows, and gives the future away. Count from the start: arange(seq)."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions.flip(-1))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LearnedPositionsFromOne(Parts):
    """Learned positions count from 1, so that the first row is never trained and a text that fills the
    context indexes a missing row. Count from 0."""

    def embed(self, tokens, positions):
        return super().embed(tokens, positions + 1)


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class PositionsNotCutToTheInput(Parts):
    """All context_length learned positions are added, whatever the length of the text: it fails, or
    broadcasts, unless the text fills the context. Cut the table to the input."""

    def forward(self, tokens, token_positions=None, caches=None):
        if self.position_embeddings is None or tokens.shape[-1] == self.config.context_length:
            return super().forward(tokens, token_positions, caches)
        return self.token_embeddings(tokens) + self.position_embeddings.weight


# the start, tied weights


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class TiedWhenNotAsked(Parts):
    """Embedding and output projection are one matrix although the config says tie_embeddings=False. The model
    has fewer weights than configured, and pretrained weights do not fit."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(dataclasses.replace(config, tie_embeddings=True), device, dtype)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class NotTiedWhenAsked(Parts):
    """The config says tie_embeddings=True, yet embedding and output projection are two matrices; perhaps
    the values were copied. Both must be the same nn.Parameter."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(dataclasses.replace(config, tie_embeddings=False), device, dtype)


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class TiedWithStd1(Parts):
    """The tied matrix starts as an embedding, with std 1, so logits are as wide as sqrt(d_model) and the
    first loss is far above ln V. Start it as an output projection."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        if config.tie_embeddings:
            layers.init_truncated_normal_(self.lm_head.weight, std=1.0)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class AllMatricesOfStd1(Parts):
    """Every matrix starts with std 1, as torch.randn gives it. Logits are then far too wide, the first loss
    is far above ln V, and the softmax is saturated; use sqrt(2 / (d_in + d_out))."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class AllMatricesOfStd002(Parts):
    """Every matrix starts with std 0.02, GPT-2's choice for its size, where the config requires a std that
    goes by the matrix. Small models then start very slowly."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class TorchsDefaultStart(Parts):
    """The matrices start as nn.Linear's do, uniform of std 1 / sqrt(3 d_in), which for square ones is 0.58 of
    what is required. Use a normal distribution of std sqrt(2 / (d_in + d_out))."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith(("token", "position")):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


@step.mistake("model.TransformerLM", source="written for this catalogue")
class GainsFromZero(Parts):
    """The gains of the norms start at 0, so that every sublayer and all logits are 0. Gradients are 0 too,
    or nearly all, and it hardly learns; start them at 1."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(config, device, dtype)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)


# caches, dropout, length


@step.mistake("model.TransformerLM", source="written for this catalogue")
class CachesNotHandedOn(Parts):
    """The caches are not given to the blocks, so each chunk is a text of its own. With one new token at a
    time the model forgets everything; pass one cache to each block."""

    def through_blocks(self, x, positions, caches):
        return super().through_blocks(x, positions, None)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class OneCacheForAllBlocks(Parts):
    """All blocks write to the same cache, so each sees the keys of the others as if they were text. It
    overflows, or samples are nonsense; one cache a block."""

    def through_blocks(self, x, positions, caches):
        return super().through_blocks(x, positions, caches and [caches[0]] * len(self.layers))


@step.mistake("model.TransformerLM", source="public solutions of CS336")
class CachedPositionsRestart(Parts):
    """With caches the positions of each chunk start at 0 again, so that new tokens are rotated as if they
    were the first. Continue from the length of the cache."""

    def through_blocks(self, x, positions, caches):
        return super().through_blocks(x, positions - (caches[0].length if caches else 0), caches)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class DropoutInEvaluation(Parts):
    """Dropout acts in evaluation too: losses are too high, samples worse, and two passes differ. F.dropout
    must get training=self.training, or stand in a module."""

    def embed(self, tokens, positions):
        return tF.dropout(super().embed(tokens, positions), self.config.dropout, training=True)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class DropoutNever(Parts):
    """The config sets dropout, but none acts in training: the value is not passed on. Small data sets are
    then memorized sooner."""

    def __init__(self, config, device=None, dtype=None):
        super().__init__(dataclasses.replace(config, dropout=0.0), device, dtype)


@step.mistake("model.TransformerLM", source="written for this catalogue")
class LongTextsCut(Parts):
    """A text longer than the context is silently cut, so there are fewer logits than tokens without an error.
    Raise an error; generation truncates the text beforehand."""

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
