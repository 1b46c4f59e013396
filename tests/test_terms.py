"""Terms in one line each. Alone: uv run pytest tests/test_terms.py"""

import re
from pathlib import Path

import llm_basics
from llm_basics.analysis import terms
from llm_basics.cli import overrides

STATIC = Path(llm_basics.__file__).parent / "lab" / "static"


def test_every_option_has_the_line_of_its_documentation():
    known = terms.known()
    for option in overrides.all_options():
        assert known[option.name] == option.help != ""
    assert "clip" in known["train.max_grad_norm"].lower() and "nats per token" in known["train_loss"]


def test_every_term_is_one_short_line():
    for term, line in terms.known().items():
        assert line and "\n" not in line and len(line) <= 250, term
        assert line[-1] in ".)`" or ": " in line, term


def test_every_term_of_the_page_is_known():
    """`term("word", "key")` in the page's files, by the names that dom.js gives some of them."""
    texts = {path.name: path.read_text("utf-8") for path in STATIC.glob("*.js")}
    block = texts["dom.js"].partition("const KEYS = {")[2].partition("};")[0]
    names = dict(re.findall(r"\"?([\w/-][\w/ -]*?)\"?: \"([\w.]+)\"", block))
    used = re.findall(r"\bterm\(\"([^\"]+)\"(?:, \"([^\"]+)\")?", "".join(texts.values()))
    assert len(used) > 10 and {"train_loss", "lr"} <= set(names.values())
    for word, key in used:
        assert names.get(key or word, key or word) in terms.known(), word
    assert set(names.values()) <= terms.known().keys()
