"""Token files. Alone: uv run pytest tests/test_shards.py"""

import dataclasses
import os
import random

import numpy as np
import pytest

from llm_basics.data import shards


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (255, "uint16"),
        (256, "uint16"),
        (257, "uint16"),
        (65_535, "uint16"),
        (65_536, "uint16"),
        (65_537, "uint32"),
        (200_000, "uint32"),
    ],
)
def test_dtype_holds_the_largest_id(tmp_path, vocab_size, dtype):
    ids = [0, vocab_size - 1, 3]
    (path,) = shards.write_shards(tmp_path, "train", [(ids, 10)], vocab_size, "fingerprint")
    shard = shards.read_shard(path)
    assert shard.tokens.dtype == dtype and shard.tokens.tolist() == ids
    assert shard.max_id == vocab_size - 1
    for part in (shard.tokens, shard.document_ends):
        assert isinstance(part, np.memmap) and not part.flags.writeable
    shards.check_ids(shard)


@pytest.mark.parametrize("vocab_size", [255, 256, 257, 65_535, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("kind", [list, np.int32, np.uint32, np.int64, np.uint64])
def test_an_id_of_the_vocabulary_size_is_never_written(tmp_path, vocab_size, kind):
    ids = [0, vocab_size, 1] if kind is list else np.array([0, vocab_size, 1], kind)
    with pytest.raises(ValueError, match=f"below the vocabulary size {vocab_size}, got {vocab_size}"):
        shards.write_shards(tmp_path, "train", [(ids, 3)], vocab_size, "fingerprint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [np.array([1.0]), np.array([True]), np.array([[1, 2]]), np.array(5), [2**70]], ids=str
)
def test_anything_but_1d_integers_is_never_written(tmp_path, wrong):
    with shards.ShardWriter(tmp_path, "train", 300, "fingerprint") as writer:
        with pytest.raises(ValueError, match="token ids must be 1-D integers"):
            writer.write(wrong, [], 1)
        with pytest.raises(ValueError, match="document ends must be 1-D integers"):
            writer.write([1, 2], wrong, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vocab_size", [-1, 2**32 + 1])
def test_a_vocabulary_beyond_four_bytes_is_refused(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size must be from 0 to 4294967296, got {vocab_size}"):
        shards.ShardWriter(tmp_path, "train", vocab_size, "fingerprint")


@pytest.mark.parametrize("wrong", [-1, 300, 70_000])
def test_ids_outside_the_vocabulary_are_never_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"below the vocabulary size 300, got {wrong}"):
        shards.write_shards(tmp_path, "train", [([1, wrong, 2], 3)], 300, "fingerprint")
    assert list(tmp_path.iterdir()) == []


def test_shards_hold_all_documents_in_order(tmp_path):
    documents = [(list(range(i, i + 30)), 100) for i in range(10)]
    paths = shards.write_shards(tmp_path, "val", documents, 500, "abc", shard_tokens=100)
    read = [shards.read_shard(path, "abc") for path in paths]
    assert [path.name for path in paths] == ["val_0000.bin", "val_0001.bin", "val_0002.bin"]
    assert [token for shard in read for token in shard.tokens] == [t for ids, _ in documents for t in ids]
    assert [shard.n_documents for shard in read] == [4, 4, 2]
    assert sum(shard.n_bytes for shard in read) == 1000
    assert [s.document_ends.tolist() for s in read] == [[30, 60, 90, 120], [30, 60, 90, 120], [30, 60]]


@pytest.mark.parametrize("vocab_size", [10, 100_000])
def test_document_ends_round_trip_across_shards(tmp_path, vocab_size):
    ids = np.random.default_rng(0).integers(0, 10, 1000, np.int32)
    with shards.ShardWriter(tmp_path, "train", vocab_size, "abc", shard_tokens=99) as writer:
        for part in np.array_split(ids, 50):
            writer.write(part, np.flatnonzero(part == 0) + 1, 7)
    read = [shards.read_shard(path) for path in writer.paths]
    assert len(read) == 10 and np.array_equal(np.concatenate([s.tokens for s in read]), ids)
    for shard in read:
        assert shard.document_ends.dtype == "<u8" and len(shard.document_ends) == shard.n_documents
        assert np.array_equal(shard.document_ends, np.flatnonzero(shard.tokens == 0) + 1)
        shards.check_ids(shard)


def test_a_document_may_continue_in_the_next_shard(tmp_path):
    with shards.ShardWriter(tmp_path, "train", 10, "abc", shard_tokens=3) as writer:
        writer.write([1, 0, 2, 3], [2], 9)
        writer.write([4, 5, 6], [], 9)
        writer.write([0], np.array([1]), 0)
    ends = [shards.read_shard(path).document_ends.tolist() for path in writer.paths]
    assert ends == [[2], [], [1]]


def test_an_empty_shard_round_trips(tmp_path):
    with shards.ShardWriter(tmp_path, "train", 10, "abc") as writer:
        writer.write([], [], 0)
    shard = shards.read_shard(writer.paths[0])
    assert len(shard.tokens) == len(shard.document_ends) == 0 and shard.max_id == -1
    shards.check_ids(shard)


@pytest.mark.parametrize(
    ("ends", "wrong"), [([0], 0), ([-1], -1), ([1, 4], 4), ([2, 2], 2), ([3, 1], 1), ([2**63], 2**63)]
)
def test_document_ends_outside_the_ids_or_out_of_order_are_never_written(tmp_path, ends, wrong):
    with shards.ShardWriter(tmp_path, "train", 300, "abc") as writer:
        with pytest.raises(ValueError, match=f"must ascend from 1 to the 3 ids written, got {wrong} as"):
            writer.write([7, 8, 9], ends, 3)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_refused(tmp_path):
    (path,) = shards.write_shards(tmp_path, "train", [(list(range(50)), 9)], 300, "a" * 64)
    with pytest.raises(ValueError, match="made by tokenizer aaaaaaaaaaaa, got tokenizer bbbbbbbbbbbb"):
        shards.read_shard(path, "b" * 64)
    content = path.read_bytes()
    for damaged, message in [
        (content[:-1], "must have 4208 bytes for 50 tokens and 1 documents, got 4207"),
        (content + b"\0", "got 4209"),
        (content[:100], "from byte 8 to 4096, is damaged"),
        (content[:1000], "got 1000"),
        (b"", "not a token file"),
        (b"PK\x03\x04" + content[4:], "not a token file"),
        (content[:8] + b"[" + content[9:], "is damaged"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as error:
            shards.read_shard(path)
        assert str(path) in str(error.value)


@pytest.fixture
def shard(tmp_path):
    """A token file of 50 ids, the last of which ends the second document."""
    with shards.ShardWriter(tmp_path, "train", 300, "a" * 64) as writer:
        writer.write(list(range(50)), [20, 50], 123)
    return shards.read_shard(writer.paths[0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 2', '"version": 1', "of version 2, got version 1; .* prepare the data again"),
        ('"version": 2', '"version": 2.0', "version must be int, got 2.0"),
        ('"version"', '"revision"', "must be a JSON object with a version"),
        ('"n_bytes"', '"n_bites"', "n_bytes must be int, got None"),
        ('"n_bytes": 123', '"n_bytes": true', "n_bytes must be int, got True"),
        ('"n_bytes": 123', '"n_bytes": -1', "n_bytes must not be negative, got -1"),
        ('"n_bytes": 123', '"n_bytes": 124', "a field was changed"),
        ('"n_tokens": 50', '"n_tokens": null', "n_tokens must be int, got None"),
        ('"n_tokens": 50', '"n_tokens": -50', "n_tokens must not be negative, got -50"),
        ('"n_documents": 2', '"n_documents": "2"', "n_documents must be int, got '2'"),
        ('"n_documents": 2', '"n_documents": -2', "n_documents must not be negative, got -2"),
        ('"max_id": 49', '"max_id": 300', "max_id must be in the vocabulary"),
        ('"max_id": 49', '"max_id": -1', "max_id must be in the vocabulary"),
        ('"uint16"', '"complex"', "dtype must be uint16 for a vocabulary of 300, got complex"),
        ('"vocab_size": 300', '"vocab_size": 65537', "dtype must be uint32 for a vocabulary of 65537"),
        ('"vocab_size": 300', '"vocab_size": -3', "vocab_size must be from 0 to 4294967296, got -3"),
        ('"tokenizer": "a', '"tokenizer": "b', "a field was changed"),
        ('"tokenizer": ', '"tokenizer": 7, "name": ', "tokenizer must be str, got 7"),
        ("{", "[" * 3000, "recursion|is damaged"),
        ("{", '["', "is damaged"),
        ("{", "\xff{", "is damaged"),
    ],
)
def test_a_wrong_header_is_refused(shard, old, new, message):
    content = shard.path.read_bytes()
    header = content[: shards.HEADER_BYTES].rstrip().replace(old.encode(), new.encode("latin-1"), 1)
    shard.path.write_bytes(header.ljust(shards.HEADER_BYTES) + content[shards.HEADER_BYTES :])
    with pytest.raises(ValueError, match=message) as error:
        shards.read_shard(shard.path)
    assert str(shard.path) in str(error.value)


@pytest.mark.parametrize("header", [b"[]", b"null", b'"version"', b"7", b"NaN", b""])
def test_a_header_that_is_not_an_object_is_refused(shard, header):
    shard.path.write_bytes((shards.MAGIC + header).ljust(5000))
    with pytest.raises(ValueError, match=r"train_0000\.bin, from byte 8 to 4096, is damaged"):
        shards.read_shard(shard.path)


@pytest.mark.parametrize(("ends", "index"), [([0, 50], 0), ([20, 20], 1), ([30, 20], 1), ([20, 51], 1)])
def test_wrong_document_ends_in_a_file_are_refused(shard, ends, index):
    start = shards.HEADER_BYTES + 104  # 50 ids of two bytes, filled up to a multiple of 8
    shard.path.write_bytes(shard.path.read_bytes()[:start] + np.array(ends, "<u8").tobytes())
    with pytest.raises(ValueError, match=f"got {ends[index]} at byte {start + 8 * index}") as error:
        shards.read_shard(shard.path)
    assert str(shard.path) in str(error.value)


def mutate(content: bytes, random: random.Random) -> bytes:
    """A token file with one random damage."""
    header_end = content.index(b"}") + 1
    index, new = random.randrange(header_end, shards.HEADER_BYTES), random.choice(b"\t\r\n\0x")
    match random.choice(["cut", "append", "magic", "version", "header", "padding"]):
        case "cut":
            return content[: random.randrange(len(content))]
        case "append":
            return content + random.randbytes(random.randint(1, 100))
        case "magic":
            return random.randbytes(8) + content[8:]
        case "version":
            return content.replace(b'"version": 2', b'"version": %d' % random.choice([0, 1, 3, 9]))
        case "header":
            index = random.randrange(header_end)
            new = content[index] ^ random.randint(1, 255)
    return content[:index] + bytes([new]) + content[index + 1 :]


def same(a: shards.Shard, b: shards.Shard) -> bool:
    return all(np.array_equal(value, vars(b)[name]) for name, value in vars(a).items())


@pytest.mark.parametrize("seed", range(200))
def test_a_mutated_file_is_refused_or_read_as_before(shard, seed):
    content = shard.path.read_bytes()
    before = dataclasses.replace(shard, tokens=np.arange(50), document_ends=np.array([20, 50]))
    mutated = mutate(content, random.Random(seed))
    shard.path.write_bytes(mutated)
    try:
        read = shards.read_shard(shard.path)
    except ValueError as error:
        assert str(shard.path) in str(error)
    else:
        assert same(before, read) and mutated.split() == content.split()


def test_other_whitespace_in_the_header_changes_nothing(shard):
    content = shard.path.read_bytes()
    shard.path.write_bytes(content[:4000] + b"\t\r\n" + content[4003:])
    assert same(shard, shards.read_shard(shard.path))


@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("index", [0, 7, 999])
def test_an_id_beyond_the_vocabulary_on_disk_is_found_at_its_byte(tmp_path, monkeypatch, vocab_size, index):
    monkeypatch.setattr(shards, "CHECK_TOKENS", 8)
    (path,) = shards.write_shards(tmp_path, "train", [([*range(250)] * 4, 9)], vocab_size, "abc")
    ids = shards.read_shard(path).tokens
    offset = shards.HEADER_BYTES + index * ids.itemsize
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.array(vocab_size, ids.dtype).tobytes())
    with pytest.raises(ValueError, match=f"size {vocab_size}, got {vocab_size} at byte {offset};") as error:
        shards.check_ids(shards.read_shard(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("index", "new", "highest"), [(0, 60, 60), (49, 3, 48)])
def test_another_highest_id_than_in_the_header_is_found(shard, index, new, highest):
    with open(shard.path, "r+b") as file:
        file.seek(shards.HEADER_BYTES + 2 * index)
        file.write(bytes([new, 0]))
    with pytest.raises(ValueError, match=f"must be 49 as in its header, got {highest}"):
        shards.check_ids(shards.read_shard(shard.path))


def test_a_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, true=true: [calls.append(n), true(*a)])
    shards.write_shards(tmp_path, "train", [([1, 2], 3)], 300, "abc")
    assert calls == ["fsync", "replace", "fsync"]
