"""Finding, reading and splitting documents. Alone: uv run pytest tests/test_documents.py"""

import io

import pytest

from llm_basics.data import documents


def test_file_folder_and_glob(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden/d.txt", "__pycache__/f.pyc", "deep/e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(source):
        return [path.relative_to(tmp_path).as_posix() for path in documents.find_files(str(source))]

    assert names(tmp_path / "b.txt") == ["b.txt"]
    assert names(tmp_path) == ["a.txt", "b.txt", "deep/c.txt", "deep/e.md"]
    assert names(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "deep/c.txt"]
    with pytest.raises(ValueError, match="the text must be a file"):
        documents.find_files(str(tmp_path / "none*"))


def test_standard_library_is_python_source_without_tests():
    files = documents.stdlib_files()
    names = {file.name for file in files}
    assert {"argparse.py", "json", "dataclasses.py"} & names >= {"argparse.py", "dataclasses.py"}
    assert not any({"test", "tests", "site-packages"} & set(file.parts[-3:]) for file in files)
    assert len(files) > 300
    assert sum(len(document.text) for document in documents.read_documents(files)) > 5_000_000


def test_text_is_kept_to_the_byte(tmp_path):
    text = "a\r\n\r\nb_c\t\u00e9\u2028\n"
    (tmp_path / "text").write_bytes(text.encode())
    assert [d.text for d in documents.read_documents([tmp_path / "text"])] == [text]


def test_separator_divides_documents(tmp_path):
    (tmp_path / "text").write_text("one<|endoftext|>\ntwo<|endoftext|><|endoftext|> \n")
    assert [d.text for d in documents.read_documents([tmp_path / "text"])] == ["one", "\ntwo"]


def test_bytes_that_are_not_utf8_are_named_or_replaced(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\u00e9 noir".encode("latin-1"))
    with pytest.raises(ValueError, match="0xe9 at offset 3") as error:
        documents.read_documents([path])
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="fix the file, or replace such bytes with --on_bad_utf8 replace$"):
        documents.read_documents([path], on_bad_utf8="error")
    assert documents.read_documents([path], on_bad_utf8="replace")[0].text == "caf\ufffd noir"


@pytest.mark.parametrize("block", [1, 5, 20, 1 << 20])
def test_text_is_read_in_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", block)
    text = "one \u00e9<|endoftext|>two<|endoftex<|endoftext|>  <|endoftext|>three<|endoftext|>"
    found = list(documents.stream_documents("name", io.BytesIO(text.encode())))
    assert [(d.name, d.text) for d in found] == [
        ("name", "one \u00e9"),
        ("name:1", "two<|endoftex"),
        ("name:2", "three"),
    ]
    with pytest.raises(ValueError, match="^name:3 must be UTF-8, got byte 0xff at offset 19; fix the file$"):
        list(documents.stream_documents("name", io.BytesIO(b"one\n<|endoftext|>\n4\xff")))


def test_long_text_is_read_in_linear_time():
    class Blocks(io.BytesIO):
        def read(self, size=-1):
            return super().read(1000)

    (found,) = documents.stream_documents("name", Blocks(b"<|endoftext|" * 500_000))
    assert len(found.text) == 6_000_000


def split(given, val_fraction):
    """The training and held-out documents of `SplitStats.split`."""
    stats = documents.SplitStats()
    for document in given:
        stats.add(document, documents.digest(document.text))
    rule = stats.split(val_fraction)
    parts = given if len(given) > 1 else documents.split_tail(given[0], val_fraction)
    held = [rule.holds_out(documents.digest(d.text)) for d in parts]
    return tuple([d for d, h in zip(parts, held, strict=True) if h == side] for side in (False, True))


def test_split_depends_on_the_text_alone():
    given = [documents.Document(str(i), f"text number {i}") for i in range(1000)]
    train, val = split(given, 0.1)
    assert len(train) + len(val) == 1000 and 70 < len(val) < 130
    more = [documents.Document("new", f"another {i}") for i in range(500)] + given[::-1]
    train_of_more, val_of_more = split(more, 0.1)
    assert set(val) <= set(val_of_more) and set(train) <= set(train_of_more)


def test_split_leaves_no_side_empty():
    for n in (2, 3, 5):
        given = [documents.Document(str(i), f"text {i}") for i in range(n)]
        train, val = split(given, 0.001)
        assert val and train
    with pytest.raises(ValueError, match="all documents are held out"):
        split([documents.Document("a", "same"), documents.Document("b", "same")], 0.5)


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (val,) = split([documents.Document("book", text)], 0.1)
    assert train.text + val.text == text
    assert train.text.endswith("\n") and 0.08 < len(val.text) / len(text) < 0.12
    (train,), (val,) = split([documents.Document("line", "x" * 100)], 0.1)
    assert (len(train.text), len(val.text)) == (90, 10)


@pytest.mark.parametrize("n", [1, 2, 5, 300])
def test_split_ahead_equals_split(n):
    given = [documents.Document(str(i), f"text {i}\nof two lines\n") for i in range(n)]
    rule, again = documents.split_ahead(iter(given), 0.05)
    held = {d.text for d in again if rule.holds_out(documents.digest(d.text))}
    assert held == {d.text for d in split(given, 0.05)[1]} != set()


def test_split_ahead_splits_a_single_document():
    document = documents.Document("one", "line\n" * 20)
    assert documents.Split(0.7).holds_out(documents.digest(document.text))
    rule, parts = documents.split_ahead(iter([document]), 0.7)
    assert [rule.holds_out(documents.digest(part.text)) for part in parts] == [True, False]


def test_split_ahead_reads_a_bounded_part(monkeypatch):
    monkeypatch.setattr(documents, "AHEAD_CHARACTERS", 1000)
    read = []
    given = (read.append(i) or documents.Document(str(i), f"text {i}" * 20) for i in range(10_000))
    rule, again = documents.split_ahead(given, 1e-9)
    assert len(read) < 20 and rule == documents.Split(1e-9)
    assert [d.name for d in again] == [str(i) for i in range(10_000)]
