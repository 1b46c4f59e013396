"""What the code promises about itself: wings in an order, sizes, hand-written pieces, docstrings.

uv run pytest tests/test_style.py
"""

import ast
import functools
import re
from pathlib import Path

import pytest

import llm_basics
from llm_basics import __main__ as commands

PACKAGE = Path(llm_basics.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# a wing imports only wings above it in this list
WINGS = (
    *("core", "runs", "user_code", "systems", "alignment", "quality", "fast", "cli", "swap", "data"),
    *("inference", "interop", "evaluation", "analysis", "training", "post_training"),
    *("doctor", "learn", "lab"),
)

# the most lines of a wing, the default for those not named; of a file, a command, a function
WING_LINES = {"core": 3500, "fast": 7025, "learn": 3700, "training": 3200, "runs": 2800, "data": 2700}
OTHER_WING_LINES, FILE_LINES, COMMAND_LINES, FUNCTION_LINES = 2500, 350, 40, 60
FUNCTION_LINES_OF = {"train_step": 30, "fit": 30, "project_heads": 75}

# executable wrong implementations: content, not program
CATALOGUE = PACKAGE / "learn" / "mistakes"

# the pieces that are written by hand; what torch has ready for them must not be used there
HAND_WRITTEN = [f"core/{name}" for name in ("functional", "layers", "model", "optim", "bpe", "tokenizer")]
HAND_WRITTEN += sorted(f"systems/{path.stem}" for path in (PACKAGE / "systems").glob("[!_]*.py"))
HAND_WRITTEN += sorted(f"alignment/{path.stem}" for path in (PACKAGE / "alignment").glob("[!_]*.py"))
HAND_WRITTEN += sorted(f"quality/{path.stem}" for path in (PACKAGE / "quality").glob("[!_]*.py"))
READY_MADE = set(
    "linear embedding softmax log_softmax logsumexp silu gelu glu layer_norm rms_norm dropout cross_entropy "
    "nll_loss scaled_dot_product_attention clip_grad_norm_ clip_grad_value_".split()
)
ALLOWED_OF_NN = {"Module", "ModuleList", "Parameter", "Identity", "init"}
ALLOWED_OF_OPTIM = {"Optimizer"}


def name_of(path: Path) -> str:
    """`core.model`: the dotted name of a module below the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def wing_of(name: str) -> str:
    """The first part of a dotted name; "" for a command, which belongs to no wing."""
    first = name.split(".")[0]
    return first if first in WINGS else ""


@functools.cache
def program(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def own_imports(path: Path) -> list[str]:
    """The modules of this package that a file imports; fails on names imported out of them."""
    imported = []
    for node in ast.walk(program(path)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("llm_basics")):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}".removeprefix("llm_basics.")
                file = PACKAGE / name.replace(".", "/")
                is_module = file.with_suffix(".py").exists() or (file / "__init__.py").exists()
                assert is_module, (
                    f"{path}:{node.lineno} imports {alias.name} out of a module; import the module"
                )
                imported.append(name)
        elif isinstance(node, ast.Import):
            assert not any(a.name.startswith("llm_basics") for a in node.names), f"{path}:{node.lineno}"
    return imported


def dotted(node: ast.AST) -> str:
    """`torch.nn.functional` for the attribute access that is written so; "" for anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


# --------------------------------------------------------------------------------------------------
# Wings


def test_every_module_is_in_a_wing_or_a_command():
    at_root = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert at_root - set(WINGS) == {name for name in commands.COMMANDS if name not in WINGS}
    assert folders <= set(WINGS)


def test_a_wing_imports_only_wings_above_it():
    for path in SOURCES:
        wing = wing_of(name_of(path))
        for name in own_imports(path):
            other = wing_of(name)
            assert other, f"{path} imports the command {name}; nothing imports commands"
            if wing:
                assert WINGS.index(other) <= WINGS.index(wing), f"{path} imports {name}, which is below it"
            # swap.py loads fast implementations by name
            assert wing in ("fast", "") or other != "fast", (
                f"{path} imports {name}; only swap.py knows of fast"
            )


def test_no_circles():
    imports = {name_of(path): own_imports(path) for path in SOURCES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for imported in imports.get(name, ()):
                visit(imported, (*above, name))
            done.add(name)

    for name in imports:
        visit(name, ())


def test_modules_are_named_in_strings_only_by_the_seam():
    for path in SOURCES:
        if name_of(path) in ("swap", "__main__"):
            continue
        nodes, of_commands = list(ast.walk(program(path))), set()
        for node in nodes:
            if isinstance(node, ast.List | ast.Tuple):
                # [sys.executable, "-m", "llm_basics.train", ...]: a command, run in a process of its own
                texts = [getattr(each, "value", None) for each in node.elts]
                for before, each in zip(texts, node.elts[1:], strict=False):
                    if before == "-m" and isinstance(each, ast.Constant):
                        assert str(each.value).removeprefix("llm_basics.") in commands.COMMANDS, (
                            f"{path}:{each.lineno}"
                        )
                        of_commands.add(each)
        modules = re.compile(rf"llm_basics\.({'|'.join(WINGS)})(\.\w+)*$")
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in of_commands:
                assert not modules.match(node.value), f"{path}:{node.lineno} names a module in a string"


def test_the_word_fast_is_only_an_option_in_core():
    for path in sorted((PACKAGE / "core").glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(program(path)):
            if isinstance(node, ast.ClassDef):
                for field, doc in zip(node.body, node.body[1:], strict=False):
                    if isinstance(field, ast.AnnAssign) and dotted(field.target) == "fast":
                        lines[field.lineno - 1 : doc.end_lineno] = [""] * (
                            (doc.end_lineno or 0) - field.lineno + 1
                        )
        found = [
            number for number, line in enumerate(lines, start=1) if re.search(r"(?<!['\"])\bfast\b", line)
        ]
        assert not found, f"{path}:{found[0]} speaks of the fast implementations"


def test_packages_import_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        assert not [node for node in ast.walk(program(path)) if isinstance(node, ast.Import | ast.ImportFrom)]


# --------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("wing", WINGS)
def test_wings_keep_their_caps(wing):
    files = [path for path in SOURCES if wing_of(name_of(path)) == wing and CATALOGUE not in path.parents]
    n_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert n_lines <= WING_LINES.get(wing, OTHER_WING_LINES)


def test_files_and_functions_are_short():
    for path in SOURCES:
        if CATALOGUE in path.parents:
            continue
        n_lines = len(path.read_text(encoding="utf-8").splitlines())
        most = FILE_LINES if wing_of(name_of(path)) else COMMAND_LINES
        assert n_lines <= most, f"{path} has {n_lines} lines"
        for node in ast.walk(program(path)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                most = FUNCTION_LINES_OF.get(node.name, FUNCTION_LINES)
                assert length <= most, f"{path}: {node.name} has {length} lines"


# --------------------------------------------------------------------------------------------------
# Pieces, documentation, safety


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_pieces_are_written_by_hand(name):
    for node in ast.walk(program(PACKAGE / f"{name}.py")):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not any("nn.functional" in module or module == "torch.nn" for module in imported)
        if not isinstance(node, ast.Attribute):
            continue
        path, line = dotted(node), f"{name}.py:{node.lineno}"
        if re.match(r"(torch\.)?nn\.\w+", path):
            assert path.removeprefix("torch.").split(".")[1] in ALLOWED_OF_NN, f"{line} uses {path}"
        if re.match(r"torch\.optim\.\w+", path):
            assert path.split(".")[2] in ALLOWED_OF_OPTIM, f"{line} uses {path}"
        # F and optim are ours, self and config no tensors; functions of torch and methods of tensors are not
        if node.attr in READY_MADE and not path.startswith(("F.", "optim.", "self.", "config.")):
            raise AssertionError(f"{line} uses {path or '(...).' + node.attr}")


def test_public_names_are_documented():
    for path in SOURCES:
        tree = program(path)
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body if CATALOGUE not in path.parents else []:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert node.name == "main" or ast.get_docstring(node), f"{path}: {node.name} has no docstring"


# modules of learn that know of stubs
MEETS_STUBS = ("stubs", "judge", "probes", "rank", "mistakes")


def test_source_is_ascii_and_finished():
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        assert source.isascii(), path
        # the stubs of learn are there to be filled in
        stub = (
            ""
            if name_of(path).startswith(tuple(f"learn.{name}" for name in MEETS_STUBS))
            else "|NotImplementedError"
        )
        assert not re.search(rf"\b(TODO|FIXME|XXX{stub})\b|from __future__", source), path


def test_nothing_unpickles_or_evaluates():
    for path in SOURCES:
        for node in ast.walk(program(path)):
            name = dotted(node)
            assert name not in {"torch.load", "torch.save", "yaml.load", "eval", "exec", "pickle.loads"}, path
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in [a.name for a in node.names] + [getattr(node, "module", None)], path


# what writes in place, and the modules that may: the writer itself, locks, /dev/null, caches
IN_PLACE = set("write_text write_bytes tofile touch mkdir makedirs copyfile copy2 save_file".split())
MAY_WRITE_IN_PLACE = {"core.files", "runs.run_dir", "runs.console"}
MAY_WRITE_IN_PLACE |= {"fast.cache_folder", "fast.kernel_cache", "fast.precompile"}


def test_files_are_written_by_the_atomic_writer():
    for path in SOURCES:
        is_mentioned = re.search(rf"\b(open|{'|'.join(IN_PLACE)})\(", path.read_text(encoding="utf-8"))
        if not is_mentioned or name_of(path) in MAY_WRITE_IN_PLACE or CATALOGUE in path.parents:
            continue
        for node in ast.walk(program(path)):
            if isinstance(node, ast.Call):
                name = (dotted(node.func) or getattr(node.func, "attr", "")).split(".")[-1]
                given = [
                    getattr(each, "value", "") for each in [*node.args, *(k.value for k in node.keywords)]
                ]
                is_written = any(re.fullmatch("[wax][bt+]*|r[bt]*[+][bt]*", str(mode)) for mode in given)
                assert name not in IN_PLACE and not (name == "open" and is_written), (
                    f"{path}:{node.lineno} writes by {name}; use core/files.py"
                )
