"""What Markdown pages name: links, files, names of modules, options, commands."""

import ast
import functools
import re
import shlex
import subprocess
import typing
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llm_basics"
README, WORKLOG = ROOT / "README.md", ROOT / "WORKLOG.md"

# files that programs write, or that belong to the reader
MADE = {
    *(
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "events.jsonl",
        "commands.jsonl",
        "rollouts.jsonl",
        "log.txt",
        "loss.png",
        "runs.png",
    ),
    *(
        "vocab.json",
        "merges.txt",
        "special_tokens.json",
        "tokenizer.json",
        "model.safetensors",
        "report.json",
    ),
    *("report.md", "report.html", "results.csv", "results.json", "book.txt"),
    *("mine.py", "mine.yaml", "mine.progress.json"),
    *(
        "questions.jsonl",
        "answers.jsonl",
        "my_reward.py",
        "pairs.jsonl",
        "prompts.txt",
        "texts.jsonl",
        "adapters.py",
        "/openapi.json",
    ),
}
FOLDERS_MADE = ("runs/", "data/", "path/", "checkpoints/", "llama.cpp/", "submissions/", "reports/")
FILE = re.compile(r"(?:[\w.{}*-]+/)*[\w.*-]+\.(?:py|md|yaml|yml|json|jsonl|toml|txt|png|cff|html|csv|ipynb)")
FOLDER = re.compile(r"(?:[\w.-]+/)+")


def pages() -> list[Path]:
    """All pages of the documentation but WORKLOG."""
    top = [path for path in sorted(ROOT.glob("*.md")) if path.name != "WORKLOG.md"]
    return [*top, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]


def split_code(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text without its fenced code, and the language and content of each fence.

    >>> split_code("a\\n```sh\\nls\\n```\\nb")
    ('a\\n\\nb', [('sh', 'ls\\n')])
    """
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    return fence.sub("", text), [(found[2], found[3]) for found in fence.finditer(text)]


def inline_code(text: str) -> list[str]:
    """The contents of single backticks outside of fences."""
    return re.findall(r"`([^`\n]+)`", split_code(text)[0])


# --------------------------------------------------------------------------------------------------
# Links


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are no addresses of other hosts."""
    text = split_code(page.read_text(encoding="utf-8"))[0]
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"\b(?:src|srcset|href)=\"([^\"]+)\"", text)
    return [link for link in found if not re.match(r"https?:|mailto:", link)]


def target(page: Path, link: str) -> Path:
    """The file that a link of a page leads to."""
    name = link.partition("#")[0]
    return (page.parent / name).resolve() if name else page


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether the file of a link is in the repository and has the heading of its anchor."""
    path, anchor = target(page, link), link.partition("#")[2]
    if not path.exists() or ROOT not in path.parents:
        return False
    return not anchor or anchor in anchors(path)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = split_code(page.read_text(encoding="utf-8"))[0]
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def slug(heading: str) -> str:
    """The anchor of a heading.

    >>> slug("When a process fails: `kill -9`")
    'when-a-process-fails-kill--9'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


# --------------------------------------------------------------------------------------------------
# Files


def file_names(page: Path) -> list[str]:
    """Inline code that is the name of a file or of a folder in the repository."""
    names = inline_code(page.read_text(encoding="utf-8"))
    return [name for name in names if FILE.fullmatch(name) or FOLDER.fullmatch(name)]


def is_file_here(name: str) -> bool:
    """Whether a file or folder is in the repository, or is one that programs write."""
    if name in MADE or name.startswith(FOLDERS_MADE) or name.startswith("step_"):
        return True
    pattern = name.strip("/").replace("NAME", "*")
    bases = (ROOT, PACKAGE, ROOT / "tests", ROOT / "docs" / "lab")
    return any(list(base.glob(pattern)) for base in bases)


# --------------------------------------------------------------------------------------------------
# Names of modules


def dotted_names(page: Path) -> list[str]:
    """Inline code such as `trainer.train_step` or `core.functional.silu`."""
    names = [name.removesuffix("()") for name in inline_code(page.read_text(encoding="utf-8"))]
    return [name for name in names if re.fullmatch(r"(?:[a-z_]\w*\.)+[A-Za-z_]\w*", name)]


@functools.cache
def modules() -> dict[str, Path]:
    """All modules of the package by the ends of their dotted names: `functional`, `core.functional`, ..."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: -len(path.parts)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found |= {".".join(parts[start:]): path for start in range(len(parts))}
    return found


@functools.cache
def members(path: Path) -> dict[str, set[str]]:
    """The names at the top of a module, and for each class those of its members."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {name for each in node.body for name in _bound(each)}
            found[node.name] |= {each.attr for each in ast.walk(node) if _is_of_self(each)}
        found |= {name: set() for name in _bound(node) if name not in found}
    return found


def _is_of_self(node: ast.AST) -> typing.TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [each.id for each in targets if isinstance(each, ast.Name)]


# libraries and hosts whose names the pages mention
OTHERS = {"str", "sys", "time", "torch", "numpy", "triton", "pytest", "semver", "ci", "e"}


def is_known_name(name: str) -> bool:
    """Whether a dotted name is a module, a name in a module, an option, or another library's."""
    from documents_commands import options

    if name.split(".")[0] in OTHERS or name in modules() or f"--{name}" in options():
        return True
    if FILE.fullmatch(name) or name.startswith("step_"):
        return is_file_here(name)
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = modules().get(".".join(parts[:end]))
        if path is not None:
            known, rest = members(path), parts[end:]
            if rest[0] in known and (len(rest) == 1 or rest[1] in known[rest[0]]):
                return True
    return False


# --------------------------------------------------------------------------------------------------
# Options


def option_names(page: Path) -> list[str]:
    """The options of our programs in inline code: `--train.lr`, `--fast off`, `train --data x`."""
    found = []
    for code in inline_code(page.read_text(encoding="utf-8")):
        if not code.startswith(("uvx ", "uv venv", "uv pip")):
            found += re.findall(r"(?<![\w-])(--[a-z][\w.-]*)", code)
    return found


def plain_option(name: str) -> str:
    """An option as its field is written: with underscores, and without the "no" of a switch turned off.

    >>> plain_option("--model.no-qk_norm")
    '--model.qk_norm'
    """
    return "--" + re.sub(r"(^|\.)no_", r"\1", name[2:].replace("-", "_"))


# --------------------------------------------------------------------------------------------------
# Commands

STARTERS = ("uv", "uvx", "llm-basics")


def commands(text: str) -> list[list[str]]:
    """The words of each command by uv, in fences of shell code and in inline code.

    >>> commands("```sh\\nA=1 uv run x --y z  # why\\nprintf q | uv run v\\n```")
    [['uv', 'run', 'x', '--y', 'z'], ['uv', 'run', 'v']]
    """
    prose, fences = split_code(text)
    lines = [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith(STARTERS)]
    for language, code in fences:
        lines += code.replace("\\\n", " ").splitlines() if language == "sh" else []
    found = []
    for line in lines:
        words = shlex.split(line.replace("$'\\n'", "x"), comments=True)
        words = [inner for word in words for inner in (shlex.split(word) if "uv run " in word else [word])]
        for part in _split(words, {"|", "&&", "||", ";"}):
            start = next((i for i, word in enumerate(part) if word in STARTERS), None)
            if start is not None:
                found.append(part[start:])
    return found


def _split(words: list[str], at: set[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in at:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


# --------------------------------------------------------------------------------------------------
# The worklog


def worklog_entries(text: str) -> list[tuple[str, str]]:
    """Time and text of each entry.

    >>> worklog_entries("index\\n\\n---\\n\\n### **2026-11-20 18:18**\\n\\ntext\\n")
    [('2026-11-20 18:18', 'text')]
    """
    parts = re.split(
        r"^### \*\*(\d{4}-\d\d-\d\d \d\d:\d\d)\*\*$", text.partition("## How this file")[0], flags=re.M
    )
    return [(time, entry.strip()) for time, entry in zip(parts[1::2], parts[2::2], strict=True)]


def commits() -> list[str] | None:
    """The hashes of all commits; None where the history is not there, or not whole."""
    ask = ["git", "-C", str(ROOT)]
    shallow = subprocess.run([*ask, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
    if shallow.returncode or shallow.stdout.strip() != "false":
        return None
    return subprocess.run([*ask, "rev-list", "HEAD"], capture_output=True, text=True).stdout.split()
