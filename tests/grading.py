"""The report on an implementation: JSON for programs, a Markdown page for readers."""

import ast
import functools
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_basics.learn import judge, mistakes, sockets

# ready-made versions in torch and the tokenizer libraries of what is to be implemented
READY_MADE = set(
    "linear embedding softmax log_softmax logsumexp silu gelu glu layer_norm rms_norm dropout cross_entropy "
    "nll_loss scaled_dot_product_attention clip_grad_norm_ clip_grad_value_ "
    "Linear Embedding LayerNorm RMSNorm Softmax LogSoftmax SiLU GELU CrossEntropyLoss MultiheadAttention "
    "Transformer TransformerEncoderLayer AdamW Adam CosineAnnealingLR".split()
)
TENSOR_METHODS = {"softmax", "log_softmax", "logsumexp"}
LIBRARIES = {"tiktoken", "tokenizers", "transformers", "sentencepiece"}


def adapters_of(step: str) -> list[str]:
    """The adapters that the probes of a step call, in order."""
    source = (Path(mistakes.__path__[0]) / f"{step}.py").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"\b(?:a|adapters)\.((?:run|get)_\w+)", source)))


@functools.cache
def step_of(adapter: str) -> str | None:
    """The first step in learning order that uses an adapter."""
    return next((step for step in judge.STEPS if adapter in adapters_of(step)), None)


def load_adapters(path: Path) -> ModuleType:
    """Load an adapters file with its folder, and the package it tests, on the import path."""
    for folder in (str(path.parent), str(path.parent.parent), str(path.parent.parent / "src")):
        if folder not in sys.path and Path(folder).is_dir():
            sys.path.insert(0, folder)
    _provide_version(path.parent.parent)
    return sockets.run_file(path)


def _provide_version(project: Path) -> None:
    """Let `importlib.metadata.version` return "0" for the project under test, which is not installed."""
    installed_version = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return installed_version(name)
        except importlib.metadata.PackageNotFoundError:
            if (project / name.replace("-", "_")).is_dir():
                return "0"
            raise

    importlib.metadata.version = version


def ready_made_uses(path: Path) -> dict[str, list[str]]:
    """For each step, the lines reachable from its adapters that use a ready-made version of a piece.

    Static: follows, from each adapter, every function and class that is mentioned in the adapters file and in
    the packages beside it.
    """
    root = path.parent.parent if path.parent.name == "tests" else path.parent
    defined: dict[str, list[tuple[Path, ast.AST]]] = {}
    names_of: dict[Path, dict[str, str]] = {}
    for source in {path, *_sources(root)}:
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        names_of[source] = _imported(tree)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.setdefault(node.name, []).append((source, node))
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        defined.setdefault(target.id, []).append((source, node))
    found = {}
    for step in judge.STEPS:
        uses: set[str] = set()
        waiting = [(path, name) for name in adapters_of(step)]
        seen: set[tuple[Path, str]] = set()
        while waiting:
            where, name = waiting.pop()
            if (where, name) in seen:
                continue
            seen.add((where, name))
            for source, node in _meant(where, name, defined, names_of):
                file = source.relative_to(root)
                uses |= {f"{file}:{line} uses {name}" for line, name in _uses(node, names_of[source])}
                waiting += [(source, mentioned) for mentioned in _mentions(node)]
        if uses:
            found[step] = sorted(uses)
    return found


def _sources(root: Path) -> Iterator[Path]:
    """The Python files of a project, without tests and installed packages."""
    for source in root.rglob("*.py"):
        parts = source.relative_to(root).parts
        skipped = any(p.startswith((".", "test")) or p in ("site-packages", "node_modules") for p in parts)
        if not skipped and not any((folder / "pyvenv.cfg").exists() for folder in source.parents):
            yield source


def _meant(
    where: Path,
    name: str,
    defined: dict[str, list[tuple[Path, ast.AST]]],
    names_of: dict[Path, dict[str, str]],
) -> list[tuple[Path, ast.AST]]:
    """The definitions of a name used in the file `where`: there, or in a file that it imports."""
    imported = names_of.get(where, {})
    found = defined.get(imported.get(name, name).split(".")[-1], [])
    here = [pair for pair in found if pair[0] == where and name not in imported]
    modules = {part for full in imported.values() for part in full.split(".")}
    return here or [pair for pair in found if {pair[0].stem, pair[0].parent.name} & modules]


def _imported(tree: ast.Module) -> dict[str, str]:
    """The full name of each imported name: `tF` -> `torch.nn.functional`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else (alias.name.split(".")[0])
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _uses(node: ast.AST, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    """The line and full name of each ready-made function in `node`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute | ast.Name):
            path = dotted(part)
            first, _, rest = path.partition(".")
            full = f"{names[first]}{'.' + rest if rest else ''}" if first in names else path
            if re.match(r"torch(\.|$)", full) and full.split(".")[-1] in READY_MADE:
                yield part.lineno, full
            elif full.split(".")[0] in LIBRARIES:
                yield part.lineno, full
            elif isinstance(part, ast.Attribute) and not path and part.attr in TENSOR_METHODS:
                yield part.lineno, f"the tensor method {part.attr}"
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            owner = dotted(part.func.value).split(".")[0]
            method = part.func.attr in TENSOR_METHODS
            if method and owner and owner not in names and owner != "self":
                yield part.lineno, f"the tensor method {part.func.attr}"


def dotted(node: ast.AST) -> str:
    """The dotted name of an attribute access such as `torch.nn.functional`, or ""."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def _mentions(node: ast.AST) -> list[str]:
    names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return names + [part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)]


# --------------------------------------------------------------------------------------------------


def write(
    path: Path,
    implementation: str,
    verdicts: dict[str, Any],
    outcomes: dict[str, dict[str, int]],
    ratios: dict[str, float],
    notes: dict[str, list[str]],
) -> None:
    """Write `path` (JSON), and the same as a Markdown page beside it."""
    steps = {}
    for name, verdict in verdicts.items():
        steps[name] = {
            "status": verdict.status,
            "checked": verdict.probe,
            "difference": list(verdict.difference),
            "mistake": verdict.mistake and verdict.mistake.name,
            "says": verdict.mistake and verdict.mistake.explanation,
            "sure": verdict.sure,
            "advice": list(verdict.advice),
            "missing": list(verdict.missing),
            "tests": outcomes.get(name, {}),
            "time_relative_to_ours": ratios.get(name),
            "notes": notes.get(name, []),
        }
    report = {"implementation": implementation, "steps": steps}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_page(implementation, steps), encoding="utf-8")


def _page(implementation: str, steps: dict[str, dict[str, Any]]) -> str:
    checked = [step for step in steps.values() if step["status"] != "missing"]
    n_passed = sum(step["status"] == "passed" for step in checked)
    lines = [f"# {Path(implementation).name}: {n_passed} of {len(checked)} steps passed", ""]
    lines += ["| step | result | mistake | other tests passed | time / reference | ready-made parts |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, step in steps.items():
        tests, ratio = step["tests"], step["time_relative_to_ours"]
        n_run = sum(tests.values()) - tests.get("skipped", 0)
        counted = f"{tests.get('passed', 0)} of {n_run}" if n_run else ""
        time = f"{ratio:.1f}" if ratio is not None else ""
        mistake = step["mistake"] or ""
        if mistake and not step["sure"]:
            mistake += " (uncertain)"
        cells = [name, step["status"], mistake, counted, time, str(len(step["notes"]) or "")]
        lines.append(f"| {' | '.join(cells)} |")
    for name, step in steps.items():
        details = [f"- {step['checked']}: {line}" for line in step["difference"]]
        details += [f"- {step['says']}"] if step["says"] else []
        details += [f"- optional, beyond the assignment: {about}" for about in step["advice"]]
        details += [f"- not checked, missing: {', '.join(step['missing'])}"] if step["missing"] else []
        details += [f"- note: {note}" for note in step["notes"]]
        if details:
            lines += ["", f"## {name}", "", *details]
    return "\n".join(lines) + "\n"
