"""The report on an implementation: JSON for programs, a Markdown page for people."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mistakes

# what is to be written by hand; torch and the tokenizer libraries have it ready
READY_MADE = set(
    "linear embedding softmax log_softmax logsumexp silu gelu glu layer_norm rms_norm dropout cross_entropy "
    "nll_loss scaled_dot_product_attention clip_grad_norm_ clip_grad_value_ "
    "Linear Embedding LayerNorm RMSNorm Softmax LogSoftmax SiLU GELU CrossEntropyLoss MultiheadAttention "
    "Transformer TransformerEncoderLayer AdamW Adam CosineAnnealingLR".split()
)
LIBRARIES = {"tiktoken", "tokenizers", "transformers", "sentencepiece"}


def ready_made_uses(path: Path, sockets: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """For each step, where the code behind its adapters uses a ready-made version of what it should write.

    Read from the sources, not run: from an adapter on, through every function and class of the adapters
    file and of the packages beside it whose name is mentioned.
    """
    root = path.parent.parent
    sources = {path, *(p for p in root.rglob("*.py") if "test" not in str(p.relative_to(root)))}
    sources = {p for p in sources if not any(part.startswith(".") for part in p.relative_to(root).parts)}
    defined: dict[str, list[tuple[Path, ast.AST]]] = {}
    names_of: dict[Path, dict[str, str]] = {}
    for source in sources:
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        names_of[source] = _imported(tree)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.setdefault(node.name, []).append((source, node))
    found = {}
    for step in mistakes.STEPS:
        uses: set[str] = set()
        waiting, seen = sockets(step)[:1], set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            for source, node in defined.get(name, []):
                uses |= {
                    f"{source.relative_to(root)}:{line} uses {what}"
                    for line, what in _uses(node, names_of[source])
                }
                waiting += _mentions(node)
        if uses:
            found[step] = sorted(uses)
    return found


def _imported(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: `tF` -> `torch.nn.functional`."""
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
    """The line and the full name of each ready-made function that the code of `node` mentions."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute | ast.Name):
            path = dotted(part)
            first, _, rest = path.partition(".")
            full = f"{names[first]}{'.' + rest if rest else ''}" if first in names else path
            if re.match(r"torch(\.|$)", full) and full.split(".")[-1] in READY_MADE:
                yield part.lineno, full
            elif full.split(".")[0] in LIBRARIES:
                yield part.lineno, full
            elif isinstance(part, ast.Attribute) and not path and part.attr in READY_MADE:
                yield part.lineno, f"the tensor method {part.attr}"
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            owner = dotted(part.func.value).split(".")[0]
            method = part.func.attr in {"softmax", "log_softmax", "logsumexp"}
            if method and owner and owner not in names and owner != "self":
                yield part.lineno, f"the tensor method {part.func.attr}"


def dotted(node: ast.AST) -> str:
    """`torch.nn.functional` for the attribute access that is written so; "" for anything else."""
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
    what: str,
    verdicts: dict[str, Any],
    outcomes: dict[str, dict[str, int]],
    ratios: dict[str, float],
    notes: dict[str, list[str]],
) -> None:
    """Write `path`, and beside it the page that says the same."""
    steps = {}
    for name, verdict in verdicts.items():
        steps[name] = {
            "status": verdict.status,
            "checked": verdict.probe,
            "difference": list(verdict.difference),
            "mistake": verdict.mistake and verdict.mistake.name,
            "says": verdict.mistake and verdict.mistake.says,
            "sure": verdict.sure,
            "missing": list(verdict.missing),
            "tests": outcomes.get(name, {}),
            "time_relative_to_ours": ratios.get(name),
            "notes": notes.get(name, []),
        }
    path.write_text(json.dumps({"implementation": what, "steps": steps}, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_page(what, steps), encoding="utf-8")


def _page(what: str, steps: dict[str, dict[str, Any]]) -> str:
    n_passed = sum(step["status"] == "passed" for step in steps.values())
    lines = [f"# {Path(what).name}: {n_passed} of {len(steps)} steps passed", ""]
    lines += ["| step | result | mistake | other tests passed | time, ours = 1 |", "|---|---|---|---|---|"]
    for name, step in steps.items():
        tests, ratio = step["tests"], step["time_relative_to_ours"]
        counted = (
            f"{tests.get('passed', 0)} of {sum(tests.values()) - tests.get('skipped', 0)}" if tests else ""
        )
        time = f"{ratio:.1f}" if ratio is not None else ""
        mistake = step["mistake"] or ""
        if mistake and not step["sure"]:
            mistake += " (perhaps)"
        lines.append(f"| {name} | {step['status']} | {mistake} | {counted} | {time} |")
    for name, step in steps.items():
        told = [f"- {step['checked']}: {line}" for line in step["difference"]]
        told += [f"- {step['says']}"] if step["says"] else []
        told += [f"- not there, so not checked: {', '.join(step['missing'])}"] if step["missing"] else []
        told += [f"- note: {note}" for note in step["notes"]]
        if told:
            lines += ["", f"## {name}", "", *told]
    return "\n".join(lines) + "\n"
