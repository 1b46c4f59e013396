"""Token files. Alone: uv run pytest tests/test_shards.py"""

import numpy as np
import pytest

from llm_basics import shards


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (255, "uint16"),
        (256, "uint16"),
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
    assert isinstance(shard.tokens, np.memmap) and not shard.tokens.flags.writeable


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


def test_damaged_and_foreign_files_are_refused(tmp_path):
    (path,) = shards.write_shards(tmp_path, "train", [(list(range(50)), 9)], 300, "a" * 64)
    with pytest.raises(ValueError, match="made by tokenizer aaaaaaaaaaaa, got tokenizer bbbbbbbbbbbb"):
        shards.read_shard(path, "b" * 64)
    content = path.read_bytes()
    for damaged, message in [
        (content[:-1], "must have 4196 bytes for 50 tokens, got 4195"),
        (content + b"\0", "got 4197"),
        (content[:100], "is damaged|must have"),
        (b"", "not a token file"),
        (b"PK\x03\x04" + content[4:], "not a token file"),
        (content[:8] + b"[" + content[9:], "is damaged"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as error:
            shards.read_shard(path)
        assert str(path) in str(error.value)
