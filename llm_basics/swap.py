"""The seam: whose pieces are in use, the reference, its fast twins, or yours.

Every call goes through a module's attribute, so to replace a piece is to set that attribute. A twin has the
name and the signature of its reference, and the same results; a piece of yours has the name and the
signature, and is what the tests are for. Yours goes before any twin.

    >>> with using("fast", say=lambda line: None):
    ...     origins()["bpe.train_bpe"]
    'llm_basics.fast.bpe'
    >>> origins()["bpe.train_bpe"]
    'llm_basics.bpe'
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_basics import theirs

# the modules that have twins: those of `bpe` are in fast/bpe.py
WITH_TWINS = ("bpe", "tokenizer", "data", "functional", "layers", "optim", "update", "generate")
TWINS = {home: [f"llm_basics.fast.{home}"] for home in WITH_TWINS}
# torch's kernels were not measured to be slower than these, so they are for those who ask
IN_TRITON = {
    "functional": [f"llm_basics.fast.triton_{kind}" for kind in ("norm", "cross_entropy", "attention")]
}

# what somebody can write in a file of their own, by the module that calls it
PIECES = {
    "functional": "linear embedding softmax log_softmax silu gelu relu2 swiglu dropout rms_norm layer_norm "
    "rope_tables apply_rope causal_mask scaled_dot_product_attention cross_entropy linear_cross_entropy",
    "layers": "Linear Embedding Dropout RMSNorm LayerNorm SwiGLU MLP RotaryEmbedding MultiHeadSelfAttention",
    "model": "TransformerBlock TransformerLM",
    "optim": "cosine_schedule clip_grad_norm_ adamw_update AdamW",
    "bpe": "pretokenize count_pretokens learn_merges train_bpe",
    "tokenizer": "Tokenizer",
    "data": "get_batch",
    "evaluate": "evaluate",
    "generate": "next_token_probabilities generate",
    "update": "train_step make_optimizer compute_loss",
}
HOMES = {name: home for home, names in PIECES.items() for name in names.split()}

# pieces that a fast implementation calls just as its reference does, so that yours are not bypassed
STILL_CALLED = {"update.train_step": {"optim.clip_grad_norm_"}}

# the reference's own pieces, kept from the moment they were first replaced
_REFERENCE: dict[str, Any] = {}


def use(
    what: str | Path,
    say: Callable[[str], None] = print,
    prepare: Callable[[types.ModuleType], None] = lambda module: None,
) -> None:
    """Put the fast twins, or the pieces of a Python file, in their places, until the program ends.

    `prepare` is given the module that the file makes, before its pieces are taken from it. Raises ValueError,
    with nothing replaced, for a file that cannot be run or has a piece that does not fit.
    """
    if str(what) in ("fast", "triton"):
        _use_twins(TWINS if str(what) == "fast" else IN_TRITON, say)
        return
    if not str(what).endswith(".py"):
        raise ValueError(
            f"what to use must be fast, triton or a Python file with your pieces, got {str(what)!r}"
        )
    for piece, own in _load(what, say, prepare).items():
        put(piece, own)
    for piece in twins():
        if set(yours()) & _bypassed(piece):
            put(piece, reference(piece))


def _load(
    path: str | Path, say: Callable[[str], None], prepare: Callable[[types.ModuleType], None]
) -> dict[str, Any]:
    """The pieces of a Python file, fit to be put in place: `functional.softmax` -> the function.

    While the file is run, the reference's versions of what it defines are not there to be had.
    """
    defined = {name: f"{HOMES[name]}.{name}" for name in theirs.names(path) if name in HOMES}
    references = {piece: reference(piece) for piece in defined.values()}
    withheld = {
        piece: theirs.withheld(piece, isinstance(own, type), path) for piece, own in references.items()
    }
    with replaced(withheld):
        module = theirs.run(path)
        prepare(module)
    found = {}
    for name, piece in defined.items():
        own = getattr(module, name, None)
        if not callable(own):
            say(f"{name} of {path} is neither function nor class: not used")
            continue
        if theirs.is_written_in(module, own, path):
            found[piece] = theirs.fit(name, own, references[piece], path)
        else:
            origin = getattr(own, "__module__", None) or type(own).__name__
            say(f"{name} of {path} comes from {origin}: not used, since it was not written there")
    if not found:
        raise ValueError(f"{path} must define a piece (such as softmax or RMSNorm), but has none")
    return found


def piece(key: str) -> str:
    """The present key of a piece, where an older version may have had it in another module.

    >>> piece("session.make_optimizer")
    'update.make_optimizer'
    """
    name = key.rpartition(".")[2]
    return f"{HOMES[name]}.{name}" if name in HOMES else key


def reference(piece: str) -> Any:
    """The reference's own version of `functional.softmax`, whatever is in its place."""
    return _REFERENCE.get(piece) or _current(piece)


def put(piece: str, replacement: Any) -> None:
    """Set a piece in the module that calls it."""
    home, name = piece.split(".")
    _REFERENCE.setdefault(piece, reference(piece))
    for module in _modules(home):
        setattr(module, name, replacement)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Whatever is put in place in the block, at its end all pieces are what they were before."""
    before = {piece: _current(piece) for piece in _REFERENCE}
    try:
        yield
    finally:
        for piece, original in _REFERENCE.items():
            put(piece, before.get(piece, original))


@contextlib.contextmanager
def replaced(pieces: Mapping[str, Any]) -> Iterator[None]:
    """`put` all of `pieces` for the length of a block."""
    with restored():
        for piece, replacement in pieces.items():
            put(piece, replacement)
        yield


def the_reference_alone() -> contextlib.AbstractContextManager[None]:
    """All pieces as they were before any was replaced, for the length of a block."""
    return replaced(dict(_REFERENCE))


@contextlib.contextmanager
def using(what: str | Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """`use` for the length of a block."""
    with restored():
        use(what, say)
        yield


def origins() -> dict[str, str]:
    """For each piece in modules that are loaded, the module or the file whose version is in use."""
    pieces = [f"{home}.{name}" for home, names in PIECES.items() for name in names.split()]
    return {
        piece: theirs.origin(_current(piece))
        for piece in dict.fromkeys([*pieces, *_REFERENCE])
        if f"llm_basics.{piece.split('.')[0]}" in sys.modules
    }


def twins() -> list[str]:
    """The pieces that a fast twin stands for."""
    return [piece for piece, origin in origins().items() if origin.startswith("llm_basics.fast.")]


def yours() -> dict[str, str]:
    """The pieces in use that are from somebody's file, and which file that is."""
    return {piece: origin for piece, origin in origins().items() if theirs.is_of_file(origin)}


def explain() -> str:
    """Whose pieces are in use, as a line: those of files by name, fast twins by their number."""
    files: dict[str, list[str]] = {}
    for piece, origin in yours().items():
        files.setdefault(origin, []).append(piece.split(".")[1])
    told = [f"{', '.join(names)} from {origin}" for origin, names in files.items()]
    if n_twins := len(twins()):
        told.append(f"{n_twins} fast twins (--fast off does without)")
    return "; ".join([*told, "the others are the reference's"]) if told else "all are the reference's"


def prepare_model(model: Any, batch_size: int, seq: int) -> None:
    """Compile the kernels for training steps of this shape, if fast implementations are in use."""
    if "update.batch_loss" in twins():
        importlib.import_module("llm_basics.fast.update").prepare_model(model, batch_size, seq)


def _modules(home: str) -> list[types.ModuleType]:
    """The module of that name; and the program that runs, if it is that one under the name `__main__`."""
    path = f"llm_basics.{home}"
    main = sys.modules["__main__"]
    return [importlib.import_module(path), *([main] if _name_of_main() == path else [])]


def _name_of_main() -> str:
    """What the program that runs is called as a module: `llm_basics.train`."""
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")


def _current(piece: str) -> Any:
    home, name = piece.split(".")
    return getattr(_modules(home)[0], name)


# --------------------------------------------------------------------------------------------------
# Fast twins


def _use_twins(paths: Mapping[str, Sequence[str]], say: Callable[[str], None]) -> None:
    machine = importlib.import_module("llm_basics.fast.machine")
    if "llm_basics.bpe" in sys.modules and not machine.used_before() and not twins():
        say("compiling the fast tokenizer, which takes about 10 s and is done once (--fast off does without)")
    own = set(yours())
    for module, name, twin in _twins(paths):
        piece = f"{_home(module)}.{name}"
        bypassed = own & _bypassed(piece)
        if bypassed - {piece}:
            say(f"the fast twin of {name} is not used: it would go past your {', '.join(sorted(bypassed))}")
        # a piece that somebody else has put there wins
        elif getattr(module, name).__module__ == module.__name__ or piece in twins():
            put(piece, twin)


def _twins(
    paths: Mapping[str, Sequence[str]] = TWINS,
) -> Iterator[tuple[types.ModuleType, str, object]]:
    """The module, name and twin of each piece that has one, in modules that are loaded."""
    for home, path in ((home, path) for home, several in paths.items() for path in several):
        if f"llm_basics.{home}" not in {*sys.modules, _name_of_main()}:
            continue
        module = importlib.import_module(f"llm_basics.{home}")
        # a twin may inherit from its reference: not from what is in its place
        with contextlib.nullcontext() if path in sys.modules else the_reference_alone():
            try:
                of_path = importlib.import_module(path)
            except ModuleNotFoundError as error:
                raise ValueError(f"{path} needs {error.name}, which is not installed here") from None
        for name, twin in sorted(vars(of_path).items()):
            if (
                getattr(twin, "__module__", None) == path
                and not name.startswith("_")
                and hasattr(module, name)
            ):
                yield module, name, twin


def _home(module: types.ModuleType) -> str:
    return module.__name__.removeprefix("llm_basics.")


def _bypassed(piece: str) -> set[str]:
    """The pieces that the fast implementation of `piece` does not call, where its reference does."""
    return _needs(piece) - STILL_CALLED.get(piece, set())


def _needs(piece: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """The pieces that the reference of `piece` calls, and those that they call; itself included."""
    mentioned = theirs.mentioned(reference(piece))
    names = {name for name in mentioned if name in HOMES and f"{HOMES[name]}.{name}" not in seen | {piece}}
    needed = {piece}
    for name in names:
        needed |= _needs(f"{HOMES[name]}.{name}", seen | {piece} | needed)
    return needed
