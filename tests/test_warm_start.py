"""The weights of another run to begin with. Alone: uv run pytest tests/test_warm_start.py"""

import dataclasses
import json
import shutil

import pytest
import torch

from llm_basics.cli import parse
from llm_basics.core import config, model, presets, tokenizer
from llm_basics.data import chat_template
from llm_basics.inference import engine
from llm_basics.runs import run_dir
from llm_basics.training import job, warm_start

SHAPE = config.ModelConfig(context_length=16, d_model=32, n_layers=1, n_heads=2, vocab_size=257)
SETTINGS = config.TrainConfig(
    steps=3, batch_size=4, lr=1e-2, warmup_steps=0, log_every=1, eval_batches=1, sample_tokens=3, device="cpu"
)


@pytest.fixture
def options(tmp_path):
    return options_in(tmp_path)


def options_in(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(200)))
    return config.Config(
        data=str(text),
        tokenizer="bytes",
        data_dir=str(tmp_path / "data"),
        run_dir=str(tmp_path / "old"),
        model=SHAPE,
        train=SETTINGS,
    )


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A run with SHAPE and SETTINGS, trained once."""
    folder = tmp_path_factory.mktemp("first")
    assert job.main(options_in(folder)) == 0
    return folder / "old"


@pytest.fixture
def old(options, first_run):
    """The folder of a trained run, where `options` have it."""
    shutil.copytree(first_run, options.run_dir)
    return options.run_dir


def arguments(options, *more):
    """The command line of another run on the same text."""
    fixed = ["--data", options.data, "--data_dir", options.data_dir, "--train.device", "cpu"]
    sizes = ["--train.steps", "2", "--train.batch_size", "4", "--train.log_every", "1", "--train.lr", "0"]
    rest = ["--train.min_lr", "0", "--train.sample_tokens", "3", "--train.eval_batches", "1"]
    return [*fixed, *sizes, *rest, "--run_dir", options.run_dir + "-new", *more]


def test_training_goes_on_with_the_weights_of_another_run(options, old, capsys):
    old, _ = engine.load_run(options.run_dir)
    # lr 0: what is saved is what was begun with; nothing is asked for but the run
    assert job.main(parse.train_options(arguments(options, "--init_from", options.run_dir))) == 0
    new, _ = engine.load_run(options.run_dir + "-new")
    assert new.config == old.config
    torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)
    assert f"weights   from {options.run_dir}" in capsys.readouterr().out
    assert run_dir.read_config(options.run_dir + "-new")["init_from"] == options.run_dir
    # to go on with that run, the other one is not needed for its weights
    (run_dir.checkpoints(options.run_dir)[0]).unlink()
    assert job.main(parse.train_options(["--resume", options.run_dir + "-new"])) == 0


def test_newest_is_the_run_written_to_last(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job.main(dataclasses.replace(options, run_dir="runs/old")) == 0
    found = parse.train_options(["--init_from", "newest"])
    assert (found.init_from, found.tokenizer, found.model) == ("runs/old", "runs/old/tokenizer", SHAPE)
    # how to train is said by the preset, as without it
    assert found.train == presets.load("tiny").train


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.d_model", "64"], "model.d_model is 32 there, got 64"),
        (["--config", "gpt2-nano"], "model.context_length is 16 there, got 64; model.d_model is 32"),
        (
            ["--model.norm", "layer", "--model.n_layers", "2"],
            "model.n_layers is 1 there, got 2; model.norm is",
        ),
        (["--tokenizer", "bpe"], "the tokenizer must be that of --init_from"),
        (["--tokenizer", "OTHER"], "OTHER, which has other ids; omit --tokenizer"),
    ],
)
def test_what_contradicts_the_weights_is_refused(options, old, tmp_path, capsys, more, said):
    other = tokenizer.Tokenizer({b: bytes([255 - b]) for b in range(256)}, [], ["<|endoftext|>"])
    other.save(tmp_path / "OTHER")
    more = [str(tmp_path / "OTHER") if word == "OTHER" else word for word in more]
    with pytest.raises(SystemExit) as stop:
        job.main(parse.train_options(arguments(options, "--init_from", options.run_dir, *more)))
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "old-new").exists()


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_run_without_weights_is_refused(options, tmp_path, capsys, folder):
    if folder == "empty":
        (tmp_path / folder).mkdir()
        tokenizer.Tokenizer.byte_level().save(tmp_path / folder / "tokenizer")
        (tmp_path / folder / "config.json").write_text(json.dumps(dataclasses.asdict(options)))
    with pytest.raises(SystemExit) as stop:
        job.main(parse.train_options(arguments(options, "--init_from", str(tmp_path / folder))))
    assert stop.value.code == 2 and str(tmp_path / folder) in capsys.readouterr().err
    assert not (tmp_path / "old-new").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"vocab_multiple": 64},
        {"tie_embeddings": True, "vocab_multiple": 32},
    ],
    ids=str,
)
def test_new_tokens_get_the_mean_and_change_nothing_among_the_old(options, tmp_path, changes):
    shape = dataclasses.replace(SHAPE, **changes)
    job.main(dataclasses.replace(options, model=shape))
    old, plain = engine.load_run(options.run_dir)
    chatting = chat_template.with_specials(plain)
    new = model.TransformerLM(dataclasses.replace(shape, vocab_size=chatting.vocab_size))
    warm_start.load_initial_weights(new, options.run_dir)
    tokens = torch.tensor([list(b"12 and 12")])
    logits = new(tokens)
    torch.testing.assert_close(logits[..., :257], old(tokens), rtol=1e-6, atol=1e-6)
    # the mean row gives the mean of the scores, which is no more than the mean probability
    torch.testing.assert_close(logits[..., 257], old(tokens).mean(-1), rtol=1e-4, atol=1e-5)
    assert (logits.softmax(-1)[..., 257:] <= 1 / 257).all()
    for name, weight in new.state_dict().items():
        if name.split(".")[0] in ("token_embeddings", "lm_head"):
            expected = old.state_dict()[name][:257].mean(0).expand(len(weight) - 257, -1)
            torch.testing.assert_close(weight[257:], expected)
    assert (new.lm_head.weight is new.token_embeddings.weight) == shape.tie_embeddings


def test_which_tokenizers_go_with_the_weights():
    plain = tokenizer.Tokenizer.byte_level()
    assert warm_start.extends(chat_template.with_specials(plain), plain) and warm_start.extends(plain, plain)
    assert not warm_start.extends(plain, chat_template.with_specials(plain))
    merged = tokenizer.Tokenizer({**plain.vocab, 257: b"ab"}, [(b"a", b"b")], ["<|endoftext|>"])
    assert not warm_start.extends(merged, plain) and not warm_start.extends(plain, merged)
