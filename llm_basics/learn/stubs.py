"""Stubs of reference pieces: the signature and the docstring with its worked example, without the body."""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from llm_basics import swap, user_code
from llm_basics.core import files
from llm_basics.learn import lessons

HEADER = '''"""My pieces. Check them: uv run python -m llm_basics.learn check --mine {name}"""

'''

# imports of a stub, by the identifier that needs them
FROM = {
    "collections": "Counter",
    "collections.abc": "Callable Iterable Iterator Mapping Sequence",
    "typing": "Any",
    "jaxtyping": "Bool Float Int",
    "torch": "Tensor nn",
}
IMPORTS = {name: f"import {name}" for name in ("contextlib", "math", "os", "regex", "torch")}
IMPORTS |= {name: f"from {module} import {name}" for module, names in FROM.items() for name in names.split()}
IMPORTS |= {"np": "import numpy as np"}

# methods of a class stub, called by training and tests; others are inherited from the reference
METHODS = {
    "Tokenizer": ["__init__", "encode", "encode_iterable", "decode"],
    "PackedSFTDataset": ["__init__", "__len__", "__getitem__"],
}
DEFAULT_METHODS = [
    "__init__",
    "forward",
    "backward",
    "step",
    "append",
    "add_param_group",
    "no_sync",
    "finish_gradient_synchronization",
    "gather_full_params",
]


def start(name: str, path: str | Path) -> list[str]:
    """Append the stubs of a step to a file, created if missing. Returns the names of the stubs."""
    path = Path(path)
    if path.suffix != ".py":
        raise ValueError(f"--into must be a Python file, got {path}")
    defined = user_code.names(path) if path.exists() else []
    lesson = lessons.load(name)
    missing = [piece for piece in lesson.pieces if piece not in defined and piece not in lesson.optional]
    if not missing:
        raise ValueError(f"{path} already defines {', '.join(lesson.needed)}; delete it there to start over")
    stubs = [stub(piece) for piece in missing]
    modules = [line for piece in missing for line in modules_used(piece)]
    source = path.read_bytes().decode("utf-8-sig") if path.exists() else HEADER.format(name=path.name)
    complete = _with_imports(source, stubs, modules)
    files.write(path, complete.replace("\n", "\r\n") if "\r\n" in source else complete)
    return missing


def stub(piece: str) -> str:
    """The source of a reference without its body and without the additions of a second stage of the step.

    >>> lines = stub("silu").splitlines()
    >>> lines[0], lines[-1]
    ('def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:', '    raise NotImplementedError("silu")')
    """
    reference = inspect.unwrap(swap.reference(f"{swap.HOMES[piece]}.{piece}"))
    lines = textwrap.dedent(inspect.getsource(reference)).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    step = lessons.of_piece(piece)
    later = list(lessons.load(step).later) if step else []
    if isinstance(node, ast.FunctionDef):
        parts = [*_head(node, lines, later), f'    raise NotImplementedError("{piece}")']
        return _qualify_names("\n".join(parts), reference)
    parts = _head(node, lines, later)
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name in METHODS.get(piece, DEFAULT_METHODS):
            parts += ["", *_head(part, lines, later)]
            parts += [f'        raise NotImplementedError("{piece}.{part.name}")']
    return _qualify_names("\n".join(parts), reference)


def modules_used(piece: str) -> list[str]:
    """Import lines of this package's modules that the reference of a piece uses.

    >>> modules_used("SwiGLU")
    ['from llm_basics.core import functional as F']
    """
    reference = swap.reference(f"{swap.HOMES[piece]}.{piece}")
    module = inspect.getmodule(inspect.unwrap(reference))
    methods = METHODS.get(piece, DEFAULT_METHODS)
    parts = (
        [vars(reference)[m] for m in methods if m in vars(reference)] if inspect.isclass(reference) else []
    )
    mentioned = set().union(*map(user_code.mentioned, parts or [reference]))
    lines = []
    for name in sorted(mentioned):
        path = getattr(vars(module).get(name), "__name__", "")
        if inspect.ismodule(vars(module).get(name)) and path.startswith("llm_basics."):
            package, _, last = path.rpartition(".")
            lines.append(f"from {package} import {last}" + (f" as {name}" if name != last else ""))
    return lines


def solution(piece: str) -> str:
    """The source of a reference."""
    return inspect.getsource(inspect.unwrap(swap.reference(f"{swap.HOMES[piece]}.{piece}")))


def _head(node: ast.FunctionDef | ast.ClassDef, lines: list[str], later: list[str]) -> list[str]:
    """The lines from the decorators to the end of the docstring, or to the body if there is no docstring.

    Without parameters named in `later`, and paragraphs of the docstring that mention one.
    """
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    body = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    last = (body.end_lineno or body.lineno) if has_docstring else body.lineno - 1
    head = [line for line in lines[first - 1 : last] if line.split(":")[0].strip() not in later]
    while head and head[-1].strip().startswith("#"):
        head.pop()
    paragraphs = "\n".join(head).split("\n\n")
    kept = "\n\n".join(text for text in paragraphs if not any(f"`{name}`" in text for name in later))
    return (kept if kept.endswith('"""') or not has_docstring else f'{kept}"""').splitlines()


def _qualify_names(source: str, reference: Any) -> str:
    """`source` with other names of the reference's module written as attributes of that module."""
    module = inspect.getmodule(reference)
    assert module is not None
    home = module.__name__.rpartition(".")[2]
    tree = ast.parse(source)
    defined = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in sorted(defined & set(vars(module))):
        value = vars(module)[name]
        is_local = getattr(value, "__module__", None) == module.__name__ or name.isupper()
        if is_local and name != reference.__name__:
            source = re.sub(rf"(?<![\w.]){name}(?![\w(])", f"{home}.{name}", source)
    return source


def _with_imports(source: str, stubs: list[str], required: list[str]) -> str:
    """`source` followed by the stubs, with the imports of both at the top."""
    for text in stubs:
        words = set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", text))
        required += [line for word, line in IMPORTS.items() if word in words]
        for module in ("bpe", "config", "dataloader", "layers", "model", "models", "trainer"):
            if re.search(rf"(?<![\w.]){module}\.", text):
                required.append(f"from llm_basics.core import {module}".replace("models", "model as models"))
    lines, tree = source.splitlines(), ast.parse(source)
    top = 0 if ast.get_docstring(tree) is None else 1
    imports: list[ast.Import | ast.ImportFrom] = []
    for node in tree.body[top:]:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            break
        imports.append(node)
    first = imports[0].lineno - 1 if imports else (tree.body[0].end_lineno or 0) if top else 0
    last = (imports[-1].end_lineno or 0) if imports else first
    existing = "\n".join(lines[first:last])
    if existing == _sorted_imports([ast.unparse(node) for node in imports]):
        block = _sorted_imports([ast.unparse(node) for node in imports] + required)
    else:
        # formatted differently: keep the existing lines unchanged
        bound = {alias.asname or alias.name for node in imports for alias in node.names}
        new = [line for line in dict.fromkeys(required) if line.split()[-1] not in bound]
        block = "\n".join(part for part in (existing, _sorted_imports(new)) if part)
    head, rest = "\n".join(lines[:first]).strip(), "\n".join(lines[last:]).strip()
    top_of_file = "\n\n".join(part for part in (head, block) if part)
    complete = "\n\n\n".join(part for part in (top_of_file, rest, *stubs) if part) + "\n"
    ast.parse(complete)
    return complete


def _sorted_imports(lines: list[str]) -> str:
    """Import lines as a block: standard library, other packages, this one; one line per module."""
    plain = {line for line in lines if line.startswith("import ") or " as " in line}
    names: dict[str, set[str]] = {}
    for line in set(lines) - plain:
        module, _, listed = line.removeprefix("from ").partition(" import ")
        names.setdefault(module, set()).update(name.strip() for name in listed.split(","))
    merged = plain | {f"from {module} import {', '.join(sorted(found))}" for module, found in names.items()}
    groups: dict[int, list[str]] = {}
    for line in merged:
        package = line.split()[1].split(".")[0]
        group = 0 if package in sys.stdlib_module_names else 2 if package == "llm_basics" else 1
        groups.setdefault(group, []).append(line)
    order = {group: sorted(found, key=lambda line: (line[0] == "f", line)) for group, found in groups.items()}
    return "\n\n".join("\n".join(order[group]) for group in sorted(order))
