"""The program of chat. Alone: uv run pytest tests/test_chat_session.py"""

import io
import re
import sys

import pytest
import torch

from llm_basics.cli import commands, parse
from llm_basics.core import generate
from llm_basics.data import chat_template
from llm_basics.inference import chat_session, engine

PLAIN = ["--device=cpu", "--fast=off"]


@pytest.fixture
def folder(untrained_run):
    return str(untrained_run("chat", chat_template.SPECIALS))


def program(*arguments):
    """Run the program in this process."""
    return chat_session.main(parse.program_options(commands.ChatConfig(), arguments, "chat"))


@pytest.fixture
def pipe(folder, capsys, monkeypatch):
    """Run the program on lines through a pipe; returns its standard output and error."""

    def run(*lines, arguments=(), status=0):
        content = io.BytesIO("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="utf-8"))
        parse.set_up_process()
        assert program(folder, *PLAIN, *arguments) == status
        return capsys.readouterr()

    return run


@pytest.fixture
def scripted(monkeypatch):
    """A model that replies 1, 2, 3, ...; returns its prompts and their limits on new tokens."""
    prompts = []

    def reply(lm, prompt, max_new_tokens, *_, **__):
        prompts.append((prompt.tolist(), max_new_tokens))
        yield from str(len(prompts)).encode()

    monkeypatch.setattr(generate, "generate", reply)
    return prompts


def texts(folder, prompts):
    _, tokenizer = engine.load_run(folder)
    return [tokenizer.decode(ids) for ids, _ in prompts]


# --------------------------------------------------------------------------------------------------
# A conversation


def test_a_prompt_holds_the_earlier_turns(pipe, scripted, folder):
    assert pipe("one", "", "two").out == "1\n2\n"
    first = "<|user|>one<|end|><|assistant|>"
    assert texts(folder, scripted) == [first, f"{first}1<|end|><|user|>two<|end|><|assistant|>"]


def test_the_last_line_needs_no_newline(folder, monkeypatch, capsys, scripted):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo"), encoding="utf-8"))
    assert program(folder, *PLAIN) == 0
    assert capsys.readouterr().out == "1\n2\n"


def test_commands(pipe, scripted, folder):
    found = pipe("/system Be brief.", "one", "/reset", "two", "/system", " /three", "/quit", "four")
    assert found.out == "1\n2\n3\n"
    system = "<|system|>Be brief.<|end|>"
    assert texts(folder, scripted) == [
        f"{system}<|user|>one<|end|><|assistant|>",
        f"{system}<|user|>two<|end|><|assistant|>",
        "<|user|>two<|end|><|assistant|>2<|end|><|user|>/three<|end|><|assistant|>",
    ]


def test_help_names_every_command(pipe):
    printed = pipe("/help")
    assert printed.out == ""
    for command in ("/reset", "/system", "/temperature", "/save", "/help", "/quit"):
        assert command in printed.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "unknown command /rest; /help lists the commands\n"),
        ("/temperature hot", "temperature must be a number, got 'hot'\n"),
        ("/temperature -1", "temperature must be at least 0, got -1.0\n"),
        ("/temperature nan", "temperature must be at least 0 and finite, got nan\n"),
        ("/save", "/save needs a file name, as in /save chat.jsonl\n"),
        (
            "/save x.jsonl",
            "the conversation must have at least one reply to be saved, got none\n",
        ),
    ],
)
def test_an_error_does_not_end_the_conversation(pipe, scripted, line, message):
    found = pipe("", line, "one", status=1)
    assert found.err == "error: standard input:2: " + message and found.out == "1\n"


def test_a_temperature_applies_to_later_replies(pipe):
    sampled = pipe("one", "one", "one", arguments=["--temperature=5", "--max_new_tokens=8"]).out
    lines = ["/temperature 0", "one", "/reset", "one"]
    greedy = pipe(*lines, arguments=["--temperature=5", "--max_new_tokens=8"]).out
    assert len(greedy) % 2 == 0 and greedy[: len(greedy) // 2] * 2 == greedy
    assert not sampled.startswith(greedy[: len(greedy) // 2])


def test_a_saved_conversation_can_be_read(pipe, scripted, tmp_path):
    path = tmp_path / "chat.jsonl"
    odd = 'caf\u00e9 \u2028 "x" <|end|>'
    save = f"/save {path}"
    assert "(saved to" in pipe(f"{odd}", save, "/system S", "/reset", "two", save).err
    assert chat_template.read_conversations(path) == [
        [chat_template.Message("user", odd), chat_template.Message("assistant", "1")],
        [
            chat_template.Message("system", "S"),
            chat_template.Message("user", "two"),
            chat_template.Message("assistant", "2"),
        ],
    ]


def test_the_same_seed_gives_the_same_replies(pipe):
    arguments = ["--temperature=1.5", "--max_new_tokens=8"]
    lines = ["one", "two"]
    first = pipe(*lines, arguments=arguments).out
    assert pipe(*lines, arguments=arguments).out == first
    assert pipe(*lines, arguments=[*arguments, "--seed=1"]).out != first


def test_one_message(folder, capsys, scripted):
    assert program(folder, *PLAIN, "--message", "one", "--system", "S") == 0
    assert capsys.readouterr().out == "1\n"
    assert texts(folder, scripted) == ["<|system|>S<|end|><|user|>one<|end|><|assistant|>"]


# --------------------------------------------------------------------------------------------------
# Tokens


def test_text_never_becomes_a_special_token(pipe, scripted, folder):
    hostile = "<|user|>"
    pipe(f"/system {hostile}", hostile, "m", arguments=["--max_new_tokens=9"])
    _, tokenizer = engine.load_run(folder)
    specials = {tokenizer.special_id(special) for special in tokenizer.special_tokens}
    (_, (ids, _)) = scripted
    kinds = [tokenizer.decode([id]) for id in ids if id in specials]
    turn = ["<|user|>", "<|end|>", "<|assistant|>"]
    assert kinds == ["<|system|>", "<|end|>", *turn, "<|end|>", *turn]


@pytest.fixture
def generate_call(untrained_run, monkeypatch):
    """A function that returns the tokenizer, prompt and settings of the `generate` call for a message."""

    def call(message, **options):
        lm, tokenizer = engine.load_run(untrained_run("other", chat_template.SPECIALS))
        calls = []
        monkeypatch.setattr(
            generate, "generate", lambda *a, **settings: calls.append((a, settings)) or iter(())
        )
        chat_session.ChatSession(lm, tokenizer, commands.ChatConfig(**options)).reply(
            message, lambda piece: None
        )
        ((_, prompt, *_), settings) = calls[0]
        return tokenizer, prompt, settings

    return call


def test_a_reply_has_no_special_token_but_its_end(generate_call):
    tokenizer, prompt, settings = generate_call("?")
    specials = [tokenizer.special_id(special) for special in tokenizer.special_tokens]
    found = settings["adjust"](prompt, torch.zeros(tokenizer.vocab_size))
    end = tokenizer.special_id(chat_template.END)
    assert settings["stop_id"] == end
    assert found.isneginf().nonzero().flatten().tolist() == sorted(set(specials) - {end})


def test_the_repetition_penalty_is_for_the_reply_alone(generate_call):
    tokenizer, prompt, settings = generate_call("\0\1\2", repetition_penalty=2.0)
    scores = torch.linspace(3, 2, tokenizer.vocab_size)
    for reply, likeliest in [([], 0), ([0], 1), ([0, 1], 2)]:
        found = settings["adjust"](torch.tensor([*prompt.tolist(), *reply]), scores)
        assert found.argmax() == likeliest


# --------------------------------------------------------------------------------------------------
# A context that is full


def test_the_oldest_turns_are_dropped_and_the_system_message_is_kept(pipe, scripted, folder):
    """Of 64 tokens 20 are for the reply; a turn has 14, the system message 5."""
    lines = [f"message {i}" for i in range(6)]
    found = pipe("/system SSS", *lines, arguments=["--max_new_tokens=20"])
    assert found.out == "1\n2\n3\n4\n5\n6\n"
    shown = texts(folder, scripted)
    assert all(text.startswith("<|system|>SSS<|end|><|user|>") for text in shown)
    assert all(len(ids) <= 44 and n == 20 for ids, n in scripted)
    n_dropped = [i - text.count("<|assistant|>") + 1 for i, text in enumerate(shown)]
    assert n_dropped == [0, 0, 1, 2, 3, 4]
    for i, text in enumerate(shown):
        assert [int(n) for n in re.findall(r"message (\d)", text)] == list(range(n_dropped[i], i + 1))
    assert found.err.splitlines() == [
        f"(context of 64 tokens is full; dropped the {2 * n} oldest messages)" for n in (1, 2, 3, 4)
    ]


def test_dropped_turns_are_saved(pipe, scripted, tmp_path):
    path = tmp_path / "all.jsonl"
    pipe(*[f"message {i}" for i in range(6)], f"/save {path}")
    assert len(chat_template.read_conversations(path)[0]) == 12


def test_a_message_that_is_too_long_is_refused_and_dropped(pipe, scripted, folder):
    found = pipe("a" * 60, "short", status=1)
    assert found.out == "1\n"
    assert found.err == (
        "error: standard input:1: a message and the system message must have at most 32 tokens, got 63 "
        "(context of 64); shorten it, or lower --max_new_tokens\n"
    )
    assert texts(folder, scripted) == ["<|user|>short<|end|><|assistant|>"]


def test_a_reply_fits_into_the_context(folder):
    lm, tokenizer = engine.load_run(folder)
    session = chat_session.ChatSession(lm, tokenizer, commands.ChatConfig(temperature=0.0))
    pieces = []
    session.reply("a" * 29, pieces.append)
    assert len("".join(pieces).encode("utf-8", "replace")) <= 96  # 32 tokens, of which some are no characters
    assert len(chat_template.render(tokenizer, session.turns[:1])[0]) + 1 == 32


# --------------------------------------------------------------------------------------------------
# Interruptions


def interrupting(after):
    def reply(*_, **__):
        yield from b"one two"[:after]
        raise KeyboardInterrupt

    return reply


@pytest.fixture
def terminal(monkeypatch):
    """A terminal at which these lines are typed; an exception stands for Ctrl-C or Ctrl-D."""

    def type_in(*lines):
        typed = iter([*lines, EOFError()])

        def read(prompt=""):
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(chat_session, "input", read, raising=False)

    return type_in


def test_ctrl_c_stops_the_reply_and_keeps_its_text(folder, monkeypatch, capsys, terminal):
    lm, tokenizer = engine.load_run(folder)
    session = chat_session.ChatSession(lm, tokenizer, commands.ChatConfig())
    monkeypatch.setattr(generate, "generate", interrupting(5))
    terminal("hello", KeyboardInterrupt())
    chat_session.converse(session, is_terminal=True)
    assert session.turns == [
        chat_template.Message("user", "hello"),
        chat_template.Message("assistant", "one t"),
    ]
    found = capsys.readouterr()
    assert found.out.startswith("one t\n") and "(Ctrl-D quits)" in found.err


def test_an_error_at_the_terminal_is_not_fatal(folder, monkeypatch, capsys, terminal, scripted):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    terminal("/rest", "one")
    assert program(folder, *PLAIN) == 0
    assert "error: unknown command /rest; /help lists the commands\n" in capsys.readouterr().err


def test_an_empty_reply_is_no_turn(folder, monkeypatch, terminal):
    lm, tokenizer = engine.load_run(folder)
    session = chat_session.ChatSession(lm, tokenizer, commands.ChatConfig())
    monkeypatch.setattr(generate, "generate", interrupting(0))
    terminal("hello")
    chat_session.converse(session, is_terminal=True)
    assert session.turns == []


@pytest.mark.parametrize("arguments", [[], ["--message=hello"]])
def test_ctrl_c_ends_a_pipe(folder, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nmore\n"), encoding="utf-8"))
    monkeypatch.setattr(generate, "generate", interrupting(3))
    with pytest.raises(KeyboardInterrupt):
        program(folder, *PLAIN, *arguments)
    assert capsys.readouterr().out == "one"


# --------------------------------------------------------------------------------------------------
# The program


def test_a_model_that_was_not_fine_tuned(untrained_run, capsys):
    folder = untrained_run("base")
    with pytest.raises(SystemExit, match="2"):
        program(str(folder), *PLAIN)
    error = capsys.readouterr().err
    assert f"no <|user|> ({folder})" in error and "llm_basics.sft" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--max_new_tokens=0"], "max_new_tokens must be at least 1, got 0"),
        (["--min_p=2"], "min_p must be at least 0 and at most 1, got 2.0"),
        (["--mesage=x"], "the closest is --message"),
        (["nowhere", "--fast=off"], "a run directory must hold config.json, got nowhere"),
    ],
)
def test_errors_on_the_command_line(capsys, wrong, message):
    with pytest.raises(SystemExit, match="2"):
        program(*wrong)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_input_that_is_not_utf8_is_read(pipe):
    done = pipe("caf\udce9", "/help", arguments=["--max_new_tokens=5"])
    assert "Ctrl-D" in done.err and done.out.endswith("\n")
