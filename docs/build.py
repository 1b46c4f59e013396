"""Builds the documentation site: pages from Markdown, the library's reference from docstrings, then Zensical.

uv run python docs/build.py              to build/site; docs/*.md are readable without it
uv run python docs/build.py --strict     warnings are errors
uv run python docs/build.py --pages      the Markdown pages alone, to build/docs
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llm_basics"
PAGES = ROOT / "build" / "docs"

# pages outside of docs/, and their names on the site
OTHERS = {
    "README.md": "overview.md",
    "WORKLOG.md": "worklog.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
}
LINK = re.compile(r"(?:\[([^\]\[]*)(\]\()|(\b(?:src|srcset)=\"))([^)\s\"]+)([)\"])")

# a picture in two versions, which GitHub chooses from by the reader's system
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img alt="([^"]*)" src="([^"]+)">\s*</picture>'
)

# the site's generator, which mkdocs.yml is for
GENERATOR = "zensical==0.0.73"


def sources() -> dict[Path, Path]:
    """The pages and pictures of the site by their files in the repository."""
    found = {ROOT / name: PAGES / page for name, page in OTHERS.items()}
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in (".md", ".png", ".svg"):
            found[path] = PAGES / path.relative_to(ROOT / "docs")
    return found


def with_links_of_the_site(text: str, source: Path, placed: dict[Path, Path]) -> str:
    """The text of a page with links to pages of the site; those to other files become text."""

    def replaced(found: re.Match[str]) -> str:
        text, _, _, link, _ = found.groups()
        name, mark, anchor = link.partition("#")
        if not name or re.match(r"[a-z]+:", link):
            return found[0]
        target = (source.parent / name).resolve()
        if target not in placed:
            return text or found[0]
        relative = os.path.relpath(placed[target], placed[source].parent).replace(os.sep, "/")
        return found[0].replace(link, f"{relative}{mark}{anchor}")

    # code stays as it is
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.lstrip().startswith("```") else LINK.sub(replaced, part) for part in parts)


def with_lists_apart(text: str) -> str:
    """Text with an empty line before each list, which the site's Markdown needs, and GitHub's does not.

    >>> with_lists_apart("**Objective:**\\n*   one\\n*   two")
    '**Objective:**\\n\\n*   one\\n*   two'
    """
    return re.sub(r"^(\*\*[^*\n]+:\*\*)\n(?=\*   |1\.  )", r"\1\n\n", text, flags=re.MULTILINE)


def with_pictures_of_the_scheme(text: str) -> str:
    """Text with pictures in two versions as two images, of which the site shows that of its color scheme.

    >>> source = '<source media="(prefers-color-scheme: dark)" srcset="b.png">'
    >>> with_pictures_of_the_scheme(f'<picture>{source}<img alt="a line" src="a.png"></picture>')
    '![a line](a.png#only-light)\\n![a line](b.png#only-dark)'
    """
    return PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", text)


# --------------------------------------------------------------------------------------------------
# The reference


def signature(node: ast.FunctionDef) -> str:
    """A function's first line, as it is written."""
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){result}"


def described(node: ast.FunctionDef | ast.ClassDef, level: int) -> list[str]:
    """Heading, signature and docstring of a function or of a class with its public methods."""
    doc = ast.get_docstring(node)
    if node.name.startswith("_") or doc is None:
        return []
    head = signature(node) if isinstance(node, ast.FunctionDef) else f"class {node.name}"
    prose, examples = split_examples(doc)
    lines = [f"{'#' * level} {node.name}", f"```python\n{head}\n```", prose]
    lines += [f"```pycon\n{examples}\n```"] if examples else []
    if isinstance(node, ast.ClassDef):
        for each in node.body:
            lines += described(each, level + 1) if isinstance(each, ast.FunctionDef) else []
    return lines


def split_examples(doc: str) -> tuple[str, str]:
    """The prose of a docstring, and its worked example.

    >>> split_examples("Adds.\\n\\n>>> add(1, 2)\\n3")
    ('Adds.', '>>> add(1, 2)\\n3')
    """
    prose, mark, examples = doc.partition(">>> ")
    paragraphs = [as_written(each) for each in re.split(r"\n\s*\n", prose.strip())]
    return "\n\n".join(paragraphs), (mark + examples).strip()


def as_written(paragraph: str) -> str:
    """A paragraph in Markdown: commands and columns as code, else text.

    >>> as_written("one of {a, b}"), as_written("uv run pytest")
    ('one of \\\\{a, b}', '```text\\nuv run pytest\\n```')
    """
    if paragraph.startswith("uv run") or re.search(r"^\S.*\S {3,}\S", paragraph, re.M):
        return f"```text\n{paragraph}\n```"
    return re.sub(r"([<{*])", r"\\\1", paragraph)


def reference(wing: Path) -> str:
    """The page of a wing: its modules with their public functions and classes."""
    files = [wing] if wing.is_file() else sorted(wing.glob("*.py"))
    lines = [f"# {wing.stem}"]
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        doc = ast.get_docstring(tree) or ""
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        lines += [f"## {name}", split_examples(doc)[0]]
        for node in tree.body:
            lines += described(node, 3) if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    return "\n\n".join(lines) + "\n"


def wings() -> list[Path]:
    """The wings that have a page of reference, in the order of the package's docstring."""
    listed = re.findall(
        r"^    (\w+) ", ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or "", re.M
    )
    paths = [PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py" for name in listed]
    assert all(path.exists() for path in paths), listed
    return paths


def write_pages() -> list[Path]:
    """Write all Markdown pages and pictures to PAGES, from nothing."""
    shutil.rmtree(PAGES, ignore_errors=True)
    placed = sources()
    for source, page in placed.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = with_pictures_of_the_scheme(source.read_text("utf-8"))
            text = with_links_of_the_site(text, source, placed)
            page.write_text(with_lists_apart(text), "utf-8")
        else:
            shutil.copyfile(source, page)
    for wing in wings():
        page = PAGES / "reference" / f"{wing.stem}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(reference(wing), "utf-8")
    return sorted(PAGES.rglob("*.md"))


def main() -> int:
    """Build the site. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    parser.add_argument("--pages", action="store_true", help="write the Markdown pages alone")
    options = parser.parse_args()
    print(f"{len(write_pages())} pages in {PAGES.relative_to(ROOT)}")
    if options.pages:
        return 0
    command = ["uvx", GENERATOR, "build", "--clean", *(["--strict"] if options.strict else [])]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
