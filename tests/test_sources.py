"""Sources of documents. Alone: uv run pytest tests/test_sources.py"""

import gzip
import io
import json
import subprocess
import sys
import types

import pytest

from llm_basics.data import sources

TEXTS = ["one", "two\nlines \u00e9", 'quoted "three" \u2028', "four"]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(source):
    return [document.text for document in source.documents()]


def write_parquet(path, columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.fixture
def files(tmp_path):
    """The same documents in every format."""
    rows = lines([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "a.txt").write_bytes("<|endoftext|>".join(TEXTS).encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("<|endoftext|>".join(TEXTS).encode()))
    write_parquet(tmp_path / "a.parquet", {"text": TEXTS, "id": [1, 2, 3, 4]})
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "a.parquet"])
def test_every_format_gives_the_same_documents(files, name):
    source = sources.find(str(files / name))
    assert read(source) == TEXTS == read(source)
    assert source.fraction == 1
    fractions = [source.fraction for _ in source.documents()]
    assert fractions == sorted(fractions) and 0 < fractions[0] <= 1


def test_a_folder_and_a_glob_are_read_file_by_file(files):
    assert read(sources.find(str(files))) == TEXTS * 5
    assert read(sources.find(str(files / "*.jsonl*"))) == TEXTS * 2


def test_documents_are_read_one_by_one(files):
    (files / "b.jsonl").write_bytes(lines([{"text": "good"}]) * 100_000 + b"not JSON\n")
    documents = sources.find(str(files / "b.jsonl")).documents()
    assert [next(documents).text for _ in range(5)] == ["good"] * 5


def test_standard_input(monkeypatch):
    def pipe(content):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))

    pipe(b"one<|endoftext|>two")
    assert read(sources.find("-")) == ["one", "two"]
    pipe(lines([{"story": "one"}, {"story": ""}, {"story": "two"}]))
    assert read(sources.find("-", text_field="story", form="jsonl")) == ["one", "two"]


def test_the_field_can_have_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"story": "one", "text": "no"}]))
    assert read(sources.find(str(tmp_path / "a.jsonl"), text_field="story")) == ["one"]
    path = write_parquet(tmp_path / "a.parquet", {"story": ["one", " "], "text": ["no", "no"]})
    assert read(sources.find(str(path), text_field="story")) == ["one"]


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_data_sets_are_streamed(files, form):
    path = files / ("a.jsonl" if form == "json" else "a.parquet")
    source = sources.Hub(form, "text", data_files=str(path))
    assert read(source) == TEXTS
    assert [d.name for d in source.documents()][:2] == [f"row 1 of hub:{form}", f"row 2 of hub:{form}"]
    with pytest.raises(ValueError, match=f"row 1 of hub:{form} must have the field story, got .*text"):
        read(sources.Hub(form, "story", data_files=str(path)))


def test_names_of_data_sets(monkeypatch):
    calls = []
    fetched = types.SimpleNamespace(
        disable_progress_bars=lambda: None,
        load_dataset=lambda *args, **kw: calls.append((args, kw)) or [{"text": "one"}],
    )
    monkeypatch.setitem(sys.modules, "datasets", fetched)
    for name in ("tinystories", "fineweb-edu", "hub:a/b", "hub:a/b:c"):
        assert read(sources.find(name)) == ["one"]
    assert [(args[0], kw.pop("name")) for args, kw in calls] == [
        ("roneneldan/TinyStories", None),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("a/b", None),
        ("a/b", "c"),
    ]
    assert all(kw == {"split": "train", "streaming": True} for _, kw in calls)


def test_without_network_the_error_names_the_data_set(monkeypatch):
    def load_dataset(*args, **kw):
        raise ConnectionError("no\nroute")

    fetched = types.SimpleNamespace(disable_progress_bars=lambda: None, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fetched)
    with pytest.raises(ValueError) as error:
        read(sources.find("tinystories"))
    assert str(error.value) == (
        "hub:roneneldan/TinyStories (2.1 million short stories, 1 GB) must be fetched from huggingface.co, "
        "which failed (ConnectionError: no route); connect to the internet, or use a local file"
    )


@pytest.mark.parametrize("module", ["datasets", "pyarrow"])
def test_a_missing_package_is_named_with_its_install_command(files, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    name = "tinystories" if module == "datasets" else str(files / "a.parquet")
    with pytest.raises(ValueError, match=f"{module} is needed .*: uv sync --extra data"):
        read(sources.find(name))


def test_text_files_need_no_optional_import():
    code = (
        "import sys; from llm_basics.data import prepare, sources; "
        "print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


DEEP = b'{"text": ' + b"[" * 100_000 + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "one"}\n\n{"txt": "two"}\n',
            "{}:3 must have the field text, got txt;",
        ),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "{}:2 must be JSON; Expecting value in column 9"),
        ("a.jsonl", b'{"text": "one"}\n["text"]\n', "{}:2 must be a JSON object, got list"),
        ("a.jsonl", b'{"text": 3}\n', "text in {}:1 must be text, got 3"),
        ("a.jsonl", b'{"text": null}\n', "text in {}:1 must be text, got None"),
        (
            "a.jsonl",
            b'{"text": ""}\n{"text": "a\xff"}\n',
            "{}:2 must be UTF-8, got byte 0xff at offset 24; fix the file, or",
        ),
        ("a.jsonl", DEEP, "{}:1 must be JSON"),
        (
            "a.txt",
            b"one\ntwo\n<|endoftext|>\n3\xff",
            "{}:4 must be UTF-8, got byte 0xff at offset 23; fix the file, or",
        ),
        ("a.parquet", b"PAR1 not really", "{} must be Parquet; "),
        ("a.jsonl.gz", b"not packed", "{} must be a complete gzip file; Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "one"}\n' * 99, mtime=0)[:-9],
            "{} must be a complete gzip file",
        ),
    ],
)
def test_errors_in_files_have_a_position(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(sources.find(str(path)))
    assert message.format(path) in str(error.value) and "\n" not in str(error.value)


def test_errors_in_parquet_name_the_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two", None]})
    with pytest.raises(ValueError, match="text in row 3 of .*a.parquet must be text, got None"):
        read(sources.find(str(path)))
    path = write_parquet(tmp_path / "b.parquet", {"words": ["one"], "id": [1]})
    with pytest.raises(ValueError, match="row 1 of .*b.parquet must have the field text, got words, id"):
        read(sources.find(str(path)))


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xff"}\n')
    assert read(sources.find(str(tmp_path / "a.jsonl"), on_bad_utf8="replace")) == ["a\ufffd"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tinystoris",
            "the text must be a file, .* got tinystoris; .* tinystories, openwebtext, fineweb-edu",
        ),
        ("hub:", "a data set must be hub:NAME or hub:NAME:CONFIG, got hub:"),
        ("hub:../x", "a data set must be hub:NAME"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        sources.find(name)
