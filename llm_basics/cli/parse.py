"""The command line of the programs.

An option's value comes from the command line, else from the file that `--config` names or the run that
`--resume` names, else from `config`. Loads without torch, so that `--help` and mistakes answer at once.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from llm_basics.core import config, presets
from llm_basics.runs import run_dir

T = TypeVar("T")


def train_options(
    arguments: Sequence[str], prog: str = "python -m llm_basics.train", preset: str = config.Config.config
) -> config.Config:
    """The config that a training run is started with. For a mistake, prints one line and exits with 2."""
    with exit_on_error():
        resumed = _value_of("--resume", arguments)
        for other in ("--config", "--run_dir", "--init_from"):
            if resumed is not None and _value_of(other, arguments) is not None:
                raise ValueError(
                    f"--resume must stand without {other}: the run has its options, folder and weights"
                )
        if resumed is None:
            base = _of_new_run(arguments, preset)
        else:
            folder = run_dir.resolve("newest" if resumed == "auto" else resumed)
            base = presets.update(
                config.Config(), run_dir.read_config(folder), origin=f"{folder}/config.json"
            )
        options = parse(base, arguments, prog)
        if resumed is None:
            return dataclasses.replace(options, init_from=base.init_from)
        return dataclasses.replace(options, resume=str(folder))


def _of_new_run(arguments: Sequence[str], preset: str) -> config.Config:
    """What the command line is laid over: a preset or a file, and that over the run whose weights are taken.

    Of that run count the model and the tokenizer; a preset that nobody asked for does not speak of these.
    """
    chosen = _value_of("--config", arguments)
    options = presets.read_yaml(chosen or preset)
    source = _value_of("--init_from", arguments) or options.get("init_from")
    base = config.Config()
    if source is not None:
        folder = run_dir.resolve(source)
        theirs = {"model": run_dir.read_config(folder).get("model", {}), "tokenizer": f"{folder}/tokenizer"}
        base = presets.update(base, theirs, origin=f"{folder}/config.json")
        options |= {"init_from": str(folder)}
        if chosen is None:
            options.pop("model", None)
    return presets.update(base, options, origin=chosen or preset)


def program_options(defaults: T, arguments: Sequence[str], prog: str) -> T:
    """What a program of one command is started with. For a mistake, prints one line and exits with 2."""
    with exit_on_error():
        return parse(defaults, arguments, prog)


def reduce_spin_wait() -> None:
    """Let threads that wait for each other give up their core sooner; to be called before torch is loaded.

    The threads of torch would keep cores busy for milliseconds that others want: another program, or the
    loops that write text.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def parse(defaults: T, arguments: Sequence[str], prog: str) -> T:
    """A copy of `defaults` with the command line's values set.

    Prints the options and exits for `--help`; raises ValueError for what it does not understand.
    """
    with _complaints_are_errors():
        parsed, unknown = tyro.cli(
            type(defaults),
            default=defaults,
            args=arguments,
            prog=prog,
            return_unknown_args=True,
            use_underscores=True,
        )
    if unknown:
        raise ValueError(
            presets.unknown_option(unknown[0].split("=")[0], _flags(type(defaults)), "command line")
        )
    return typing.cast(T, parsed)


def parse_command(commands: Any, arguments: Sequence[str], prog: str) -> Any:
    """The options of one of several commands: `commands` is a union of their classes."""
    with _complaints_are_errors():
        return tyro.cli(commands, args=arguments, prog=prog)


@contextlib.contextmanager
def _complaints_are_errors() -> Iterator[None]:
    """What tyro prints in a frame before it exits becomes a ValueError of one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_message_in_frame(complaint.getvalue())) from None


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Where something that was asked for cannot be done, say so in one line and exit with status 2."""
    try:
        yield
    except BrokenPipeError:
        # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """What stands behind `flag`: it decides which defaults the whole command line is laid over."""
    for argument, following in reversed(list(itertools.pairwise([*arguments, "--"]))):
        if argument == flag and not following.startswith("--"):
            return following
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def _flags(cls: Any, prefix: str = "--") -> list[str]:
    """The options of a program; what it takes by its place has no name to be typed."""
    flags = []
    (by_place,) = typing.get_args(tyro.conf.Positional[str])[1:]
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if by_place in getattr(hint, "__metadata__", ()):
            continue
        flags += _flags(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return flags


def _message_in_frame(frame: str) -> str:
    """The message that tyro draws a frame around, as one line: what stands between title and next rule."""
    words: list[str] = []
    for line in frame.splitlines()[1:]:
        content = line.strip("\u2502\u2570\u256f ")
        is_rule = not content.strip("\u2500-")
        if is_rule and words:
            break
        words += [] if is_rule else content.split()
    return re.sub(r"^Error parsing (?:(?:model|train|\w*Config): )?", "", " ".join(words))
