"""The program of generate. Alone: uv run pytest tests/test_samples.py"""

import json
import re
import subprocess
import sys

import pytest

from llm_basics import swap
from llm_basics.cli import commands, parse
from llm_basics.inference import engine
from llm_basics.inference import samples as sample_program

# fast kernels would be compiled for every model of this size
PLAIN = ["--device=cpu", "--fast=off", "--max_new_tokens=12"]


@pytest.fixture
def folder(untrained_run):
    return str(untrained_run("run"))


def program(*arguments):
    """Run the program in this process."""
    return sample_program.main(parse.program_options(commands.GenerateConfig(), arguments, "generate"))


@pytest.fixture
def written(folder, capsys):
    def run(*arguments):
        assert program(folder, *PLAIN, *arguments) == 0
        return capsys.readouterr().out

    return run


def singly(folder, prompt, seed, **options):
    lm, tokenizer = engine.load_run(folder)
    return "".join(engine.complete(lm, tokenizer, prompt, 12, 0.8, seed=seed, **options))


# --------------------------------------------------------------------------------------------------
# To the terminal


def test_one_text(written, folder):
    assert written("--prompt", "ab", "--seed=3") == "ab" + singly(folder, "ab", 3) + "\n"


def test_samples_are_the_texts_of_seeds_that_count_up(written, folder):
    texts = ["ab" + singly(folder, "ab", seed) for seed in (3, 4, 5)]
    assert len(set(texts)) == 3
    expected = "".join(f"--- prompt 1, sample {i}\n{text}\n" for i, text in enumerate(texts, start=1))
    assert written("--prompt", "ab", "--seed=3", "--samples=3") == expected


def test_the_prompt_is_bold_on_a_terminal_and_plain_in_a_pipe(written, monkeypatch):
    plain = written("--prompt", "a[b]\n c", "--temperature=0")
    assert plain.startswith("a[b]\n c") and "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    styled = written("--prompt", "a[b]\n c", "--temperature=0")
    assert styled != plain and re.sub(r"\x1b\[\d*m", "", styled) == plain
    assert re.match(r"\x1b\[1ma\[b\]\x1b\[0m\n\x1b\[1m c\x1b\[0m", styled)


def test_a_pipe_gets_prompt_and_text_as_one_and_a_file_has_them_apart(folder, tmp_path, capsys):
    """Of one prompt byte for byte, with one newline at the end, and nothing on standard error."""
    command = [sys.executable, "-m", "llm_basics.generate", folder, *PLAIN, "--prompt", "a[b]\n c"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    text = singly(folder, "a[b]\n c", 0)
    assert (done.stdout.decode(), done.stderr) == (f"a[b]\n c{text}\n", b"")
    assert program(folder, *PLAIN, "--prompt", "a[b]\n c", "--out", str(tmp_path / "a.jsonl")) == 0
    entry = json.loads((tmp_path / "a.jsonl").read_text())
    assert (entry["prompt"], entry["text"]) == ("a[b]\n c", text)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        program("--help")
    words = re.sub(r"[^\w;,:.]+", " ", capsys.readouterr().out)
    assert "bold on a terminal, as one text in a pipe; separate fields with out." in words


def test_text_is_streamed(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(engine, "complete", lambda *args: iter(["one", " two"]))
    monkeypatch.setattr(
        sample_program, "print", lambda *args, **_: shown.append("".join(args)), raising=False
    )
    program(folder, *PLAIN, "--prompt=zero ")
    assert shown == ["zero ", "one", " two", ""]


def test_with_and_without_fast_kernels(written, folder):
    options = ["--samples=3", "--top_k=9", "--min_p=0.02", "--repetition_penalty=1.2", "--prompt=a"]
    with swap.restored():
        assert written(*options, "--fast=on") == written(*options)
    with swap.restored():
        assert written(*options[1:], "--fast=on") == written(*options[1:])


def test_a_text_ends_before_a_stop_string(written, folder):
    whole = singly(folder, "ab", 0)
    for samples in ("--samples=1", "--samples=2"):
        out = written("--prompt=ab", f"--stop={whole[7:9]}", "--stop", whole[5:7], samples)
        assert out.split("--- prompt 1, sample 2")[0].endswith("ab" + whole[:5] + "\n")


def test_generate_of_user_code_writes_every_sample(written, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def generate(model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, "
        "generator=None):\n    yield from [104, 105]\n"
    )
    with swap.restored():
        assert written("--samples=2", f"--mine={mine}").count("hi\n") == 2


def test_missing_parameter_of_user_code_is_an_error(folder, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def generate(model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_id=None, "
        "generator=None):\n    yield 104\n"
    )
    with swap.restored(), pytest.raises(SystemExit, match="2"):
        program(folder, *PLAIN, f"--mine={mine}", "--min_p=0.1")
    assert re.search(r"has no parameter adjust, but is called with .*min_p=0.1", capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------
# Probabilities


def test_probabilities_in_a_pipe(written, folder):
    lines = written("--prompt=ab", "--show_probs", "--temperature=0").splitlines()
    rows = [re.match(r" +([\d.]+)%  (\S+) ", line) for line in lines[:12]]
    assert all(rows) and "\x1b" not in "".join(lines)
    # greedy: none of the four alternatives is more likely
    for row, line in zip(rows, lines, strict=False):
        others = [float(share) for share in re.findall(r"([\d.]+)%", line)[1:]]
        assert len(others) == 4 and float(row[1]) >= others[0]
        assert others == sorted(others, reverse=True)


def test_probabilities_are_before_top_k_and_the_text_is_unchanged(written, folder):
    plain = written("--prompt=ab", "--top_k=3", "--min_p=0.01")
    shown = written("--prompt=ab", "--top_k=3", "--min_p=0.01", "--show_probs")
    visible = [character for character in plain.strip() if character.isprintable()]
    assert [c for c in shown.split("\n\n", 1)[1].strip() if c.isprintable()] == visible
    # after top_k=3 each would have far more
    assert max(float(share) for share in re.findall(r"^ +([\d.]+)%", shown, re.MULTILINE)) < 50


def test_probabilities_on_a_terminal_have_colors(written, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in written("--prompt=ab", "--show_probs", "--temperature=2")


def test_probabilities_end_with_a_stop_string(written, folder):
    whole = singly(folder, "ab", 0)
    out = written("--prompt=ab", "--show_probs", f"--stop={whole[4:6]}")
    assert len(out.split("\n\n")[0].splitlines()) < 12


# --------------------------------------------------------------------------------------------------
# Files


def test_a_file_of_prompts(written, folder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo \r\nthree", newline="")
    out = written("--prompts", str(path))
    expected = [(i, p + singly(folder, p, 0)) for i, p in enumerate(["one", "two ", "three"], start=1)]
    assert out == "".join(f"--- prompt {i}, sample 1\n{text}\n" for i, text in expected)


def test_from_file_to_file(written, folder, tmp_path):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    entries = [{"prompt": f"prompt {i}\u2028", "id": i} for i in range(9)]
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    printed = written("--prompts", str(path), "--out", str(out), "--samples=2", "--seed=5")
    assert printed == f"18 texts written to {out}\n"
    found = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert found == [
        {**entry, "seed": seed, "text": singly(folder, entry["prompt"], seed)}
        for entry in entries
        for seed in (5, 6)
    ]


def test_an_interrupted_run_leaves_the_old_file(folder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "complete_batch", interrupted)
    out = tmp_path / "texts.jsonl"
    out.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        program(folder, *PLAIN, "--samples=2", "--out", str(out))
    assert out.read_text() == "old" and [*tmp_path.glob("*.tmp*")] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\nno', "{path}:3 must be JSON; Expecting value in column 1"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n[1]\n',
            '{path}:2 must be an object with a string "prompt", got [1]',
        ),
        ("p.jsonl", b'{"prompt": 3}\n', '{path}:1 must be an object with a string "prompt", got {{'),
        ("p.txt", b"a\n\xff", "{path}:2 must be UTF-8, got byte 0xff at offset 2; fix the file\n"),
        ("p.txt", b"\n \n", "--prompts must hold at least one prompt, got none in {path}"),
        ("p.txt", None, "--prompts must be a file with one prompt per line, got {path}"),
    ],
)
def test_errors_in_a_file_of_prompts(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        program("nowhere", "--prompts", str(path))
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(path=path)) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--min_p=1.5"], "min_p must be at least 0 and at most 1, got 1.5"),
        (["--min_p=nan"], "min_p must be at least 0 and at most 1, got nan"),
        (["--repetition_penalty=0"], "repetition_penalty must be above 0, got 0.0"),
        (["--temperature=inf"], "temperature must be at least 0 and finite, got inf"),
        (["--stop="], "stop must be a string of at least one character, got an empty one"),
        (["--prompts=x", "--prompt=y"], "prompts cannot be combined with prompt"),
        (["--out=x", "--show_probs"], "show_probs cannot be combined with out"),
        (["--prompts"], "--prompts"),
    ],
)
def test_errors_on_the_command_line(capsys, wrong, message):
    with pytest.raises(SystemExit, match="2"):
        program(*wrong)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_output_that_cannot_be_written_is_an_error(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        program(folder, *PLAIN, "--out", str(tmp_path / "no" / "texts.jsonl"))
    assert "No such file or directory" in capsys.readouterr().err
