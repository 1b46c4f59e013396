"""From raw text to token files. Alone: uv run pytest tests/test_prepare.py"""

import dataclasses
import os

import pytest

from llm_basics import config, corpus, prepare, tokenizer

DATA = os.environ.get("LLM_BASICS_DATA")


@pytest.fixture
def folder(tmp_path):
    """Twenty documents in twenty files."""
    for i in range(20):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i}: the cat sat on the mat.\r\n" * (i + 1))
    return tmp_path


@pytest.fixture
def options(folder):
    def make(**changes):
        shape = config.ModelConfig(vocab_size=changes.pop("vocab_size", 270))
        return config.Config(
            data=str(folder / "text"), data_dir=str(folder / "data"), val_fraction=0.3, model=shape, **changes
        )

    return make


def texts(prepared, shards):
    """The documents in token files, decoded again."""
    ids = [int(i) for shard in shards for i in shard.tokens]
    return prepared.tokenizer.decode(ids).split(corpus.DOCUMENT_SEPARATOR)[:-1]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_document_arrives_whole_on_one_side(folder, options, kind):
    prepared = prepare.prepare(options(tokenizer=kind))
    train, val = texts(prepared, prepared.train), texts(prepared, [prepared.val])
    expected = [(folder / "text" / f"{i}.txt").read_bytes().decode() for i in range(20)]
    assert sorted(train + val) == sorted(expected) and train and val
    assert prepared.tokenizer.vocab_size == {"bytes": 257, "bpe": 270}[kind]
    assert sum(s.n_bytes for s in [*prepared.train, prepared.val]) == sum(map(len, expected))


def test_vocabulary_is_learned_from_the_training_part_alone(options, monkeypatch):
    seen = []
    train_bpe = prepare.bpe.train_bpe
    monkeypatch.setattr(
        prepare.bpe,
        "train_bpe",
        lambda path, *args, **kw: seen.append(path.read_bytes().decode()) or train_bpe(path, *args, **kw),
    )
    prepared = prepare.prepare(options())
    assert seen == [corpus.DOCUMENT_SEPARATOR.join(texts(prepared, prepared.train))]


def test_second_time_finds_what_the_first_has_made(options, monkeypatch):
    first = prepare.prepare(options())
    monkeypatch.setattr(prepare.bpe, "train_bpe", pytest.fail)
    monkeypatch.setattr(prepare.shards, "write_shards", pytest.fail)
    assert prepare.prepare(options()).folder == first.folder


def test_other_text_split_or_tokenizer_goes_to_another_folder(folder, options):
    folders = {
        prepare.prepare(o).folder for o in (options(), options(vocab_size=271), options(tokenizer="bytes"))
    }
    folders.add(prepare.prepare(dataclasses.replace(options(), val_fraction=0.4)).folder)
    (folder / "text" / "3.txt").write_text("changed")
    folders.add(prepare.prepare(options()).folder)
    assert len(folders) == 5


def test_interrupted_preparation_is_done_again(options, monkeypatch):
    save = tokenizer.Tokenizer.save
    monkeypatch.setattr(tokenizer.Tokenizer, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(options())
    monkeypatch.setattr(tokenizer.Tokenizer, "save", save)
    assert prepare.prepare(options()).train


def test_saved_tokenizer_can_be_used_for_other_text(folder, options):
    made = prepare.prepare(options())
    (folder / "text" / "new.txt").write_text("something else")
    again = prepare.prepare(options(tokenizer=str(made.folder / "tokenizer")))
    assert again.tokenizer.fingerprint() == made.tokenizer.fingerprint() and again.folder != made.folder


def test_text_that_spells_the_separator_never_becomes_one_inside_a_document(folder, options):
    (folder / "text" / "0.txt").write_text("one<|endoftext|>two")
    prepared = prepare.prepare(options(tokenizer="bytes"))
    both = texts(prepared, prepared.train) + texts(prepared, [prepared.val])
    assert {"one", "two"} <= set(both) and len(both) == 21


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": "bpe", "vocab_size": 256}, "vocab_size must be at least 257"),
        (
            {"tokenizer": "nothing"},
            "must be bytes, gpt2, a folder or a tokenizer.json with one, or in training bpe, got nothing",
        ),
    ],
)
def test_mistakes(options, changes, said):
    with pytest.raises(ValueError, match=said):
        prepare.prepare(options(**changes))


def test_empty_text_is_refused(options, folder):
    for file in (folder / "text").iterdir():
        file.write_text("\n")
    with pytest.raises(ValueError, match="must hold text, but .* is empty"):
        prepare.prepare(options())
    assert not (folder / "data").exists()


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with gpt2"
)
def test_gpt2_vocabulary(options):
    import tiktoken

    chosen = prepare.prepare(options(tokenizer="gpt2")).tokenizer
    text = "It's  a test;\n\n\tdef f(x): return 1234567 \u00e9\u4e2d\U0001f600<|endoftext|>"
    assert chosen.encode(text) == tiktoken.get_encoding("gpt2").encode(text, allowed_special="all")
    assert chosen.vocab_size == 50257 and len(chosen.merges) == 50000
