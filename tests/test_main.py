"""The table of commands and the help of each. Alone: uv run pytest tests/test_main.py"""

import contextlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llm_basics
from llm_basics import __main__ as table
from llm_basics.cli import completion, parse

# runs a command and reports on standard error which large packages it imported
REPORT_IMPORTS = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print([name for name in ("torch", "numpy", "tyro") if name in sys.modules], file=sys.stderr)
"""


def help_of(module, *arguments):
    """The help that `python -m module ARGUMENTS` prints, and the large packages that it imports."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT_IMPORTS, module, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(llm_basics.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.strip()


def run_table(monkeypatch, *arguments):
    """What `llm-basics ARGUMENTS` prints on standard output, run in this process."""
    monkeypatch.setattr(sys, "argv", ["llm-basics", *arguments])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        table.main()
    return out.getvalue()


def test_all_commands_are_listed_without_torch(monkeypatch):
    listed, imported = help_of("llm_basics")
    assert imported == "['tyro']"
    assert listed == run_table(monkeypatch) == run_table(monkeypatch, "--help")
    rows = dict(re.findall(r"^  (\w+) +(\S.*)$", listed, flags=re.M))
    assert tuple(rows) == table.COMMANDS
    assert all(summary.endswith(".") for summary in rows.values())


@pytest.mark.parametrize("command", ["llm_basics", "llm_basics.generate"])
def test_help_that_cannot_be_written_is_an_error_of_one_line(command):
    with open("/dev/full", "w") as full:
        run = [sys.executable, "-m", command, "--help"]
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == parse.NOT_SAVED
    assert done.stderr == "error: the output could not be written (No space left on device)\n"


def test_help_into_a_pipe_that_is_closed_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        run = [sys.executable, "-m", "llm_basics", "--help"]
        done = subprocess.run(run, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", table.COMMANDS)
def test_help_of_a_command_needs_no_torch(command):
    text, imported = help_of(f"llm_basics.{command}", "--help")
    assert imported == "['tyro']"
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith(f"usage: python -m llm_basics.{command} ")
    # the line of the table is also the title of the help
    assert " ".join(rest.split()).startswith(table.summary(command))


def test_both_ways_to_start_a_command_have_the_same_options():
    assert help_of("llm_basics", "train", "--help")[0] == help_of("llm_basics.train", "--help")[0]


@pytest.mark.parametrize(
    ("command", "advice"),
    [("tran", "did you mean train?"), ("zzz", f"it must be one of {', '.join(table.COMMANDS)}")],
)
def test_an_unknown_command_is_an_error_with_the_nearest_name(monkeypatch, capsys, command, advice):
    with pytest.raises(SystemExit) as stop:
        run_table(monkeypatch, command)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: unknown command {command}; {advice}\n"


def test_arguments_reach_the_command(monkeypatch):
    calls = []
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: calls.append((name, sys.argv[1:])))
    run_table(monkeypatch, "import_model", "folder", "--out", "x")
    assert calls == [("llm_basics.import_model", ["folder", "--out", "x"])]


IMPORT = """
import sys, time
before = time.process_time()
import llm_basics
seconds = time.process_time() - before
print(seconds, [name for name in ("torch", "numpy", "tyro", "yaml") if name in sys.modules])
"""


def test_the_package_is_imported_without_any_library():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    seconds, _, libraries = done.stdout.strip().partition(" ")
    assert libraries == "[]" and float(seconds) < 0.1


COMPLETE = """
llm-basics() { %s -m llm_basics "$@"; }
%s
COMP_WORDS=(llm-basics %s) COMP_CWORD=%d
_llm_basics
printf '%%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("ev", ["evaluate"]),
        ("train --train.warm", ["--train.warmup_steps"]),
        ("tokenizer train --vocab", ["--vocab_size"]),
        ("train book", []),
    ],
)
def test_bash_completes_commands_and_options(words, completions):
    script = COMPLETE % (sys.executable, completion.script("bash"), words, len(words.split()))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == completions, done.stderr
