"""Command-line parsing, without importing torch, so that --help and errors are immediate.

An option's value comes from the command line, else from the YAML file of `--config` or the run directory of
`--resume`, else from the defaults.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import tyro

from llm_basics.core import config, files, presets
from llm_basics.runs import run_dir, steering

T = TypeVar("T")

# exit statuses for non-finite values, results that could not be saved, and insufficient memory
NOT_FINITE, NOT_SAVED, NO_MEMORY = 1, 3, 4

# maximum length of an error message, which may quote a value of a file
MESSAGE_LETTERS = 2000

# errors of the disk, and of an invalid path
DISK = {*files.FULL, errno.EROFS, errno.EIO}
WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG}


def command_options(options: Any) -> Any:
    """The options of the running command, from sys.argv; called before torch is imported.

    `options` is a dataclass instance with the defaults, or a union of subcommand classes. On an error, prints
    one line and exits with 2.
    """
    set_up_process()
    return program_options(options, sys.argv[1:], _program(), _title())


def train_command_options(
    preset: str = config.Config.config, defaults: config.Config | None = None
) -> config.Config:
    """`command_options` for a training command, with the options of `preset` over `defaults`."""
    set_up_process()
    return train_options(sys.argv[1:], _program(), preset, _title(), defaults)


def _program() -> str:
    """The running command in usage lines: `python -m llm_basics.train`."""
    return f"python -m llm_basics.{Path(sys.argv[0]).stem}"


def _title() -> str:
    """The first line of the running command's docstring, which `llm-basics --help` shows too."""
    return (sys.modules["__main__"].__doc__ or "").partition("\n")[0]


def set_up_process() -> None:
    """Accept any character on the standard streams and shorten torch's spin wait; before torch is imported.

    OpenMP threads that spin for milliseconds occupy cores that other programs and the decoding kernels need.
    """
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def train_options(
    arguments: Sequence[str],
    prog: str = "python -m llm_basics.train",
    preset: str = config.Config.config,
    description: str | None = None,
    defaults: config.Config | None = None,
) -> config.Config:
    """The options of a training run, over `defaults`. On an error, prints one line and exits with 2."""
    defaults = defaults or config.Config()
    with exit_on_error():
        resumed, replayed = _value_of("--resume", arguments), _value_of("--replay", arguments)
        for other in ("--config", "--run_dir", "--init_from"):
            if resumed is not None and _value_of(other, arguments) is not None:
                raise ValueError(
                    f"--resume cannot be combined with {other}; a resumed run keeps its options, "
                    "run directory and weights"
                )
        for other in ("--config", "--resume", "--init_from"):
            if replayed is not None and _value_of(other, arguments) is not None:
                raise ValueError(f"--replay cannot be combined with {other}; it repeats a run from its start")
        if replayed is not None:
            base = _options_to_replay(replayed, defaults)
        elif resumed is None:
            base = _defaults_of_new_run(arguments, preset, defaults)
        else:
            folder = run_dir.resolve("newest" if resumed == "auto" else resumed)
            base = run_dir.load_options(folder, defaults)
        options = parse(base, arguments, prog, description)
        if resumed is None:
            return dataclasses.replace(options, init_from=base.init_from, replay=base.replay)
        return dataclasses.replace(options, resume=str(folder))


def _defaults_of_new_run(arguments: Sequence[str], preset: str, base: config.Config) -> config.Config:
    """Defaults for the command line of a new run: --config or `preset`, over the run of --init_from.

    That run provides model options and tokenizer, and an implicit preset does not override its model.
    """
    explicit = _value_of("--config", arguments)
    options = presets.read_yaml(explicit or preset)
    source = _value_of("--init_from", arguments) or options.get("init_from")
    if source is not None:
        folder = run_dir.resolve(source)
        kept = {"model": run_dir.read_config(folder).get("model", {}), "tokenizer": f"{folder}/tokenizer"}
        base = presets.update(base, kept, origin=f"{folder}/config.json")
        options |= {"init_from": str(folder)}
        if explicit is None:
            options.pop("model", None)
    return presets.update(base, options, origin=explicit or preset)


def _options_to_replay(name: str, defaults: config.Config) -> config.Config:
    """The initial options of a run, for a new run directory."""
    folder = run_dir.resolve(name)
    options = run_dir.load_options(folder, defaults)
    options = steering.original(options, folder)
    mine = str(folder / "mine.py") if (folder / "mine.py").exists() else options.mine
    return dataclasses.replace(options, resume=None, run_dir=None, replay=str(folder), mine=mine)


def program_options(options: Any, arguments: Sequence[str], prog: str, description: str | None = None) -> Any:
    """`parse` or, for a union of classes, `parse_command`. On an error, prints one line and exits with 2."""
    with exit_on_error():
        read = parse if dataclasses.is_dataclass(options) else parse_command
        return read(options, arguments, prog, description)


def parse(defaults: T, arguments: Sequence[str], prog: str, description: str | None = None) -> T:
    """A copy of `defaults` with the values of the command line. `--help` prints the options and exits.

    Raises ValueError for unknown options and invalid values.
    """
    return typing.cast(T, _parse(type(defaults), arguments, prog, description, default=defaults))


def parse_command(commands: Any, arguments: Sequence[str], prog: str, description: str | None = None) -> Any:
    """The options of one of several subcommands; `commands` is the union of their classes.

    Raises ValueError for unknown subcommands, unknown options and invalid values.
    """
    names = [
        each.__metadata__[0].name if hasattr(each, "__metadata__") else each.__name__.lower()
        for each in typing.get_args(commands)
    ]
    if arguments and arguments[0] not in (*names, "-h", "--help"):
        raise ValueError(unknown_name("command", arguments[0], names))
    return _parse(commands, arguments, prog, description)


def _parse(kind: Any, arguments: Sequence[str], prog: str, description: str | None, **default: Any) -> Any:
    with _tyro_errors_as_value_errors():
        parsed, unknown = tyro.cli(
            kind,
            args=arguments,
            prog=prog,
            description=description,
            return_unknown_args=True,
            use_underscores=True,
            **default,
        )
    if unknown:
        raise ValueError(
            presets.unknown_option(unknown[0].split("=")[0], _flags(type(parsed)), "command line")
        )
    return parsed


@contextlib.contextmanager
def _tyro_errors_as_value_errors() -> Iterator[None]:
    """Raise tyro's framed error message as a ValueError of one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_message_in_frame(printed.getvalue())) from None


@contextlib.contextmanager
def exit_on_error(flush: bool = True) -> Iterator[None]:
    """Print a ValueError or OSError as one line and exit with status 2, or NOT_SAVED for errors of the disk.

    Non-finite values exit with NOT_FINITE, insufficient memory with NO_MEMORY, a closed output pipe with 0.
    With `flush`, standard output is flushed at the end, which may raise.
    """
    try:
        yield
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        sys.exit(0)
    except (ValueError, OSError) as error:
        print(f"error: {message(error)}", file=sys.stderr)
        if is_of_output(error):
            _discard_output()
        sys.exit(NOT_SAVED if is_of_disk(error) else 2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(NOT_FINITE)
    except (RuntimeError, MemoryError) as error:
        from llm_basics.runs import process  # imports torch, which has raised the error

        if not process.is_out_of_memory(error):
            raise
        print("error: out of memory", file=sys.stderr)
        sys.exit(NO_MEMORY)


def message(error: Exception) -> str:
    """An error as printable text, without the error number of an OSError."""
    if is_of_output(error):
        return f"the output could not be written ({error.strerror})"
    if not isinstance(error, OSError) or isinstance(error, files.WriteError) or error.strerror is None:
        text = str(error)
    else:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if len(text) > MESSAGE_LETTERS:
        text = f"{text[: MESSAGE_LETTERS // 2]} ... {text[-MESSAGE_LETTERS // 2 :]}"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def is_of_disk(error: Exception) -> bool:
    """Whether an error is of saving a result: a full or read-only disk, no permission."""
    number = error.errno if isinstance(error, OSError) else None
    return number in DISK or (isinstance(error, files.WriteError) and number not in WRONG_PATH)


def is_of_output(error: Exception) -> TypeGuard[OSError]:
    """Whether an error is of writing to standard output; errors of all other writes have a file name."""
    is_named = isinstance(error, files.WriteError) or getattr(error, "filename", None) is not None
    return getattr(error, "errno", None) in files.FULL and not is_named


def _discard_output() -> None:
    """Redirect standard output to the null device, so that Python's flush at exit does not fail again."""
    with contextlib.suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of `flag`, read before parsing, since it selects the defaults."""
    for argument, following in reversed(list(itertools.pairwise([*arguments, "--"]))):
        if argument == flag and not following.startswith("--"):
            return following
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """The error message for an unknown name, with the closest known one, or all of them.

    >>> unknown_name("step", "softmx", ["linear", "softmax"])
    'unknown step softmx; did you mean softmax?'
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name}; " + (
        f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(known)}"
    )


def _flags(cls: Any, prefix: str = "--") -> list[str]:
    """The flags of an options class; positional arguments have none."""
    flags = []
    (positional,) = typing.get_args(tyro.conf.Positional[str])[1:]
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if positional in getattr(hint, "__metadata__", ()):
            continue
        flags += _flags(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return flags


def _message_in_frame(frame: str) -> str:
    """The message in tyro's frame as one line: the text between the title and the next rule."""
    words: list[str] = []
    for line in frame.splitlines()[1:]:
        content = line.strip("\u2502\u2570\u256f ")
        is_rule = not content.strip("\u2500-")
        if is_rule and words:
            break
        words += [] if is_rule else content.split()
    return re.sub(r"^Error parsing (?:(?:model|train|\w*Config): )?", "", " ".join(words))
