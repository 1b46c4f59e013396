"""Conversations: rendering, loss masks, reading. Alone: uv run pytest tests/test_chat_template.py"""

import json

import numpy as np
import pytest
import torch
import trials

from llm_basics import swap
from llm_basics.core import bpe, config, model, tokenizer
from llm_basics.core import functional as F
from llm_basics.data import chat_template, tokenizer_formats
from llm_basics.data.chat_template import Message

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def messages(spelled):
    """`u:hi a:yo` as messages; an underscore is a space."""
    pairs = [part.split(":", 1) for part in spelled.split()]
    return [Message(ROLES[role], content.replace("_", " ")) for role, content in pairs]


@pytest.fixture
def chatting():
    return chat_template.with_specials(tokenizer.Tokenizer.byte_level())


# loss masks, a character per id: each special token and each letter is one
GOLDEN = [
    ("a:x", ".##"),
    ("u:x", "..."),
    ("s:x", "..."),
    ("u: a:x", "...##"),
    ("u:a a:", "....#"),
    ("u:a a:b", "....##"),
    ("u:ab a:c", ".....##"),
    ("u:a a:bc", "....###"),
    ("u:ab a:cd", ".....###"),
    ("u:what? a:that", "........#####"),
    ("s:a u:b a:c", ".......##"),
    ("s:be_kind u:b a:c", ".............##"),
    ("s: u:b a:c", "......##"),
    ("u:a a:b u:c", "....##..."),
    ("u:a a:b u:c a:d", "....##....##"),
    ("u:a a:b u:c a:d u:e a:f", "....##....##....##"),
    ("u:a a:bb u:c a:ddd", "....###....####"),
    ("u:aaa a:b u:ccc a:d", "......##......##"),
    ("s:a u:b a:c u:d a:e", ".......##....##"),
    ("u:a u:b a:c", ".......##"),
    ("u:a a:b a:c", "....##.##"),
    ("a:x u:y a:z", ".##....##"),
    ("a:x u:y", ".##..."),
    ("u:a s:b a:c", ".......##"),
    ("u:a a:b s:c a:d", "....##....##"),
    ("u:1+1 a:2", "......##"),
    ("u:\u00e9 a:\u00e9", ".....###"),
    ("u:x a:\u20ac", "....####"),
    ("u:<|end|> a:y", "..........##"),
    ("u:x a:<|end|>", "....########"),
    ("u:<|assistant|> a:<|user|>", "................#########"),
]


@pytest.mark.parametrize(("spelled", "mask"), GOLDEN)
def test_loss_mask(chatting, spelled, mask):
    ids, loss_mask = chat_template.render(chatting, messages(spelled))
    assert "".join(".#"[has_loss] for has_loss in loss_mask) == mask
    assert len(ids) == len(mask)


def test_rendered_as_written(chatting):
    ids, _ = chat_template.render(chatting, messages("s:be_kind u:hi a:yo u:bye"))
    assert chatting.decode(ids) == (
        "<|system|>be kind<|end|><|user|>hi<|end|><|assistant|>yo<|end|><|user|>bye<|end|>"
    )
    assert ids[0] == chatting.special_id("<|system|>") and ids[-1] == chatting.special_id("<|end|>")


def test_the_prompt_ends_where_the_loss_begins(chatting):
    ids, loss_mask = chat_template.render(chatting, messages("s:a u:b a:cd"))
    assert chat_template.render_prompt(chatting, messages("s:a u:b")) == ids[: loss_mask.index(True)]


def test_only_answers_have_a_gradient(chatting):
    """The last user message has no answer and gets none; an answer gets it from first token to end."""
    torch.manual_seed(0)
    shape = config.ModelConfig(vocab_size=chatting.vocab_size, context_length=32, d_model=16, n_heads=2)
    lm = model.TransformerLM(shape)
    ids, loss_mask = chat_template.render(chatting, messages("u:ab a:xyz u:QRS"))
    tokens = torch.tensor(ids)
    targets = tokens.masked_fill(~torch.tensor(loss_mask), -100)
    logits = lm(tokens[None, :-1])
    logits.retain_grad()
    F.cross_entropy(logits, targets[None, 1:]).backward()
    assert lm.token_embeddings.weight.grad[[ord(letter) for letter in "QRS"]].abs().max() == 0
    trained = logits.grad[0].abs().sum(-1) > 0
    assert chatting.decode(tokens[1:][trained].tolist()) == "xyz<|end|>"


# --------------------------------------------------------------------------------------------------
# Special tokens


def test_content_never_becomes_a_special_token(chatting):
    """5,000 conversations of random texts of special tokens and their halves."""
    rng = np.random.default_rng(0)
    specials = [*chat_template.SPECIALS, "<|endoftext|>"]
    halves = [part for special in specials for part in (special[:5], special[5:], special[:-1], special[1:])]
    parts = [*specials, *halves, "<|", "|>", "<", "|", ">", "user", "end", " ", "\n", "\ud83d", "\x00", "a"]
    words = {b"user": 9, b"end": 9, b"<|": 9, b"|>": 9}
    learned = tokenizer.Tokenizer(*bpe.learn_merges(words, 270, specials), specials)
    special_ids = {learned.special_id(special) for special in specials}
    for _ in range(trials.count(5_000)):
        roles = rng.choice(chat_template.ROLES, size=3)
        texts = ["".join(rng.choice(parts, size=rng.integers(0, 5))) for _ in roles]
        ids, _ = chat_template.render(learned, [Message(r, t) for r, t in zip(roles, texts, strict=True)])
        found = [id for id in ids if id in special_ids]
        expected = [learned.special_id(s) for role in roles for s in (f"<|{role}|>", "<|end|>")]
        assert found == expected, texts


def test_special_tokens_are_added_once_at_the_end():
    plain = tokenizer.Tokenizer.byte_level()
    added = chat_template.with_specials(plain)
    assert not chat_template.is_chat(plain) and chat_template.is_chat(added)
    assert [added.special_id(s) for s in chat_template.SPECIALS] == [257, 258, 259, 260]
    assert added.encode_ordinary("caf\u00e9") == plain.encode_ordinary("caf\u00e9")
    assert chat_template.with_specials(added).fingerprint() == added.fingerprint()
    some = tokenizer.Tokenizer.byte_level(["<|endoftext|>", "<|user|>"])
    assert chat_template.with_specials(some).special_id("<|user|>") == 257
    assert chat_template.with_specials(some).special_id("<|end|>") == 260


def test_a_saved_chat_tokenizer_round_trips(chatting, tmp_path):
    chatting.save(tmp_path)
    loaded = tokenizer.Tokenizer.load(tmp_path)
    assert chat_template.is_chat(loaded) and loaded.fingerprint() == chatting.fingerprint()
    tokenizer_formats.write_tokenizer_json(chatting.to_vocabulary(), tmp_path / "tokenizer.json")
    assert chat_template.is_chat(tokenizer_formats.load(tmp_path / "tokenizer.json"))


def test_the_fast_tokenizer_renders_the_same(chatting):
    conversation = messages("s:be_kind u:<|end|>_caf\u00e9 a:1,234_and_<|user|>")
    expected = chat_template.render(chatting, conversation)
    with swap.using("fast", log=lambda line: None):
        fast = chat_template.with_specials(tokenizer.Tokenizer.byte_level())
        assert type(fast).__module__ == "llm_basics.fast.tokenizer"
        assert chat_template.render(fast, conversation) == expected


def test_a_tokenizer_without_the_specials_is_refused():
    with pytest.raises(ValueError, match="add them with chat_template.with_specials"):
        chat_template.render(tokenizer.Tokenizer.byte_level(), messages("u:a"))


# --------------------------------------------------------------------------------------------------
# Files

PROMPT = {"prompt": "2+2?", "completion": "4"}
ALPACA = {"instruction": "Add.", "input": "2, 2", "output": "4"}
TALK = {"messages": [{"role": "system", "content": "Add."}, {"role": "assistant", "content": "4"}]}


@pytest.mark.parametrize("as_array", [False, True])
def test_all_formats_are_read(tmp_path, as_array):
    path = tmp_path / "answers"
    records = [
        PROMPT,
        ALPACA,
        ALPACA | {"input": ""},
        {"instruction": "Say\u2028x", "output": "\u00e9"},
        TALK,
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = f"\n [{','.join(lines)}]\n" if as_array else "\n".join([lines[0], "", *lines[1:]])
    path.write_bytes(("\ufeff" + text).encode("utf-8"))
    assert chat_template.read_conversations(path) == [
        messages("u:2+2? a:4"),
        [Message("user", "Add.\n\n2, 2"), Message("assistant", "4")],
        messages("u:Add. a:4"),
        [Message("user", "Say\u2028x"), Message("assistant", "\u00e9")],
        messages("s:Add. a:4"),
    ]


INVALID_RECORDS = [
    ({"prompt": "a"}, "the field completion is missing"),
    ({"completion": "a"}, "the field prompt is missing"),
    ({"instruction": "a", "input": "b"}, "the field output is missing"),
    ({"instruction": "a", "input": 3, "output": "b"}, "input must be a string, got 3"),
    ({"prompt": "a", "completion": ""}, "the content of an assistant message must not be empty"),
    ({"prompt": "a", "completion": " \n"}, "the content of an assistant message must not be empty"),
    ({"prompt": "a", "completion": None}, "completion must be a string, got null"),
    ({"question": "a", "answer": "b"}, "or instruction and output, got question, answer"),
    ({}, "or instruction and output, got no field"),
    (["a", "b"], 'a record must be an object with fields, got ["a", "b"]'),
    ({"messages": "hi"}, 'messages must be a list, got "hi"'),
    ({"messages": []}, "must have a message of the role assistant, got none"),
    ({"messages": [{"role": "user", "content": "a"}]}, "must have a message of the role assistant, got none"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "message 1: a role must be system, user or assistant"),
    ({"messages": [*TALK["messages"], {"role": "user"}]}, "message 3: the field content is missing"),
    ({"messages": ["hi"]}, 'message 1: a message must have role and content, got "hi"'),
    (
        {"messages": [{"role": "assistant", "content": ""}]},
        "the content of an assistant message must not be empty",
    ),
]


@pytest.mark.parametrize(("record", "message"), INVALID_RECORDS)
def test_an_invalid_record_is_named_with_its_position(tmp_path, record, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{json.dumps(PROMPT)}\n\n{json.dumps(record)}\n")
    with pytest.raises(ValueError) as error:
        chat_template.read_conversations(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)
    path.write_text(json.dumps([PROMPT, record]))
    with pytest.raises(ValueError) as error:
        chat_template.read_conversations(path)
    assert str(error.value).startswith(f"{path}, record 2: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"prompt": "a", "completion": "b"}\n{"prompt": \n',
            ":2 must be JSON; Expecting value in column 11",
        ),
        (b'[{"prompt": "a"},\n {"prompt" 1}]', ":2 must be JSON; Expecting ':' delimiter in column 12"),
        (b"\n \n", " must hold conversations, JSON lines or a JSON array, but is empty"),
        (b"[]", "but is empty"),
        (b'\n{"prompt": "\xff"}', ":2 must be UTF-8, got byte 0xff at offset 13; fix the file"),
        (b'[\n{"prompt": "\xff"}]', ":2 must be UTF-8, got byte 0xff at offset 14; fix the file"),
        (b"[" * 100_000, ":1 must be JSON; "),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        chat_template.read_conversations(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
