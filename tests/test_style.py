"""What the code promises about itself: floors, imports, hand-written pieces, sizes, docstrings."""

import ast
import re
from pathlib import Path

import pytest

import llm_basics
from llm_basics import fast, learn

PACKAGE = Path(llm_basics.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in SOURCES if path.name != "__init__.py"]

# the pieces that are written by hand; what torch has ready for them must not be used there
HAND_WRITTEN = ["functional", "layers", "model", "optim", "bpe", "tokenizer"]
READY_MADE = set(
    "linear embedding softmax log_softmax logsumexp silu gelu glu layer_norm rms_norm dropout cross_entropy "
    "nll_loss scaled_dot_product_attention clip_grad_norm_ clip_grad_value_".split()
)
ALLOWED_OF_NN = {"Module", "ModuleList", "Parameter", "Identity", "init"}
ALLOWED_OF_OPTIM = {"Optimizer"}

LONG_FUNCTIONS = {"project_heads": 75}


def floors() -> dict[str, tuple[int, int]]:
    """The floor of each module, as the maps in the packages' docstrings have it; twins stand on floor 3."""
    floor_of = {}
    ground = {"": 0, "fast/": 3, "learn/": 100}
    for doc, folder in ((llm_basics.__doc__, ""), (fast.__doc__, "fast/"), (learn.__doc__, "learn/")):
        floor = -1
        for line in (doc or "").splitlines():
            found = re.fullmatch(r"\s+(?:floor (\d+)\s+)?(\w+)\.py\s+.*", line)
            if found:
                floor = int(found[1] or floor)
                floor_of[folder + found[2]] = (ground[folder], floor) if folder else (floor, 0)
    return floor_of


def name_of(path: Path) -> str:
    """`model`, or `fast/bpe`: what a module is called here."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def own_imports(path: Path) -> list[str]:
    """The modules of this package that a file imports; fails on names imported out of them."""
    imported = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("llm_basics")):
            folders = {"llm_basics": "", "llm_basics.fast": "fast/", "llm_basics.learn": "learn/"}
            assert node.module in folders and not node.level, (
                f"{path.name}:{node.lineno} imports names out of {node.module}; import the module"
            )
            imported += [folders[node.module] + alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            assert not any(a.name.startswith("llm_basics") for a in node.names), f"{path.name}:{node.lineno}"
    return imported


def dotted(node: ast.AST) -> str:
    """`torch.nn.functional` for the attribute access that is written so; "" for anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def test_the_map_has_every_module():
    assert set(floors()) == {name_of(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down_and_name_modules(path):
    for name in own_imports(path):
        assert name in floors(), f"{path.name} imports {name}, which is no module"
        # a twin may call its reference, wherever that stands: only the seam loads it, and by name
        is_twin = name_of(path) == f"fast/{name}"
        assert is_twin or floors()[name] < floors()[name_of(path)], (
            f"{path.name} imports {name}, which is not below it"
        )


def test_nothing_but_the_seam_knows_of_the_fast_twins():
    for path in MODULES:
        if path.parent == PACKAGE and path.stem != "swap":
            assert "fast" not in re.findall(r"\bfast\b(?=[./])", path.read_text()), path.name
            assert not any(name.startswith("fast") for name in own_imports(path)), path.name


def test_package_imports_nothing():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_pieces_are_written_by_hand(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    for node in ast.walk(tree):
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
        # F is ours, self and shape are no tensors; torch's functions and a tensor's methods are ready-made
        if node.attr in READY_MADE and not path.startswith(("F.", "self.", "shape.")):
            raise AssertionError(f"{line} uses {path or '(...).' + node.attr}")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONG_FUNCTIONS.get(node.name, 60), f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert node.name == "main" or ast.get_docstring(node), (
                f"{path.name}: {node.name} has no docstring"
            )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_source_is_ascii_and_finished(path):
    source = path.read_text(encoding="utf-8")
    assert source.isascii()
    # the blanks of learn are there to be filled in
    blank = "" if name_of(path) == "learn/blanks" else "|NotImplementedError"
    assert not re.search(rf"\b(TODO|FIXME|XXX{blank})\b|from __future__", source)


def test_nothing_unpickles_or_evaluates():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = dotted(node)
            assert name not in {"torch.load", "torch.save", "yaml.load", "eval", "exec", "pickle.loads"}, (
                path.name
            )
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in [a.name for a in node.names] + [getattr(node, "module", None)], (
                    path.name
                )
