"""Load user code: a Python file with pieces, checked against the signatures of the reference.

A piece must have the parameters of the reference, by name and in order. Optional ones may be missing: a call
that needs one of them raises ValueError; without `cache`, earlier tokens are recomputed. Missing methods of a
class, such as `TransformerLM.n_parameters`, are taken from the reference.
"""

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# parameters that do not affect results, so that a piece without them may ignore their values
IGNORABLE_PARAMETERS = {"progress", "n_workers"}

# modules that the last executed file imported from its folder
_HELPERS: list[str] = []

# file name and digest of each module of user code
_FILES: dict[str, str] = {}


def names(path: str | Path) -> list[str]:
    """The public names that a file defines at module level, in order.

    Raises ValueError if it is not a Python file.
    """
    if not Path(path).is_file():
        raise ValueError(f"your pieces must be in a Python file, but there is no {path}")
    try:
        tree = ast.parse(Path(path).read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise ValueError(f"{where} is not Python: {getattr(error, 'msg', error)}") from None
    found: list[str] = []
    stack: list[ast.AST] = [tree]
    while stack:
        match stack.pop():
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                found.append(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                found += [alias.asname or alias.name for alias in aliases]
            case ast.AsyncFunctionDef() | ast.Lambda():
                pass
            case other:
                stack += reversed(list(ast.iter_child_nodes(other)))
    return list(dict.fromkeys(name for name in found if not name.startswith("_")))


def execute(path: str | Path) -> types.ModuleType:
    """Execute a file as a module. Raises ValueError, with the line, if it fails."""
    path = Path(path).resolve()
    name = f"yours_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_UncachedLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # before execution: dataclasses and pickle find modules by name
    sys.modules[name] = module
    # appended, so that no file of its folder shadows a library
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    for helper in _HELPERS:
        sys.modules.pop(helper, None)
    before = set(sys.modules)
    writes_bytecode, sys.dont_write_bytecode = not sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = line_in(path, error.__traceback__) or getattr(error, "lineno", 0)
        relative = "; write `from helper import f`" if "relative import" in str(error) else ""
        raise ValueError(
            f"{path.name}:{line} could not be run: {type(error).__name__}: {error}{relative}"
        ) from error
    finally:
        sys.dont_write_bytecode = not writes_bytecode
    # modules imported from its folder are part of the user code, and are reloaded with it
    imported = {
        helper: getattr(sys.modules[helper], "__file__", None) for helper in sys.modules.keys() - before
    }
    beside = {helper: file for helper, file in imported.items() if file and Path(file).parent == path.parent}
    _HELPERS[:] = beside
    files = [path, *map(Path, sorted(beside.values()))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    _FILES[name] = f"{path.name} ({digest[:12]})"
    return module


class _UncachedLoader(importlib.machinery.SourceFileLoader):
    """Ignores cached bytecode, which is stale after a change within a second that keeps the size."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def line_in(path: str | Path, traceback: types.TracebackType | None) -> int:
    """The innermost line of a file in a traceback; 0 if there is none."""
    line, file = 0, str(Path(path).resolve())
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def withheld(piece: str, is_class: bool, path: str | Path) -> Callable[..., Any]:
    """A placeholder for a reference piece during the execution of a file that defines the same piece."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(f"{path} calls the reference {piece}; implement {piece.split('.')[1]} itself")

    refuse.__module__, refuse.__name__ = "llm_basics.withheld", piece.split(".")[1]
    if not is_class:
        return refuse
    # a class, so that `| None` and isinstance keep working in annotations
    kind = type("Withheld", (type,), {"__call__": refuse, "__instancecheck__": lambda cls, value: True})
    body = {"__init_subclass__": classmethod(refuse), "__module__": refuse.__module__}
    return kind(piece.split(".")[1], (), body)


def is_written_in(module: types.ModuleType, piece: Any, path: str | Path) -> bool:
    """Whether a piece is defined in the file. Raises ValueError for a placeholder of the reference."""
    origin = getattr(piece, "__module__", None)
    if origin is not None and origin.startswith("llm_basics"):
        name = getattr(piece, "__name__", "one")
        raise ValueError(
            f"{path} must define {name} itself, but imports it from {origin}; implement it, or to use the "
            "reference import its module (from llm_basics.core import layers, then layers.Linear)"
        )
    return origin == module.__name__


def origin(piece: Any) -> str:
    """The module of a piece; for user code, the file name and its SHA-256."""
    return _FILES.get(piece.__module__, piece.__module__)


def file_origin(module: types.ModuleType) -> str:
    """The file name and SHA-256 of an executed file."""
    return _FILES[module.__name__]


def same_code(origin: str, other: str) -> bool:
    """Whether two origins have the same digest, regardless of file names."""
    return origin.split(" (")[-1] == other.split(" (")[-1]


def is_of_file(origin: str) -> bool:
    """Whether an `origin` is user code."""
    return origin.endswith(")")


# --------------------------------------------------------------------------------------------------
# Signatures


def fit(name: str, own: Any, reference: Any, path: str | Path) -> Any:
    """`own`, completed to replace `reference`. Raises ValueError if its parameters differ."""
    if inspect.isclass(reference) != inspect.isclass(own):
        raise ValueError(
            f"{name} of {path} must be a {'class' if inspect.isclass(reference) else 'function'}"
        )
    if not inspect.isclass(reference):
        return _accept(name, own, reference, path)
    if name == "Tokenizer":
        return _tokenizer(own, reference, path)
    for method, expected in vars(reference).items():
        given = inspect.getattr_static(own, method, None)
        is_own = getattr(given, "__module__", None) == own.__module__
        if is_own and inspect.isfunction(expected) and method in ("__init__", "forward", "step"):
            setattr(own, method, _accept(f"{name}.{method}", given, expected, path))
        elif not hasattr(own, method) or (method == "extra_repr" and "__init__" not in vars(own)):
            setattr(own, method, expected)
    return own


def _accept(name: str, own: Callable[..., Any], reference: Callable[..., Any], path: str | Path) -> Any:
    """`own`, wrapped to raise ValueError for arguments without a parameter."""
    signature = inspect.signature(reference)
    ours = list(signature.parameters.values())
    given = list(inspect.signature(own).parameters.values())
    names = {p.name for p in given}
    missing = [p for p in ours if p.name not in names and p.default is not p.empty]
    expected = [p for p in ours if p not in missing]
    same = len(given) >= len(expected) and all(
        (a.name, a.kind) == (b.name, b.kind) and (a.default is not a.empty or b.default is b.empty)
        for a, b in zip(given, expected, strict=False)
    )
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    extra = given[len(expected) :]
    extra_is_optional = all(p.default is not p.empty or p.kind in variable for p in extra)
    if not same or not extra_is_optional or (extra and missing):
        raise ValueError(
            f"{name} of {path} must have the parameters of the reference\n"
            f"    yours      {_header(name, given)}\n"
            f"    reference  {_header(name, ours)}"
        )
    if not missing:
        return own
    recomputes = "cache" not in names and "token_positions" in names

    @functools.wraps(own)
    def accept(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        cache = arguments.pop("cache", None) if recomputes else None
        for parameter in missing:
            if parameter.name in arguments:
                _refuse(name, path, parameter, arguments.pop(parameter.name))
        return own(**arguments) if cache is None else _recompute(own, cache, **arguments)

    return accept


def _recompute(own: Callable[..., Any], cache: Any, x: Any, token_positions: Any = None, **rest: Any) -> Any:
    """The result for `x` of a causal layer without a parameter `cache`, recomputed from all tokens so far.

    The cache stores their inputs and positions in place of keys and values.
    """
    import torch

    n_new = x.shape[1]
    if token_positions is None:
        token_positions = torch.arange(cache.length, cache.length + n_new, device=x.device)
    token_positions = token_positions.expand(x.shape[:-1])
    if cache.length:
        x = torch.cat([cache.keys, x], dim=1)
        token_positions = torch.cat([cache.values, token_positions], dim=1)
    cache.keys, cache.values, cache.length = x, token_positions, x.shape[1]
    return own(x=x, token_positions=token_positions, **rest)[:, -n_new:]


def _refuse(name: str, path: str | Path, parameter: inspect.Parameter, value: Any) -> None:
    if parameter.name in IGNORABLE_PARAMETERS or value is parameter.default:
        return
    if isinstance(value, bool | int | float | str) and value == parameter.default:
        return
    raise ValueError(
        f"{name} of {path} has no parameter {parameter.name}, but is called with {value!r}; add it"
    )


def _header(name: str, parameters: list[inspect.Parameter]) -> str:
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    plain = [p if len(repr(p.default)) < 30 else p.replace(default=...) for p in plain]
    return f"{name}{inspect.Signature(plain)}"


def _tokenizer(own: type, reference: type, path: str | Path) -> type:
    """A subclass of the reference tokenizer that delegates to the methods of `own`, except for files.

    `encode_ordinary` uses a second instance of `own` without special tokens.
    """
    methods = {
        name: _accept(f"Tokenizer.{name}", method, getattr(reference, name), path)
        for name in dir(own)
        # including methods of its bases and decorated methods
        for method in [inspect.getattr_static(own, name)]
        if callable(method) and (name == "__init__" or not name.startswith("_"))
        if hasattr(reference, name) and method is not object.__init__
    }
    make: Any = type(own.__name__, (own,), {"__init__": methods["__init__"]} if "__init__" in methods else {})

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        reference.__init__(self, *args, **kwargs)  # type: ignore[misc]
        extra = (
            ()
            if self.pattern == inspect.signature(reference).parameters["pattern"].default
            else (self.pattern,)
        )
        self._yours = make(dict(self.vocab), list(self.merges), list(self.special_tokens), *extra)
        self._ordinary = make(dict(self.vocab), list(self.merges), [], *extra)

    def delegate(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: getattr(self._yours, name)(*args, **kwargs)

    body: dict[str, Any] = {name: delegate(name) for name in methods if name != "__init__"}
    if "encode" in methods:
        body.setdefault("encode_ordinary", lambda self, text: self._ordinary.encode(text))
        body.setdefault("encode_batch", lambda self, texts, n_threads=None: [self.encode(t) for t in texts])
    complete = type(own.__name__, (reference,), {"__init__": __init__, **body})
    complete.__module__, complete.__doc__ = own.__module__, own.__doc__
    # pickle finds the class by this name
    setattr(sys.modules[own.__module__], own.__name__, complete)
    return complete


# --------------------------------------------------------------------------------------------------
# Names in code


def parameters(module: Any) -> set[str]:
    """The parameters of `__init__` and `forward` of an nn.Module class."""
    methods = (module.__init__, module.forward)
    return set().union(*(inspect.signature(method).parameters for method in methods))


def mentioned(piece: Any) -> set[str]:
    """Every global and attribute name in the code of a function, or of all methods of a class."""
    if inspect.isclass(piece):
        # without classes: an autograd.Function and that of its backward pass refer to each other
        parts = [part for part in vars(piece).values() if not inspect.isclass(part)]
        return set().union(*map(mentioned, parts))
    piece = inspect.unwrap(getattr(piece, "__func__", piece)) if callable(piece) else piece
    code = getattr(piece, "__code__", None)
    found: set[str] = set()
    stack = [code] if code else []
    while stack:
        code = stack.pop()
        found |= set(code.co_names)
        stack += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found
