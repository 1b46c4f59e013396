"""Parses the commands of the documentation by the programs that they start, without running those."""

import argparse
import ast
import contextlib
import dataclasses
import functools
import io
import re
import runpy
import sys
import tomllib
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import documents
import pytest
import tyro
from torch.distributed import run as torchrun

from llm_basics import __main__ as table
from llm_basics.cli import commands, parse, subcommands
from llm_basics.core import config
from llm_basics.lab import __main__ as lab
from llm_basics.learn import __main__ as learn
from llm_basics.post_training import options as post_training
from llm_basics.runs import run_dir, signals

ROOT = documents.ROOT
TESTS = ROOT / "tests"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS, GROUPS = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]
MARKERS = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]

# programs besides ours that the documentation starts by `uv run` or uvx, with options not looked at
OTHERS = {"ruff", "mypy"}
TOOLS = {"pre-commit", "jupytext"}


class Parsed(BaseException):
    """Raised when a program has read its command line."""


def nowhere() -> io.TextIOWrapper:
    """A standard output that is not shown."""
    return io.TextIOWrapper(io.BytesIO())


class CommandLine:
    """Parses arguments as `python -m llm_basics.COMMAND` or a benchmark does, and stops there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        run = folder / "runs" / "NAME"
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        (folder / "mine.yaml").write_text("train: {steps: 10}\n")
        monkeypatch.chdir(folder)
        monkeypatch.setattr(run_dir, "resolve", lambda name: run)
        monkeypatch.setattr(signals, "end_at_once", lambda: None)
        monkeypatch.setattr(parse, "set_up_process", lambda: None)
        for owner, name in ((parse, "_parse"), (argparse.ArgumentParser, "parse_args")):
            monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
        self.tyro = stopping(tyro.cli)

    def module(self, command: str, arguments: Sequence[str]) -> None:
        """Check the arguments of a command of the package."""
        assert command in table.COMMANDS, f"there is no command {command}"
        self._run(lambda: runpy.run_module(f"llm_basics.{command}", run_name="__main__"), command, arguments)

    def script(self, path: Path, arguments: Sequence[str]) -> None:
        """Check the arguments of a benchmark."""
        assert path.is_file(), f"there is no {path}"
        with self.monkeypatch.context() as patch:
            patch.syspath_prepend(path.parent)
            patch.setattr(tyro, "cli", self.tyro)
            self._run(lambda: runpy.run_path(str(path), run_name="__main__"), str(path), arguments)

    def _run(self, program: Callable[[], Any], name: str, arguments: Sequence[str]) -> None:
        # a variable of a script stands for options that it sets elsewhere
        given = [word for word in arguments if not re.fullmatch(r"\$\w+", word)]
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        printed = io.StringIO()
        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stderr(printed),
                contextlib.redirect_stdout(nowhere()),
            ):
                # a module that others have imported is run once more
                warnings.simplefilter("ignore", RuntimeWarning)
                program()
        except Parsed:
            return
        except SystemExit as stop:
            if stop.code in (0, None) and {"-h", "--help"} & set(arguments):
                return
            raise AssertionError(f"{name} {' '.join(arguments)}: {printed.getvalue()}") from None
        raise AssertionError(f"{name} has not parsed its arguments")


def stopping(read: Callable[..., Any]) -> Callable[..., Any]:
    """A function that reads a command line as `read` does, and then stops the program."""

    @functools.wraps(read)
    def wrapped(*args: Any, **kwargs: Any) -> typing.NoReturn:
        read(*args, **kwargs)
        raise Parsed

    return wrapped


# --------------------------------------------------------------------------------------------------
# A command


def check(words: Sequence[str], line: CommandLine) -> None:
    """Check a command: of the package, a benchmark, the tests, torchrun, or a tool."""
    if list(words[:2]) in (["uv", "sync"], ["uv", "pip"], ["uv", "venv"], ["uv", "build"]):
        check_packages(words[1:])
    elif words[0] == "uvx":
        assert words[1] in TOOLS, f"unknown tool {words[1]}"
    elif words[0] == "llm-basics":
        # `llm-basics` and `llm-basics COMMAND` speak of the program
        line.module(words[1], words[2:]) if words[1:] not in ([], ["COMMAND"]) else None
    else:
        assert words[:2] == ["uv", "run"], f"what is {' '.join(words)}?"
        if words[2:]:
            check_run(check_packages(words[2:]), line)


def check_packages(words: Sequence[str]) -> list[str]:
    """Check the optional packages at the start of a command; returns the rest."""
    rest = list(words)
    if rest[:3] == ["--isolated", "--resolution", "lowest-direct"]:
        del rest[:3]
    for flag, known in (("--extra", EXTRAS), ("--group", GROUPS)):
        while flag in rest[:1] or (rest[:1] == ["sync"] and flag in rest):
            place = rest.index(flag)
            assert rest[place + 1] in known, f"{flag} must be one of {list(known)}, got {rest[place + 1]}"
            del rest[place : place + 2]
    return rest


def check_run(words: list[str], line: CommandLine) -> None:
    """Check what stands behind `uv run`."""
    program, arguments = words[0], words[1:]
    if program == "python" and arguments[0] == "-m":
        package, _, command = arguments[1].partition(".")
        assert package == "llm_basics", f"unknown package {arguments[1]}"
        line.module(command, arguments[2:]) if command else None
    elif program == "python":
        line.script(ROOT / arguments[0], arguments[1:])
    elif program == "llm-basics":
        line.module(arguments[0], arguments[1:]) if arguments[0] != "--help" else None
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "torchrun":
        check_torchrun(arguments, line)
    else:
        assert program in OTHERS, f"unknown program {program}"


def check_torchrun(arguments: list[str], line: CommandLine) -> None:
    """Check torchrun's options by its own parser, and those of the program that it starts."""
    given = [re.sub(r"^\$\w+$", "1", word) for word in arguments]
    reader = torchrun.get_args_parser()
    reader.allow_abbrev = False
    options, unknown = reader.parse_known_args(given)
    assert not unknown and options.module, f"torchrun: {unknown}"
    line.module(options.training_script.removeprefix("llm_basics."), options.training_script_args)


# --------------------------------------------------------------------------------------------------
# pytest


def check_pytest(arguments: Sequence[str]) -> None:
    """Check files, test names, expressions of -k and -m, and options."""
    reader = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    reader.add_argument("files", nargs="*")
    for flag in ("-k", "-m", "-n"):
        reader.add_argument(flag)
    for flag in ("-s", "-q"):
        reader.add_argument(flag, action="store_true")
    reader.add_argument("--durations")
    for flag, has_value in options_of_conftest().items():
        reader.add_argument(flag, **({} if has_value else {"action": "store_true"}))
    known, unknown = reader.parse_known_args(list(arguments))
    assert not unknown, f"pytest: unknown {unknown}"
    for marker in re.findall(r"\w+", known.m or ""):
        assert marker in (*MARKERS, "or", "not", "and"), f"pytest: no marker {marker}"
    tests: set[str] = set()
    for name in known.files or [path.relative_to(ROOT) for path in TESTS.glob("test_*.py")]:
        file, _, test = str(name).partition("::")
        assert (ROOT / file).exists(), f"pytest: there is no {file}"
        tests |= tests_of(ROOT / file)
        assert not test or test.partition("[")[0] in tests_of(ROOT / file), f"pytest: there is no {name}"
    for word in re.findall(r"\w+", known.k or ""):
        is_there = word in ("or", "not", "and") or any(word in test for test in tests)
        assert is_there, f"pytest: -k {word} selects nothing in {known.files}"


@functools.cache
def options_of_conftest() -> dict[str, bool]:
    """The options of our tests, and whether each has a value."""
    source = (TESTS / "conftest.py").read_text(encoding="utf-8")
    found = re.findall(r'addoption\("(--[\w-]+)"(.*)', source)
    return {name: "store_true" not in rest for name, rest in found}


@functools.cache
def tests_of(path: Path) -> set[str]:
    """The names of a file's tests, and the strings that name cases of them."""
    program = ast.parse(path.read_text(encoding="utf-8"))
    tables = [node for node in program.body if isinstance(node, ast.Assign)]
    found = {path.stem, *(each.value for node in tables for each in ast.walk(node) if is_text(each))}
    for node in ast.walk(program):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            strings = {each.value for mark in node.decorator_list for each in ast.walk(mark) if is_text(each)}
            found |= {node.name, *(f"{node.name}[{text}]" for text in strings)}
    return found


def is_text(node: ast.AST) -> typing.TypeGuard[ast.Constant]:
    """Whether a node is a string that may be a parameter."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# --------------------------------------------------------------------------------------------------
# All options


@functools.cache
def options() -> set[str]:
    """The options of all our programs, of the tests and of torchrun, as their fields are written."""
    found = {option for name in options_of_conftest() for option in (name, documents.plain_option(name))}
    for module in (commands, subcommands, config, lab, learn, post_training):
        for kind in vars(module).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                found |= set(parse._flags(kind))
    for action in torchrun.get_args_parser()._actions:
        found |= {documents.plain_option(name) for name in action.option_strings}
    for path in (ROOT / "benchmarks").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        named = re.findall(r'"--([\w-]+)"', source) + re.findall(r"^    (\w+): ", source, re.M)
        found |= {documents.plain_option(f"--{name}") for name in named}
    return found | {"--help", "--extra", "--group", "--sync", "--durations", "--with", "--strict", "--nbmake"}
