"""What the model's config can turn on. Alone: uv run pytest tests/test_model_options.py"""

import dataclasses
import io
import json
import math

import pytest
import torch
from torch import nn

from llm_basics import swap
from llm_basics.cli import parse
from llm_basics.core import config, generate, layers, model, presets
from llm_basics.core import functional as F
from llm_basics.inference import engine
from llm_basics.runs import checkpoint, run_dir
from llm_basics.training import job, state

VOCAB, CONTEXT = 23, 16
LLAMA = config.ModelConfig(
    vocab_size=VOCAB, context_length=CONTEXT, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=20
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
    init="gpt2",
)
POST = dataclasses.replace(LLAMA, norm_placement="post")
BARE = dataclasses.replace(LLAMA, norm="none", position="none")
FAMILIES = pytest.mark.parametrize("plain", [LLAMA, GPT2, POST], ids=["llama", "gpt2", "post-norm"])

ON = {"zero_init": True, "vocab_multiple": 64}
SWITCHES = pytest.mark.parametrize("switches", [*([name] for name in ON), [*ON]], ids="+".join)


def switched(plain, switches):
    return dataclasses.replace(plain, **{name: ON[name] for name in switches})


def randomized(shape):
    """A model of float64 in evaluation, no two of whose parameters are alike."""
    lm = model.TransformerLM(shape, dtype=torch.float64).eval()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.4)
    return lm


def some_tokens(*shape):
    return torch.randint(VOCAB, shape)


def loss_of(lm, tokens):
    return F.cross_entropy(lm(tokens[:, :-1]), tokens[:, 1:])


# --------------------------------------------------------------------------------------------------
# Off


@FAMILIES
def test_without_switches_the_model_is_what_its_parts_make(plain):
    """Bit for bit the sum of what was there before there were switches."""
    lm, tokens = randomized(plain), some_tokens(2, 7)
    x = lm.token_embeddings(tokens)
    if plain is GPT2:
        x = x + lm.position_embeddings(torch.arange(7))
    for block in lm.layers:
        if plain is POST:
            x = block.ln1(x + block.attn(x))
            x = block.ln2(x + block.ffn(x))
        else:
            x = x + block.attn(block.ln1(x))
            x = x + block.ffn(block.ln2(x))
    assert torch.equal(lm(tokens), lm.lm_head(lm.ln_final(x)))
    parts = {name.split(".")[0] for name in lm.state_dict()}
    assert parts - {"position_embeddings"} == {"token_embeddings", "layers", "ln_final", "lm_head"}


def test_switches_are_off_by_default():
    plain = config.ModelConfig()
    assert (plain.zero_init, plain.vocab_multiple, plain.padded_vocab_size) == (False, 1, plain.vocab_size)


def test_without_norms_sublayers_add_to_what_comes_in_as_it_is():
    lm, tokens = model.TransformerLM(BARE).eval(), some_tokens(2, 7)
    x = lm.token_embeddings(tokens)
    for block in lm.layers:
        x = x + block.attn(x)
        x = x + block.ffn(x)
    assert torch.equal(lm(tokens), lm.lm_head(x))
    assert not [name for name in lm.state_dict() if "ln" in name]
    # the loops that write text fast do not know of it, and leave it to the model
    written = []
    for use in (swap.restored(), swap.using("fast", lambda line: None)):
        with use:
            written.append(list(generate.generate(lm, tokens[0], CONTEXT, temperature=0.0)))
    assert written[0] == written[1] and len(written[0]) == CONTEXT


# --------------------------------------------------------------------------------------------------
# At the start


@FAMILIES
def test_blocks_that_start_at_zero_change_nothing(plain):
    lm, tokens = model.TransformerLM(switched(plain, ["zero_init"])).eval(), some_tokens(2, 7)
    x = lm.token_embeddings(tokens)
    if plain is GPT2:
        x = x + lm.position_embeddings(torch.arange(7))
    for block in lm.layers if plain is POST else ():
        x = block.ln2(block.ln1(x))
    torch.testing.assert_close(lm.hidden_states(tokens), lm.ln_final(x), rtol=0, atol=0)
    zeros = {name for name, p in lm.named_parameters() if p.dim() == 2 and not p.any()}
    back = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attn.output_proj", "ffn.w2")}
    assert zeros == back


@FAMILIES
def test_blocks_that_start_at_zero_learn(plain):
    lm, tokens = model.TransformerLM(switched(plain, ["zero_init"])), some_tokens(4, 9)
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    for _ in range(2):
        loss_of(lm, tokens).backward()
        optimizer.step()
    assert all(
        parameter.grad.abs().max() > 0 for name, parameter in lm.named_parameters() if "k_proj.b" not in name
    )


# --------------------------------------------------------------------------------------------------
# Logits


@pytest.mark.parametrize(("multiple", "rows"), [(1, 23), (23, 23), (2, 24), (8, 24), (64, 64), (22, 44)])
@pytest.mark.parametrize("tie", [False, True])
def test_rows_are_rounded_up_and_logits_are_not(multiple, rows, tie):
    shape = dataclasses.replace(LLAMA, vocab_multiple=multiple, tie_embeddings=tie)
    lm, tokens = model.TransformerLM(shape), some_tokens(3, 8)
    tables = [lm.token_embeddings, lm.lm_head]
    assert [table.weight.shape[0] for table in tables] == [rows] * 2
    assert lm(tokens).shape == (3, 8, VOCAB)
    loss_of(lm, torch.arange(VOCAB)[None, :CONTEXT]).backward()
    for table in tables:
        assert not table.weight.grad[VOCAB:].any() and table.weight.grad[:VOCAB].any()


def test_padding_has_no_part_in_the_loss():
    lm, tokens = randomized(switched(LLAMA, ["vocab_multiple"])), some_tokens(2, 8)
    expected = loss_of(lm, tokens)
    with torch.no_grad():
        lm.lm_head.weight[VOCAB:] = 1e6
        lm.token_embeddings.weight[VOCAB:] = math.nan
    assert torch.equal(loss_of(lm, tokens), expected)


def test_no_id_of_the_padding_is_ever_drawn():
    """Not in 100,000 draws at temperature 10, though its rows are by far the largest."""
    lm = randomized(switched(LLAMA, ["vocab_multiple"]))
    with torch.no_grad():
        lm.lm_head.weight[VOCAB:] = 1e3
    probabilities = generate.next_token_probabilities(lm(some_tokens(1, 5))[0, -1], temperature=10.0)
    drawn = torch.multinomial(probabilities, 100_000, replacement=True)
    assert set(drawn.tolist()) == set(range(VOCAB))
    generator = torch.Generator().manual_seed(0)
    written = list(generate.generate(lm, torch.tensor([1]), 40, temperature=10.0, generator=generator))
    assert len(written) == 40 and max(written) < VOCAB


# --------------------------------------------------------------------------------------------------
# What holds of every model


@FAMILIES
@SWITCHES
def test_logits_see_tokens_up_to_their_own_and_never_later_ones(plain, switches):
    """By the gradients of the embeddings of seven tokens, no two of which are the same."""
    lm, tokens = randomized(switched(plain, switches)), torch.randperm(VOCAB)[:7]
    for i in range(7):
        lm.zero_grad()
        lm(tokens)[i].square().sum().backward()
        reached = lm.token_embeddings.weight.grad[tokens].abs().amax(-1)
        assert (reached[: i + 1] > 0).all() and not reached[i + 1 :].any()


@FAMILIES
@SWITCHES
def test_cached_logits_and_texts_are_the_uncached_ones(plain, switches):
    lm, tokens = randomized(switched(plain, switches)), some_tokens(2, CONTEXT)
    for chunks in ([1] * CONTEXT, [5, 1, 1, 9]):
        caches = lm.make_kv_caches(batch=2)
        logits = torch.cat([lm(chunk, caches=caches) for chunk in tokens.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(logits, lm(tokens))
    text = tokens[0, :4].tolist()
    written = list(generate.generate(lm, torch.tensor(text), CONTEXT, temperature=0.0))
    for token in written:
        assert token == lm(torch.tensor(text[-CONTEXT:]))[-1].argmax()
        text.append(token)


@pytest.mark.parametrize("plain", [LLAMA, GPT2, POST, BARE], ids=["llama", "gpt2", "post-norm", "bare"])
@SWITCHES
@pytest.mark.parametrize("other", [{}, {"tie_embeddings": True}, {"qk_norm": True}], ids=str)
def test_parameters_and_flops_are_known_without_making_them(plain, switches, other):
    shape = dataclasses.replace(switched(plain, switches), **other)
    lm = model.TransformerLM(shape, device="meta")
    assert shape.n_parameters == lm.n_parameters()
    matrices = [module.weight.numel() for module in lm.modules() if isinstance(module, layers.Linear)]
    assert shape.n_matmul_params == sum(matrices)
    attended = 12 * shape.n_layers * shape.d_model * shape.context_length
    assert shape.flops_per_token == lm.flops_per_token() == 6 * sum(matrices) + attended


@FAMILIES
@SWITCHES
def test_a_checkpoint_holds_every_switch(plain, switches):
    shape = switched(plain, switches)
    first, second, file = randomized(shape), randomized(shape), io.BytesIO()
    checkpoint.save_checkpoint(first, torch.optim.SGD(first.parameters()), 1, file)
    file.seek(0)
    checkpoint.load_checkpoint(file, second)
    tokens = some_tokens(2, 7)
    assert torch.equal(first(tokens), second(tokens))


@FAMILIES
@SWITCHES
def test_fast_implementations_give_the_same_loss_and_gradients(plain, switches):
    lm, tokens = randomized(switched(plain, switches)), some_tokens(4, 9)
    found = []
    for use in (swap.restored(), swap.using("fast", lambda line: None)):
        lm.zero_grad()
        with use:
            loss = loss_of(lm, tokens)
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in lm.parameters())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_multiple": 0}, "model.vocab_multiple must be at least 1, got 0"),
        ({"vocab_multiple": -64}, "model.vocab_multiple must be at least 1, got -64"),
    ],
)
def test_values_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        config.ModelConfig(**wrong)


# --------------------------------------------------------------------------------------------------
# Runs of before

# options that old runs lack
YOUNGER = {
    "model": ["zero_init", "vocab_multiple"],
    "train": ["optimizer", "schedule", "decay_fraction", "momentum"],
}
# options that only old runs have
REMOVED = {"value_embeddings": False, "x0_skips": False, "logit_softcap": None}


def without_younger(options):
    kept = {part: {k: v for k, v in options[part].items() if k not in YOUNGER[part]} for part in YOUNGER}
    return options | kept


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A run stopped after 2 of 4 steps, its config without the younger options and with the removed ones."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    options = config.Config(
        data=str(text),
        tokenizer="bytes",
        data_dir=str(tmp_path / "data"),
        run_dir=str(tmp_path / "run"),
        model=dataclasses.replace(LLAMA, vocab_size=257),
        train=config.TrainConfig(steps=2, batch_size=2, sample_tokens=3, eval_batches=1, device="cpu"),
    )
    asdict = dataclasses.asdict

    def as_before(value):
        if not isinstance(value, config.Config):
            return asdict(value)
        options = without_younger(asdict(value))
        return options | {"model": options["model"] | REMOVED}

    with monkeypatch.context() as patch:
        patch.setattr(state.dataclasses, "asdict", as_before)
        assert job.main(options) == 0
    return tmp_path / "run"


def test_a_run_of_before_goes_on_and_writes(old_run, capsys):
    saved = json.loads((old_run / "config.json").read_text())
    _, about = checkpoint.read_checkpoint(run_dir.checkpoints(old_run)[0])
    for part, names in YOUNGER.items():
        assert not set(names) & (saved[part].keys() | about["config"][part].keys())
    assert REMOVED.keys() <= saved["model"].keys() & about["config"]["model"].keys()
    resumed = parse.train_options(["--resume", str(old_run), "--train.steps", "4"])
    assert resumed.model == dataclasses.replace(LLAMA, vocab_size=257)
    capsys.readouterr()
    assert job.main(resumed) == 0
    message = capsys.readouterr().out
    assert "different: train.steps was 2, now 4" in message and message.count("different: ") == 1
    assert run_dir.read_metrics(old_run)[-1]["step"] == 4
    lm, tokenizer = engine.load_run(old_run)
    assert lm.config.padded_vocab_size == 257
    assert isinstance("".join(engine.complete(lm, tokenizer, "1 times", 3)), str)


def test_a_run_of_before_is_not_gone_on_with_by_a_model_that_it_did_not_have(old_run, capsys):
    arguments = ["--resume", str(old_run), "--train.steps=4", "--model.zero_init"]
    with pytest.raises(SystemExit):
        job.main(parse.train_options(arguments))
    assert "zero_init was False, now True" in capsys.readouterr().err


def test_the_younger_options_are_all_that_a_preset_of_before_lacks():
    saved = without_younger(dataclasses.asdict(presets.load("gpt2-nano")))
    assert presets.update(config.Config(), saved, "here") == presets.load("gpt2-nano")
