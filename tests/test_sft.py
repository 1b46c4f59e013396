"""Conversations to batches, and supervised fine-tuning. Alone: uv run pytest tests/test_sft.py"""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from test_chat_template import GOLDEN, messages

from llm_basics.cli import parse
from llm_basics.core import config, dataloader, generate, model, tokenizer, trainer
from llm_basics.data import chat_template, prepare, sft_dataset, synthetic_qa
from llm_basics.inference import engine
from llm_basics.runs import run_dir
from llm_basics.training import job, sft

CHATTING = chat_template.with_specials(tokenizer.Tokenizer.byte_level())
SPECIAL_IDS = {CHATTING.special_id(special) for special in CHATTING.special_tokens}


def row(spelled):
    ids, loss_mask = chat_template.render(CHATTING, messages(spelled))
    return sft_dataset.Example(np.array(ids), np.array(loss_mask))


def text(found):
    return CHATTING.decode(found.ids.tolist())


# --------------------------------------------------------------------------------------------------
# Rows


def test_the_loss_mask_is_recovered_from_the_ids():
    for spelled, _ in GOLDEN:
        rendered = row(spelled)
        assert np.array_equal(sft_dataset.loss_mask(rendered.ids, CHATTING), rendered.loss_mask), spelled


@pytest.mark.parametrize(
    ("spelled", "most", "kept"),
    [
        ("u:ab a:cd", 8, "<|user|>ab<|end|><|assistant|>cd<|end|>"),
        ("u:ab a:cd", 7, "<|user|>ab<|end|><|assistant|>cd"),
        ("u:ab a:cd", 6, "<|user|>ab<|end|><|assistant|>c"),
        ("u:ab a:cd", 5, None),
        ("u:ab a:cd u:ef", 99, "<|user|>ab<|end|><|assistant|>cd<|end|>"),
        (
            "u:ab a:c u:d a:e",
            13,
            "<|user|>ab<|end|><|assistant|>c<|end|><|user|>d<|end|><|assistant|>e<|end|>",
        ),
        ("u:ab a:c u:d a:e", 12, "<|assistant|>c<|end|><|user|>d<|end|><|assistant|>e<|end|>"),
        ("u:ab a:c u:d a:e", 8, "<|user|>d<|end|><|assistant|>e<|end|>"),
        ("s:abcdef u:d a:e", 8, "<|user|>d<|end|><|assistant|>e<|end|>"),
        ("a:abc", 3, "<|assistant|>ab"),
    ],
)
def test_a_long_conversation_is_truncated_from_the_front(spelled, most, kept):
    found = sft_dataset.truncate(row(spelled), CHATTING, most)
    assert (found and text(found)) == kept


def test_no_conversation_becomes_a_row_without_a_target():
    """For random messages and contexts: short enough, begins with a role token, has loss."""
    rng = np.random.default_rng(0)
    n_left_out = 0
    for _ in range(1_000):
        parts = [f"{rng.choice(list('sua'))}:{'x' * rng.integers(0, 9)}" for _ in range(rng.integers(0, 5))]
        most = int(rng.integers(3, 30))
        found = sft_dataset.truncate(
            row(" ".join([*parts, "u:y", "a:" + "z" * rng.integers(1, 9)])), CHATTING, most
        )
        n_left_out += found is None
        if found is not None:
            assert len(found.ids) <= most and found.loss_mask[1:].any() and not found.loss_mask[0]
            assert found.ids[0] in SPECIAL_IDS
            _, targets = sft_dataset.collate([found], most - 1)
            assert (targets != dataloader.IGNORE_INDEX).any()
        else:
            assert most < len("[y][z"), "a prompt of one letter leaves room for an answer from 5 ids on"
    assert n_left_out > 0


def test_packed_rows_hold_every_conversation_once():
    rng = np.random.default_rng(0)
    rows = [row(f"u:{'q' * rng.integers(0, 20)} a:{'r' * rng.integers(1, 20)}") for _ in range(200)]
    packed = sft_dataset.pack(rows, 64)
    assert all(len(one.ids) <= 64 and one.loss_mask[1:].any() for one in packed)
    expected = sorted(text(one) for one in rows)
    found = [f"<|user|>{part}" for one in packed for part in text(one).split("<|user|>")[1:]]
    assert sorted(found) == expected
    # at most a tenth above the lower bound
    assert len(packed) <= 1.1 * sum(len(one.ids) for one in rows) / 64
    assert all(np.array_equal(one.loss_mask, sft_dataset.loss_mask(one.ids, CHATTING)) for one in packed)


# --------------------------------------------------------------------------------------------------
# Batches


def marked_rows(n):
    """Rows of 4 to 31 ids, the first of which is the index of the row."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 32, size=n)
    return [
        sft_dataset.Example(np.array([i, *[9] * (m - 1)]), np.arange(m) > m - 3)
        for i, m in enumerate(lengths)
    ]


def test_an_epoch_has_every_row_once_in_another_order():
    batches = sft_dataset.Batches(marked_rows(240), 8, 32, seed=1)
    epochs = [[batches.starting_at(i)[0][:, 0] for i in range(e * 240, (e + 1) * 240, 8)] for e in (0, 1)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(240))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_the_order_is_a_pure_function_of_seed_epoch_and_step():
    rows = marked_rows(50)
    one, other = (sft_dataset.Batches(rows, 8, 32, seed=3) for _ in range(2))
    in_order = [one.starting_at(first) for first in range(0, 400, 8)]
    for first in (392, 0, 136, 48, 136):
        for found, expected in zip(other.starting_at(first), in_order[first // 8], strict=True):
            assert torch.equal(found, expected)
    different = sft_dataset.Batches(rows, 8, 32, seed=4)
    assert any(not torch.equal(different.starting_at(i)[0], one.starting_at(i)[0]) for i in (0, 8))


def test_batches_are_as_wide_as_their_rows_and_have_a_target_per_row():
    batches = sft_dataset.Batches(marked_rows(240), 8, 30)
    widths, padded = set(), 0
    for first in range(0, 240, 8):
        inputs, targets = batches.starting_at(first)
        widths.add(inputs.shape[1])
        padded += (inputs == 0).sum().item()
        assert (targets != dataloader.IGNORE_INDEX).any(1).all()
    assert widths <= {8, 16, 24, 30} and len(widths) > 1


def test_fewer_rows_than_a_batch_are_repeated():
    inputs, _ = sft_dataset.Batches(marked_rows(3), 8, 32).starting_at(8)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2} and len(inputs) == 8


def test_padding_changes_no_gradient():
    """The gradient of a padded batch is that of its rows one by one."""
    shape = config.ModelConfig(vocab_size=CHATTING.vocab_size, context_length=32, d_model=16, n_heads=2)
    lm = model.TransformerLM(shape).double()
    rows = [row("u:ab a:c"), row("u:defg a:hijklmnop")]
    trainer.batch_loss(lm, *sft_dataset.collate(rows, 32), z_loss=0.0).backward()
    together = [p.grad.clone() for p in lm.parameters()]
    lm.zero_grad()
    for one in rows:
        inputs, targets = torch.from_numpy(one.ids[None, :-1]), torch.from_numpy(one.ids[None, 1:]).clone()
        targets[torch.from_numpy(~one.loss_mask[None, 1:])] = -100
        n = sum(int(r.loss_mask.sum()) for r in rows)
        (trainer.batch_loss(lm, inputs, targets, z_loss=0.0) * int(one.loss_mask.sum()) / n).backward()
    torch.testing.assert_close(together, [p.grad for p in lm.parameters()], rtol=1e-8, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Synthetic pairs


def test_synthetic_questions_are_deterministic_and_distinct():
    found = synthetic_qa.all_pairs()
    assert found == synthetic_qa.all_pairs() and len(found) > 4_000
    assert len({pair.question for pair in found}) == len(found)
    assert {pair.kind for pair in found} == set(synthetic_qa.KINDS)


def test_synthetic_answers_are_right():
    for pair in synthetic_qa.all_pairs():
        words = pair.question.rstrip(".?").replace(",", "").split()
        match pair.kind:
            case "plus":
                assert int(pair.answer) == int(words[2]) + int(words[4])
            case "larger":
                assert int(pair.answer) == max(int(words[3]), int(words[5]))
            case "reverse":
                assert pair.answer.split(", ") == words[-1:-4:-1]
            case "count":
                assert int(pair.answer) == len(words) - 5
            case "member":
                assert pair.answer == ("yes" if words[1] in words[4:] else "no")
            case "place":
                assert pair.answer == words[-3:][("first", "second", "third").index(words[3])]
            case "spell":
                assert pair.answer.replace(" ", "") == words[1]
            case "define":
                compile(pair.answer, "answer", "exec")


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder with a run on text, `old`, and its data; trained once."""
    tmp_path = tmp_path_factory.mktemp("first")
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(200)))
    shape = config.ModelConfig(context_length=24, d_model=32, n_layers=1, n_heads=2, vocab_size=257)
    settings = config.TrainConfig(steps=2, batch_size=4, eval_batches=1, sample_tokens=2, device="cpu")
    options = config.Config(
        data=str(tmp_path / "text.txt"),
        tokenizer="bytes",
        data_dir=str(tmp_path / "data"),
        run_dir=str(tmp_path / "old"),
        model=shape,
        train=settings,
    )
    assert job.main(options) == 0
    return tmp_path


@pytest.fixture
def pretrained(first_run, tmp_path):
    """The folder of a run on text, beside a file of conversations."""
    shutil.copytree(first_run, tmp_path, dirs_exist_ok=True)
    records = [{"prompt": f"{a}{b}?", "completion": a} for a in "abcdefgh" for b in "stuvwxyz"]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "answers.jsonl").write_text("".join(lines))
    return tmp_path


def options_of(folder, name="chat", **changes):
    """Options as the sft command parses them."""
    arguments = ["--init_from", f"{folder}/old", "--data", f"{folder}/answers.jsonl", "--data_dir"]
    arguments += [f"{folder}/data", "--run_dir", f"{folder}/{name}", "--train.device", "cpu"]
    found = parse.train_options(arguments, prog="sft", preset="sft")
    settings = {"steps": 6, "batch_size": 8, "eval_every": 3, "checkpoint_every": 3, "eval_batches": 1}
    settings |= {"sample_tokens": 4, "log_every": 1, **changes}
    return dataclasses.replace(found, train=dataclasses.replace(found.train, **settings))


def test_a_model_learns_to_answer(pretrained, capsys):
    """From text to a model that answers with the first letter of held-out prompts."""
    assert sft.main(options_of(pretrained, steps=150, lr=0.02, eval_every=100, log_every=50)) == 0
    lm, found = engine.load_run(pretrained / "chat")
    assert chat_template.is_chat(found) and lm.config.vocab_size == found.vocab_size == 261
    out = capsys.readouterr().out
    metrics = [m for m in run_dir.read_metrics(pretrained / "chat") if "val_loss" in m]
    assert metrics[0]["step"] == 0 and metrics[-1]["val_loss"] < 0.2 * metrics[0]["val_loss"]
    samples = run_dir.read_samples(pretrained / "chat")
    prompts = [s["prompt"] for s in samples if s["step"] == 0]
    assert prompts and all(prompt.endswith("<|end|><|assistant|>") for prompt in prompts)
    after = {s["prompt"]: s["text"] for s in samples if s["step"] == 150}
    right = [after[prompt] == f"{prompt[len('<|user|>')]}<|end|>" for prompt in prompts]
    assert sum(right) >= 0.8 * len(right)
    assert " held-out questions; " in out and "exact match on " in out and "before" in out
    prompt = torch.tensor(chat_template.render_prompt(found, [chat_template.Message("user", "cx?")]))
    ids = list(generate.generate(lm, prompt, 4, temperature=0.0, stop_id=found.special_id("<|end|>")))
    assert found.decode(ids) == "c"


def test_a_reply_draws_no_random_numbers_of_training(pretrained):
    """Dropout does not depend on when replies are due, or on what generates them."""
    training = sft.make(options_of(pretrained))
    before = torch.get_rng_state()
    training.sample()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_prompt_is_on_both_sides(pretrained):
    options = options_of(pretrained)
    lines = (pretrained / "answers.jsonl").read_text()
    # each prompt a second time, with another answer
    (pretrained / "answers.jsonl").write_text(lines + lines.replace('n": "', 'n": "not '))
    training = sft.make(options)
    trained = {text(one).split("<|end|>")[0] for one in training.train_rows.rows}
    held_out = {text(one).split("<|end|>")[0] for one in training.held_out_rows.rows}
    assert trained and held_out and not trained & held_out
    assert len(training.train_rows.rows) + len(training.held_out_rows.rows) == 128
    # an answer that nothing goes before is one to the empty question
    training.held_out_rows = dataclasses.replace(training.held_out_rows, rows=[row("u:q a:b"), row("a:x")])
    assert [(case.question, case.expected) for case in training.test_cases(2)] == [
        ("q", "b<|end|>"),
        ("", "x<|end|>"),
    ]


@pytest.mark.parametrize("packing", ["off", "on"])
def test_a_resumed_run_equals_an_uninterrupted_one(pretrained, monkeypatch, packing):
    options = dataclasses.replace(options_of(pretrained), packing=packing)
    assert sft.main(options) == 0
    stopped = dataclasses.replace(options, run_dir=str(pretrained / "stopped"))
    make_step = trainer.train_step

    def step_and_stop(*arguments):
        if arguments[3] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step_and_stop)
        assert sft.main(stopped) == 128 + signal.SIGTERM
    # resuming needs neither the pretrained run nor its tokenizer
    (pretrained / "old").rename(pretrained / "gone")
    resumed = parse.train_options(["--resume", str(pretrained / "stopped")], preset="sft")
    assert sft.main(resumed) == 0
    one, other = (engine.load_run(pretrained / name)[0].state_dict() for name in ("chat", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # samples of step 0 are written once
    assert sum(s["step"] == 0 for s in run_dir.read_samples(pretrained / "stopped")) == sum(
        s["step"] == 0 for s in run_dir.read_samples(pretrained / "chat")
    )


@pytest.mark.parametrize(
    ("change", "content", "message"),
    [
        (
            {},
            '{"prompt": "a", "completion": ""}',
            "answers.jsonl:1: the content of an assistant message must not be empty",
        ),
        ({}, '{"prompt": "a", "completion": "b"}', "must hold at least two prompts, got 1"),
        ({"data": "nowhere.jsonl"}, "", "--data must be a file of conversations, or demo, got nowhere.jsonl"),
        ({"init_from": None}, "", "--init_from must name the run to fine-tune"),
        (
            {"init_from": None, "resume": "old"},
            "",
            "--resume must name a run of sft, but the tokenizer of old has no",
        ),
        (
            {"train": config.TrainConfig(stride=8)},
            "",
            "--train.stride must be omitted for conversations, got 8",
        ),
        ({"tokenizer": "gpt2"}, "", "got gpt2, which has other ids; omit --tokenizer"),
        (
            {},
            '{"prompt": "\xff"}',
            "answers.jsonl:1 must be UTF-8, got byte 0xff at offset 12; fix the file, or",
        ),
        (
            {},
            json.dumps([{"prompt": c * 30, "completion": "y"} for c in "ab"]),
            "conversation fits into model.context",
        ),
        ({"model": config.ModelConfig(d_model=64)}, "", "the model must match --init_from"),
    ],
)
def test_invalid_options_and_data_are_refused(pretrained, capsys, monkeypatch, change, content, message):
    options = dataclasses.replace(options_of(pretrained), **change)
    monkeypatch.chdir(pretrained)
    monkeypatch.setattr(prepare, "_gpt2", pytest.fail)
    if content:
        (pretrained / "answers.jsonl").write_text(content, encoding="latin-1")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sft.main(options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (pretrained / "chat").exists()


def test_bytes_that_are_not_utf8_can_be_replaced(pretrained):
    with open(pretrained / "answers.jsonl", "ab") as file:
        file.write(b'{"prompt": "caf\xe9?", "completion": "c"}\n')
    options = dataclasses.replace(options_of(pretrained), on_bad_utf8="replace", val_fraction=0.9)
    training = sft.make(options)
    assert any("caf\ufffd?" in text(one) for one in (*training.train_rows.rows, *training.held_out_rows.rows))
