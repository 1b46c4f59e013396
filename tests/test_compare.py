"""Comparisons of runs, printed and as a page. Alone: uv run pytest tests/test_compare.py"""

import base64
import html.parser
import math
import os
import re

import pytest
import recorded

from llm_basics.analysis import compare, run_data
from llm_basics.cli import commands, parse
from llm_basics.runs import run_dir

HOSTILE = '<img src=x onerror="alert(1)"> [red]&amp; \u202e\x1b[31m'


class Page(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs; the second has the lowest loss, the third a loss that is not finite."""
    monkeypatch.chdir(tmp_path)
    recorded.record(run_dir.RUNS / "one", [4.0, 3.0], samples=[("old", ""), ("def ", "f(x):\n\treturn 1")])
    recorded.record(run_dir.RUNS / "two", [4.0, 2.0], samples=[("ROMEO:", HOSTILE)], train__lr=0.5)
    recorded.record(run_dir.RUNS / "lost", [4.0, math.nan], train__optimizer="muon")
    return ["one", "two", "lost"]


def options_of(*arguments):
    return parse.program_options(commands.CompareConfig(), arguments, prog="compare")


def test_prints_results_best_first_differing_options_and_samples(runs, capsys):
    assert compare.main(options_of(*runs)) == 0
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines() if line.strip().startswith(tuple(runs))][:6]
    assert [row[0] for row in rows] == ["two", "one", "lost", "one", "two", "lost"]
    assert rows[0][1:] == "2.5000 2.5000 20 9.000 2.500 25.0% 246,464 20 20,480 20.5 1,000".split()
    assert rows[2][1:3] == ["not", "finite"]
    assert rows[3:] == [["one", "adamw", "0.0003"], ["two", "adamw", "0.5"], ["lost", "muon", "0.0003"]]
    # the prompt is set apart from what was generated
    assert re.search(r"prompt 'def ': .*\n.* f\(x\): .*\n.*    return 1", output) and "old" not in output
    # literal text, without control characters
    assert (
        "<img src=x" in output and "[red]&amp;" in output and "\x1b" not in output and "\u202e" not in output
    )


def names(output):
    """The names of the runs in the tables of results, table by table."""
    tables = re.split(r"^ +run .*val loss.*$", output, flags=re.M)[1:]
    return [re.findall(r"^ +(\w+) +[\d.]+ +[\d.]+ ", table, flags=re.M) for table in tables]


def test_runs_on_other_held_out_text_are_not_ranked(tmp_path, monkeypatch, capsys):
    """Also if it was changed under the same name."""
    monkeypatch.chdir(tmp_path)
    for name, loss, text in (("a", 3.0, "old"), ("b", 1.0, "new"), ("c", 2.0, "old")):
        recorded.record(run_dir.RUNS / name, [loss], held_out=(text, "bpe"), data="book.txt")
    assert compare.main(options_of("a", "b", "c", "--out", "report.html")) == 0
    output = capsys.readouterr().out
    assert names(output) == [["c", "a"], ["b"]]
    assert "held-out text of book.txt: 2 runs\n" in output and "of book.txt: 1 run\n" in output
    assert "2 held-out texts: results of different tables are not comparable\n" in output
    assert output.endswith("report.html\nreport.png\nreport-2.png\n")
    assert "are not comparable" in (tmp_path / "report.html").read_text()


def test_runs_with_other_tokenizers_are_ranked_by_bits_per_byte(tmp_path, monkeypatch, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    for name, loss, bits, tokenizer in (("a", 3.0, 2.0, "x"), ("b", 1.0, 2.4, "y"), ("c", 2.0, 2.2, "y")):
        held_out = ("text", tokenizer)
        recorded.record(run_dir.RUNS / name, [loss], held_out=held_out, bits_per_byte=bits)
    assert compare.main(options_of("a", "b", "c", "--out", "report.html")) == 0
    output = capsys.readouterr().out
    assert names(output) == [["a", "c", "b"]]
    assert "3 runs, ranked by bits per byte: losses per token of different tokenizers are not" in output
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["bits per byte"]
    assert compare.main(options_of("b", "c")) == 0
    output = capsys.readouterr().out
    assert names(output) == [["b", "c"]] and "ranked" not in output


@pytest.mark.parametrize(
    ("options", "tables"),
    [
        ({}, [["new", "old"]]),
        ({"data": "other.txt"}, [["old"], ["new"]]),
        ({"max_tokens": 7}, [["old"], ["new"]]),
        # of equal bits per byte
        ({"tokenizer": "bytes"}, [["old", "new"]]),
        ({"model__vocab_size": 300}, [["old", "new"]]),
    ],
)
def test_runs_that_recorded_no_hashes_are_grouped_by_their_options(tmp_path, capsys, options, tables):
    old = recorded.record(tmp_path / "old", [3.0], held_out=None)
    new = recorded.record(tmp_path / "new", [1.0], held_out=("text", "bpe"), **options)
    assert compare.main(options_of(str(old), str(new))) == 0
    output = capsys.readouterr().out
    assert names(output) == tables
    assert ("by bits per byte" in output) == ({"tokenizer", "model__vocab_size"} >= options.keys() > set())


def test_a_single_run_is_reported(runs, capsys):
    assert compare.main(options_of("one")) == 0
    output = capsys.readouterr().out
    assert "3.5000" in output and "options that differ" not in output


def test_more_options_than_runs_are_rows(tmp_path):
    changed = {"train__lr": 0.5, "model__norm": "none", "train__steps": 7}
    paths = [recorded.record(tmp_path / "a", [3.0]), recorded.record(tmp_path / "b", [3.0], **changed)]
    titles, rows = compare.options_that_differ(run_data.read_all([str(path) for path in paths]))
    assert titles == ["option", "a", "b"]
    assert rows == [
        ["model.norm", "rms", "none"],
        ["train.steps", "1000", "7"],
        ["train.lr", "0.0003", "0.5"],
    ]


def test_the_page_is_self_contained_and_has_no_scripts(runs, tmp_path, capsys):
    """Also with hostile names and samples, which stay text."""
    (run_dir.RUNS / "two").rename(run_dir.RUNS / HOSTILE.replace("/", "").replace("\x1b", ""))
    names = ["one", "lost", HOSTILE.replace("/", "").replace("\x1b", "")]
    assert compare.main(options_of(*names, "--out", "report.html")) == 0
    assert capsys.readouterr().out.endswith("report.html\nreport.png\n")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert {"script", "link", "iframe", "object", "form", "a"}.isdisjoint(tag for tag, _ in page.tags)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "report.png").read_bytes()
    assert not re.search(r"https?:|url\(|@import", text.replace(data, ""))
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    shown = "".join(page.words)
    # in the heading, as the name of a run in three tables, and in a sample
    assert '<img src=x onerror="alert(1)"> [red]&amp; \ufffd' in shown and shown.count("<img src=x") == 6
    assert "\u202e" not in text and "\x1b" not in text
    assert "2.5000" in shown and "prompt 'def ':" in shown and "    return 1" in shown


def test_a_page_of_runs_without_curves_or_samples(tmp_path):
    record = run_data.read(str(recorded.record(tmp_path / "r", [])))
    assert compare.write_report([record], tmp_path / "a.html", "step") == [tmp_path / "a.html"]
    assert "<img" not in (tmp_path / "a.html").read_text()


def test_a_page_is_written_atomically(tmp_path, monkeypatch):
    compare.write_page(tmp_path / "a.html", "first", compare.recording_screen(), [])
    before = (tmp_path / "a.html").read_text()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        compare.write_page(tmp_path / "a.html", "second", compare.recording_screen(), [])
    assert (tmp_path / "a.html").read_text() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one", "tow"], "got tow; the closest is two"),
        (["one", "--out", "report.pdf"], "out must end in .html, got report.pdf"),
        (["one", "--out", "nowhere/report.html"], "No such file or directory"),
    ],
)
def test_errors_are_one_line(runs, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        compare.main(options_of(*arguments))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_numbers_are_formatted_by_column():
    numbers = {"val_loss": 1.23456, "perplexity": 12345.6, "seconds": 3.14159, "bits_per_byte": 123.456}
    assert [compare.format_number(*pair) for pair in numbers.items()] == ["1.2346", "12,346", "3.1", "123.5"]
    assert (
        compare.format_number("val_loss", None) == "-"
        and compare.format_number("val_loss", math.inf) == "not finite"
    )
