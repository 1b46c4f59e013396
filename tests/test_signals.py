"""Every command ends on a signal in one line. Alone: uv run pytest tests/test_signals.py"""

import ast
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llm_basics
from llm_basics import __main__ as table
from llm_basics.analysis import compare, figures
from llm_basics.cli import checkpoint_commands, commands, parse, subcommands
from llm_basics.core import bpe, files, tokenizer, trainer, workers
from llm_basics.data import prepare, tokenizer_commands, tokenizer_formats
from llm_basics.evaluation import compare_models, log_likelihood
from llm_basics.inference import chat_session, engine, samples
from llm_basics.interop import hf_export
from llm_basics.learn import __main__ as learn
from llm_basics.learn import probe
from llm_basics.runs import checkpoint, signals

PACKAGE = Path(llm_basics.__file__).parent

# runs a command, which sends itself a signal when it imports a module
SIGNAL_AT_IMPORT = """
import os, runpy, sys
command, module, number, *sys.argv[1:] = sys.argv[1:]

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), int(number))

sys.meta_path.insert(0, Sender())
runpy.run_module(f"llm_basics.{command}", run_name="__main__", alter_sys=True)
"""
ARGUMENTS = {
    "checkpoint": ["list", "runs/a"],
    "tokenizer": ["inspect", "text"],
    "learn": ["dojo"],
}
WITHOUT_TORCH = ("plot", "compare", "completion", "lm_harness", "sweep", "steer", "prepare", "tokenizer")

# --------------------------------------------------------------------------------------------------
# While a command imports


@pytest.mark.parametrize("command", table.COMMANDS)
def test_every_command_handles_signals_before_its_imports(command):
    is_package = command in ("learn", "lab", "doctor")
    file = PACKAGE / command / "__main__.py" if is_package else PACKAGE / f"{command}.py"
    _, *statements = ast.parse(file.read_text()).body
    while not isinstance(statements[0], ast.If):
        imported = ast.unparse(statements.pop(0))
        assert imported in ("import importlib.util", "from llm_basics.runs import signals")
    assert ast.unparse(statements[0].test) == "__name__ == '__main__'"
    assert ast.unparse(statements[0].body[0]) == "signals.end_at_once()"
    assert ast.unparse(statements[-1].body[-1]).startswith("signals.run(")


@pytest.mark.parametrize(
    ("command", "module", "number"),
    [
        ("evaluate", "tyro", signal.SIGINT),
        ("learn", "tyro", signal.SIGTERM),
        ("compare", "llm_basics.analysis.compare", signal.SIGINT),
        *(
            pytest.param(command, module, number, marks=pytest.mark.slow)
            for command in table.COMMANDS
            for module in ("tyro", "torch")
            for number in (signal.SIGINT, signal.SIGTERM)
            # these import no torch before their program begins
            if module == "tyro" or command not in WITHOUT_TORCH
        ),
    ],
)
def test_a_signal_ends_a_command_that_imports_in_one_line(tmp_path, command, module, number):
    arguments = [command, module, str(int(number)), *ARGUMENTS.get(command, [])]
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_AT_IMPORT, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr.endswith(f"stopped by {number.name}\n") and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------
# While its program runs


def ended(capfd, program, options):
    """The exit status, standard output and standard error of a program that `signals.run` runs."""
    handlers = [signal.getsignal(number) for number in signals.SIGNALS]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        signals.run(program, options)
    assert [signal.getsignal(number) for number in signals.SIGNALS] == handlers
    found = capfd.readouterr()
    return stop.value.code, found.out, found.err


def send(number):
    os.kill(os.getpid(), number)


# the program, its default options, its arguments, and the function that is interrupted
PROGRAMS = {
    "evaluate": (
        compare_models.main,
        commands.EvaluateConfig(),
        "run --data text.txt --out made.json",
        (log_likelihood, "score_text"),
    ),
    "generate": (
        samples.main,
        commands.GenerateConfig(),
        "run --samples 2 --out made.jsonl",
        (engine, "complete_batch"),
    ),
    "chat": (chat_session.main, commands.ChatConfig(), "run --message a", (engine, "load_run")),
    "export": (
        hf_export.main,
        commands.ExportConfig(),
        "run --out made",
        (tokenizer_formats, "write_tokenizer_json"),
    ),
    "compare": (compare.main, commands.CompareConfig(), "run --out made.html", (figures, "draw")),
    "plot": (figures.main, commands.PlotConfig(), "run --out made.png", (figures, "save")),
    "tokenizer": (
        tokenizer_commands.main,
        subcommands.TOKENIZER,
        "train --data text.txt --out made",
        (bpe, "train_bpe"),
    ),
    "checkpoint": (checkpoint_commands.main, subcommands.CHECKPOINT, "verify run", (checkpoint, "verify")),
    "prepare": (
        prepare.main,
        commands.PrepareConfig(),
        "text.txt --tokenizer bytes --out made",
        (tokenizer.Tokenizer, "save"),
    ),
    "probe": (probe.main, commands.ProbeConfig(), "copy --out .", (trainer, "train_step")),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_signal_ends_a_program_in_one_line(name, number, untrained_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    folder = untrained_run("run", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"))
    (folder / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0, "val_loss": 2.0}\n')
    Path("text.txt").write_text("a text " * 100)
    main, defaults, arguments, (home, function) = PROGRAMS[name]
    fast = ["--fast=off"] if hasattr(defaults, "fast") or name == "tokenizer" else []
    options = parse.program_options(defaults, [*arguments.split(), *fast], name)
    monkeypatch.setattr(home, function, lambda *_, **__: send(number))
    status, out, error = ended(capfd, main, options)
    assert status == 128 + number
    lines = [line for line in (out + error).splitlines() if f"stopped by {number.name}" in line]
    assert len(lines) == 1 and "Traceback" not in error and not list(tmp_path.glob("*made*"))


def test_user_code_does_not_swallow_a_signal(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import os\n\ndef silu(x):\n    try:\n        os.kill(os.getpid(), 15)\n    except Exception:\n"
        "        pass\n    return x\n"
    )
    status, _, error = ended(capfd, learn.main, ["check", "silu"])
    assert (status, error) == (143, "checking mine.py: silu\nstopped by SIGTERM\n")


def test_a_program_ends_with_its_status_without_a_signal(capfd):
    assert ended(capfd, lambda options: options, 3) == (3, "", "")
    with pytest.raises(ZeroDivisionError):
        signals.run(lambda options: options / 0, 1)


@pytest.mark.parametrize(
    "swallow",
    [
        pytest.param(lambda: 0, id="returns"),
        pytest.param(lambda: 1 / 0, id="fails"),
        pytest.param(lambda: sys.exit(1), id="exits"),
    ],
)
def test_what_follows_a_signal_does_not_hide_it(swallow, capfd):
    """A library may turn `Stopped` into an error of its own, or fail while it cleans up."""

    def main(_):
        try:
            send(signal.SIGTERM)
        except signals.Stopped:
            return swallow()

    assert ended(capfd, main, None) == (143, "", "stopped by SIGTERM\n")


def test_a_keyboard_interrupt_of_a_library_is_a_signal_too(capfd):
    def main(_):
        raise KeyboardInterrupt

    assert ended(capfd, main, None) == (130, "", "stopped by SIGINT\n")


def test_cleaning_up_is_not_interrupted(tmp_path, capfd):
    def main(_):
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            files.write(tmp_path / "a", "whole")

    assert ended(capfd, main, None) == (143, "", "stopped by SIGTERM\n")
    assert (tmp_path / "a").read_text() == "whole"


def test_a_signal_ends_worker_processes(capfd):
    """Ctrl-C does not reach them; each would print a traceback."""
    blocked = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK)

    def main(_):
        with workers.mapped(blocked, [[]], 1) as masks:
            assert signal.SIGINT in next(masks)
        with workers.mapped(time.sleep, [600], 1):
            send(signal.SIGTERM)

    assert ended(capfd, main, None) == (143, "", "stopped by SIGTERM\n")
    assert signal.SIGINT not in blocked([]) and not multiprocessing.active_children()


def test_ctrl_c_can_be_pressed_often_in_a_conversation(capfd):
    def main(_):
        with signals.interactive():
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    send(signal.SIGINT)
            send(signal.SIGTERM)

    assert ended(capfd, main, None) == (143, "", "stopped by SIGTERM\n")
