"""A page about training runs that needs no other file, and runs nothing.

Names and samples come from anywhere: every word is escaped here, and the page's policy forbids scripts and
whatever lies outside it.
"""

import base64
import html
import math
import os
from collections.abc import Sequence
from pathlib import Path

# what came out of a run, and what it is called
COLUMNS = {
    "val_loss": "val loss",
    "best_val_loss": "best",
    "best_step": "at step",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "parameters": "parameters",
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
}

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #6a6a6a; --line: #e3e3e0; --best: #e9f3fb; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 2rem 4rem; max-width: 80rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.4rem 0 .7rem; }
p { color: var(--soft); margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .42rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; overflow-wrap: anywhere; min-width: 11rem; }
tr.best td { background: var(--best); }
img { display: block; max-width: 100%; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
.samples section { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; min-width: 0; }
.samples h3 { font-size: .85rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto;
  font: .78rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
"""


def number(name: str, value: int | float | None) -> str:
    """A measured number as people read it; "-" where there is none.

    >>> number("val_loss", 1.83259), number("parameters", 246592), number("accuracy", 0.331)
    ('1.8326', '246,592', '33.1%')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    if name == "accuracy":
        return f"{value:.1%}"
    if name.endswith("loss"):
        return f"{value:.4f}"
    if value >= 1000 or name in ("parameters", "steps", "tokens", "best_step"):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 or name == "seconds" else f"{value:.3f}"


def visible(words: str) -> str:
    """Text without what moves a cursor or turns the direction of writing; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else "    " if c == "\t" else "\ufffd" for c in words)


# --------------------------------------------------------------------------------------------------
# Parts of a page; all words are escaped


def heading(words: str) -> str:
    """The title of a section."""
    return f"<h2>{_escaped(words)}</h2>"


def paragraph(words: str) -> str:
    """A line or two."""
    return f"<p>{_escaped(words)}</p>"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], best_first: bool = False) -> str:
    """A table; of results, the first row is marked."""
    head = "".join(f"<th>{_escaped(title)}</th>" for title in titles)
    body = "".join(
        f"<tr{' class=best' if best_first and i == 0 and len(rows) > 1 else ''}>"
        + "".join(f"<td>{_escaped(cell)}</td>" for cell in row)
        + "</tr>\n"
        for i, row in enumerate(rows)
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def picture(path: Path) -> str:
    """A PNG, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_escaped(path.stem)}" src="data:image/png;base64,{data}">'


def samples(texts: Sequence[tuple[str, str]]) -> str:
    """Texts beside each other, each under a name."""
    parts = (f"<section><h3>{_escaped(n)}</h3><pre>{_escaped(t)}</pre></section>" for n, t in texts if t)
    return f"<div class=samples>{''.join(parts)}</div>"


def write(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write a page, whole or not at all."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title><style>{STYLE}</style></head>\n<body><h1>{_escaped(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _escaped(words: str) -> str:
    return html.escape(visible(words), quote=True)
