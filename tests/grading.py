"""Grading of foreign adapters: verdicts on the contract alone, and the report on them.

Only a probe that stands on a sentence of the public assignment (`learn/contract.yaml`) can fail a foreign
file. The others are judged too, and are advice, with the reason why they are asked.
"""

import ast
import atexit
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_basics.learn import judge, mistakes, probes, sockets

# what the public assignment promises, and its adapters
CONTRACT: dict[str, str] = yaml.safe_load(
    (Path(judge.__file__).parent / "contract.yaml").read_text(encoding="utf-8")
)
NAME = rf"(?:{'|'.join(sockets.PREFIXES)})\w+"
PUBLIC = set(re.findall(rf"\b{NAME}", " ".join(CONTRACT.values())))
NOT_PUBLIC = "the public assignment does not have this function"

# of the probes after one that timed out
LATER_SECONDS = 2.0

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
    return list(dict.fromkeys(re.findall(rf"\b(?:a|adapters)\.({NAME})", source)))


@functools.cache
def step_of(adapter: str) -> str | None:
    """The first step in learning order that uses an adapter."""
    return next((step for step in judge.STEPS if adapter in adapters_of(step)), None)


# --------------------------------------------------------------------------------------------------
# Loading


class Adapters(sockets.Adapters):
    """A foreign adapters file."""

    is_foreign = True

    @functools.cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        """The functions of the file."""
        tree = ast.parse(Path(self._module.__file__ or "").read_text(encoding="utf-8"))
        return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def drops_gradients(self, name: str) -> bool:
        """Whether a function, or one of the file that it calls, computes without gradients."""
        if name not in self.functions:
            return False
        parts = list(ast.walk(self.functions[name]))
        called = {part.id for part in parts if isinstance(part, ast.Name)} & self.functions.keys()
        returned = [ast.unparse(part) for part in parts if isinstance(part, ast.Return)]
        is_detached = any(re.search(r"\.detach\(\)(\.\w+\(\))*$", each) for each in returned)
        return is_detached or any(_runs_under_no_grad(self.functions[each]) for each in {name, *called})


def _runs_under_no_grad(function: ast.FunctionDef) -> bool:
    """Whether a function returns what it computes under no_grad; it may copy weights there."""
    returned = [part for part in ast.walk(function) if isinstance(part, ast.Return)]
    names = {part.id for each in returned for part in ast.walk(each) if isinstance(part, ast.Name)}
    for block in ast.walk(function):
        if isinstance(block, ast.With) and any(map(_disables_gradients, block.items)):
            inside = [part for statement in block.body for part in ast.walk(statement)]
            stored = {p.id for p in inside if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}
            if stored & names or any(isinstance(part, ast.Return) for part in inside):
                return True
    return any(map(_disables_gradients, function.decorator_list))


def _disables_gradients(node: ast.AST) -> bool:
    return any(word in ast.unparse(node) for word in ("no_grad", "inference_mode", "set_grad_enabled"))


def load_adapters(path: Path) -> Adapters:
    """Load an adapters file with its folder, and the package it tests, on the import path.

    The module is named as pytest names it in its project, so that worker processes find its functions.
    """
    project = path.parent.parent
    folders = [folder for folder in (path.parent, project, project / "src") if folder.is_dir()]
    folders = [*map(str, folders), *_installed(project)]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    # for processes that the package starts
    inherited = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [inherited])])
    return Adapters(sockets.run_file(path, f"{path.parent.name}.{path.stem}"))


def _installed(project: Path) -> list[str]:
    """A folder with metadata for packages of a project that is not installed; they may read their version."""
    try:
        about = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        about = {}
    parents = [folder for folder in (project, project / "src") if folder.is_dir()]
    names = {each.parent.name for folder in parents for each in folder.glob("*/*.py")} - {"tests"}
    found = []
    for name in {*names, about.get("name", "")} - {""}:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
    if not found:
        return []
    folder = tempfile.mkdtemp(prefix="versions-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in found:
        version = about.get("version", "0")
        info = Path(folder) / f"{re.sub(r'[-.]', '_', name)}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return [folder]


# --------------------------------------------------------------------------------------------------
# Verdicts


@dataclass(frozen=True)
class Finding(judge.Finding):
    """A probe that a foreign file does not pass."""

    ground: str = ""
    """The sentence of the contract that it stands on; of advice, the reason why it is asked."""


@dataclass(frozen=True)
class Grade(judge.Verdict):
    """Result of a foreign file for a step; the status may also be missing, or advice: nothing is promised."""

    advice: tuple[Finding, ...] = ()
    missing: tuple[str, ...] = ()
    """Functions of the public assignment that the file lacks."""
    notes: tuple[str, ...] = ()


def grade(step: probes.Step, adapters: Adapters) -> Grade:
    """Run all probes of a step on a foreign file."""
    started, seconds = time.perf_counter(), probes.LIMIT_SECONDS
    seen: dict[int, probes.Observation] = {}
    lacking, stubs, notes = set(), set(), set()
    for i, probe in enumerate(step.probes):
        adapters.used.clear()
        try:
            observed = probes.observe(probe, adapters, seconds)
        except NotImplementedError:
            stubs |= adapters.used
            continue
        except sockets.MissingAdapter as name:
            lacking.add(str(name))
            continue
        lost = {facet for facet, value in observed.items() if value is None and facet.startswith("gradient")}
        blamed = [name for name in adapters.used if adapters.drops_gradients(name)] if lost else []
        notes |= {f"{name} computes without gradients, so they are not checked" for name in blamed}
        seen[i] = {k: v for k, v in observed.items() if k not in lost or not blamed}
        if probes.timed_out(observed):
            seconds = min(seconds, LATER_SECONDS)
    missing = tuple(sorted((lacking | stubs) & PUBLIC))
    if not seen:
        return Grade(step.name, "not started" if stubs else "missing", missing=missing)
    return dataclasses.replace(
        conclude(step, seen),
        missing=missing,
        notes=tuple(sorted(notes)),
        seconds=time.perf_counter() - started,
    )


def conclude(step: probes.Step, seen: dict[int, probes.Observation]) -> Grade:
    """The verdict on observations of a foreign file."""
    # of a result, the dtype is not promised
    promised = {
        i: {facet: value for facet, value in seen[i].items() if facet != "dtype"}
        for i in seen
        if step.probes[i].contract
    }
    wrong, advised = (
        [i for i in each if probes.differing(step.probes[i], each[i], judge.expected(step.name, i))]
        for each in (promised, seen)
    )
    mistake, also, left = judge.find_mistake(step, seen, advised, bool(wrong)) if advised else judge.NOTHING
    if wrong and (mistake is None or left):
        mistake, also, left = judge.find_mistake(step, promised, wrong)
    sure = mistake is not None and not left
    failures = tuple(_finding(step, i, promised[i]) for i in wrong)
    return Grade(
        step.name,
        judge.status_of(failures) if promised else "advice",
        failures,
        len(promised) - len(wrong),
        len(promised),
        mistake if wrong or sure else None,
        also,
        sure,
        tuple(_finding(step, i, seen[i]) for i in left),
        advice=tuple(_finding(step, i, seen[i], is_advice=True) for i in advised if i not in wrong),
    )


def _finding(step: probes.Step, i: int, seen: probes.Observation, is_advice: bool = False) -> Finding:
    probe = step.probes[i]
    facets = probes.differing(probe, judge.expected(step.name, i), seen)
    key = probe.contract
    if all(facet.startswith("gradient") for facet in facets):
        key = key and "gradients"
    elif facets in (["changed"], ["dtype"]):
        key = key and {"changed": "in place", "dtype": "dtype"}[facets[0]]
    ground = CONTRACT[key] if key else probe.beyond or NOT_PUBLIC
    return Finding(**vars(judge.finding(step, i, seen)), ground=ground)


# --------------------------------------------------------------------------------------------------
# Ready-made parts


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
# The report


def write(
    path: Path,
    implementation: str,
    verdicts: dict[str, judge.Verdict],
    ratios: dict[str, float],
    ready_made: dict[str, list[str]],
) -> None:
    """Write `path` (JSON, fields as in docs/grading.md), and the same as a Markdown page beside it."""
    steps = {}
    for name, verdict in verdicts.items():
        found = {"failures": verdict.failures, "advice": getattr(verdict, "advice", ())}
        steps[name] = {
            "status": verdict.status,
            "passed": verdict.n_passed,
            "probes": verdict.n_probes,
            **{
                key: [
                    {
                        "probe": finding.probe,
                        "difference": list(finding.difference),
                        "timed_out": finding.timed_out,
                        "ground": getattr(finding, "ground", ""),
                    }
                    for finding in findings
                ]
                for key, findings in found.items()
            },
            "mistake": verdict.mistake and verdict.mistake.name,
            "explanation": verdict.mistake and verdict.mistake.explanation,
            "also": verdict.also and verdict.also.name,
            "also_explanation": verdict.also and verdict.also.explanation,
            "sure": verdict.sure,
            "left": [finding.probe for finding in verdict.left],
            "missing": list(getattr(verdict, "missing", ())),
            "notes": list(getattr(verdict, "notes", ())),
            "ready_made": ready_made.get(name, []),
            "time_relative_to_reference": ratios.get(name),
        }
    report = {"implementation": implementation, "steps": steps}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_page(implementation, steps), encoding="utf-8")


def _page(implementation: str, steps: dict[str, dict[str, Any]]) -> str:
    graded = [step for step in steps.values() if step["status"] not in ("missing", "advice")]
    n_passed = sum(step["status"] == "passed" for step in graded)
    lines = [f"# {Path(implementation).name}: {n_passed} of {len(graded)} steps passed", ""]
    lines += ["| step | result | probes passed | mistake | advice | time / reference | ready-made parts |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, step in steps.items():
        ratio = step["time_relative_to_reference"]
        mistake = step["mistake"] if step["mistake"] and step["failures"] else ""
        mistake += f" and {step['also']}" if mistake and step["also"] else ""
        mistake += " (uncertain)" if mistake and not step["sure"] else ""
        cells = [name, step["status"], f"{step['passed']} of {step['probes']}", mistake]
        cells += [str(len(step["advice"]) or ""), f"{ratio:.1f}" if ratio is not None else ""]
        lines.append(f"| {' | '.join([*cells, str(len(step['ready_made']) or '')])} |")
    for name, step in steps.items():
        details: list[str] = []
        for key, title in (("failures", "contract"), ("advice", "advice, beyond the contract")):
            for finding in step[key]:
                details += [f"- **{finding['probe']}**", "", "  ```text"]
                details += [f"  {line}" for line in finding["difference"]]
                details += ["  ```", "", f"  {title}: {finding['ground']}" if finding["ground"] else ""]
        if step["mistake"]:
            title = "mistake" if step["failures"] else "what explains the advice"
            details += [f"- {title}: **{step['mistake']}**. {step['explanation']}"]
            details += [f"- and also: {probe}" for probe in step["left"]]
        if step["also"]:
            details += [f"- and also: **{step['also']}**. {step['also_explanation']}"]
        details += [f"- not checked, missing: {', '.join(step['missing'])}"] if step["missing"] else []
        details += [f"- {note}" for note in step["notes"]]
        details += [f"- ready-made: {use}" for use in step["ready_made"]]
        if details:
            lines += ["", f"## {name}", "", *details]
    return "\n".join(lines) + "\n"
