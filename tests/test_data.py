"""Documents, token files, batches. Alone: uv run pytest tests/test_data.py"""

import collections

import numpy as np
import pytest
import torch

from llm_basics import data

# --------------------------------------------------------------------------------------------------
# get_batch


def test_targets_are_inputs_one_token_on(adapters):
    tokens = np.arange(100, 150)
    inputs, targets = adapters.run_get_batch(tokens, 32, 7, "cpu")
    assert inputs.shape == targets.shape == (32, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))


def test_every_start_is_equally_likely(adapters):
    tokens, context = np.arange(13), 4
    starts = torch.cat([adapters.run_get_batch(tokens, 100, context, "cpu")[0][:, 0] for _ in range(90)])
    counts = collections.Counter(starts.tolist())
    assert set(counts) == set(range(9)), "the first and the last possible start must come, and none beyond"
    # 1000 expected for each; 5 standard deviations of a binomial are 150
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_windows_of_a_batch_start_independently(adapters):
    inputs, _ = adapters.run_get_batch(np.arange(10_000), 64, 3, "cpu")
    assert len(set(inputs[:, 0].tolist())) > 50


def test_batch_lands_on_the_device_asked_for(adapters):
    inputs, targets = adapters.run_get_batch(np.arange(30), 2, 3, "meta")
    assert inputs.device.type == targets.device.type == "meta"


class CountingMemmap(np.memmap):
    """A memory map that counts how many of its elements are read at once."""

    read = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        CountingMemmap.read += getattr(found, "size", 1)
        return found

    def __array__(self, *args, **kwargs):
        CountingMemmap.read += self.size
        return super().__array__(*args, **kwargs)


def test_uint16_memmap_becomes_int64_and_is_not_read_whole(adapters, tmp_path):
    (np.arange(200_000) % 65_536).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = CountingMemmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    CountingMemmap.read = 0
    inputs, targets = adapters.run_get_batch(tokens, 8, 16, "cpu")
    assert inputs.dtype == torch.int64
    assert torch.equal((inputs + 1) % 65_536, targets)
    assert CountingMemmap.read <= 20 * 8 * 17, "reads far more than its windows"


def test_ids_above_int16_stay_positive(adapters):
    inputs, _ = adapters.run_get_batch(np.full(50, 60_000, dtype=np.uint16), 2, 5, "cpu")
    assert inputs.unique().tolist() == [60_000]


def test_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match="more tokens than model.context_length 8, got 8"):
        data.get_batch(np.arange(8), 1, 8)
    assert data.get_batch(np.arange(9), 1, 8)[1][0, -1] == 8


def test_batches_follow_from_the_generator():
    tokens = np.arange(1000)
    first, again = (data.get_batch(tokens, 4, 5, rng=np.random.default_rng(3))[0] for _ in range(2))
    assert torch.equal(first, again)


# --------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture
def shards():
    return [np.arange(1000, 1050), np.arange(2000, 2004), np.arange(3000, 3091)]


def test_batches_are_a_function_of_their_number(shards):
    forward = data.Batches(shards, 3, 6, seed=5)
    backward = data.Batches(shards, 3, 6, seed=5)
    expected = [forward[i] for i in range(20)]
    for i in reversed(range(20)):
        assert torch.equal(backward[i][0], expected[i][0])
        assert torch.equal(backward[i][1], expected[i][0] + 1)


def test_an_epoch_sees_each_window_once_and_each_epoch_differs(shards):
    batches = data.Batches(shards, 1, 6, seed=1)
    n = batches.windows_per_epoch
    epochs = [[batches[epoch * n + i][0][0, 0].item() for i in range(n)] for epoch in range(3)]
    for starts in epochs:
        ordered = sorted(starts)
        assert all(b - a == 6 or b - a > 900 for a, b in zip(ordered, ordered[1:], strict=False))
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != sorted(epochs[1])
    assert epochs[0] != sorted(epochs[0])


def test_every_place_is_reached_in_some_epoch(shards):
    batches = data.Batches(shards[:1], 1, 6, seed=0)
    seen = {t for i in range(60 * batches.windows_per_epoch) for t in batches[i][1][0].tolist()}
    assert seen == set(range(1001, 1050))


def test_a_batch_may_reach_into_the_next_epoch(shards):
    one, three = data.Batches(shards, 1, 6, seed=4), data.Batches(shards, 3, 6, seed=4)
    for number in range(3 * one.windows_per_epoch):
        expected = torch.cat([one[i][0] for i in range(3 * number, 3 * number + 3)])
        assert torch.equal(three[number][0], expected)


def test_shards_too_short_for_a_window_are_passed_over(shards):
    batches = data.Batches(shards, 1, 6, seed=0)
    assert all(not 2000 <= batches[i][0][0, 0] < 3000 for i in range(100))
    with pytest.raises(ValueError, match="context_length 100, got 91"):
        data.Batches(shards, 1, 100)


def test_smallest_possible_text():
    inputs, targets = data.Batches([np.arange(7)], 2, 6, seed=0)[123]
    assert inputs.tolist() == [list(range(6))] * 2
    assert targets.tolist() == [list(range(1, 7))] * 2


def test_sequential_batches_go_through_all_windows_once():
    tokens = np.arange(100)
    starts = [s for inputs, _ in data.sequential_batches(tokens, 4, 9) for s in inputs[:, 0].tolist()]
    assert starts == list(range(0, 99, 9))
    few = [
        s for inputs, _ in data.sequential_batches(tokens, 2, 9, max_batches=2) for s in inputs[:, 0].tolist()
    ]
    assert few == [0, 27, 63, 90]


# --------------------------------------------------------------------------------------------------
# Token files


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
    (path,) = data.write_shards(tmp_path, "train", [(ids, 10)], vocab_size, "fingerprint")
    shard = data.read_shard(path)
    assert shard.tokens.dtype == dtype and shard.tokens.tolist() == ids
    assert isinstance(shard.tokens, np.memmap) and not shard.tokens.flags.writeable


@pytest.mark.parametrize("wrong", [-1, 300, 70_000])
def test_ids_outside_the_vocabulary_are_never_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"below the vocabulary size 300, got {wrong}"):
        data.write_shards(tmp_path, "train", [([1, wrong, 2], 3)], 300, "fingerprint")
    assert list(tmp_path.iterdir()) == []


def test_shards_hold_all_documents_in_order(tmp_path):
    documents = [(list(range(i, i + 30)), 100) for i in range(10)]
    paths = data.write_shards(tmp_path, "val", documents, 500, "abc", shard_tokens=100)
    shards = [data.read_shard(path, "abc") for path in paths]
    assert [path.name for path in paths] == ["val_0000.bin", "val_0001.bin", "val_0002.bin"]
    assert [token for shard in shards for token in shard.tokens] == [t for ids, _ in documents for t in ids]
    assert [shard.n_documents for shard in shards] == [4, 4, 2]
    assert sum(shard.n_bytes for shard in shards) == 1000


def test_damaged_and_foreign_files_are_refused(tmp_path):
    (path,) = data.write_shards(tmp_path, "train", [(list(range(50)), 9)], 300, "a" * 64)
    with pytest.raises(ValueError, match="made by tokenizer aaaaaaaaaaaa, got tokenizer bbbbbbbbbbbb"):
        data.read_shard(path, "b" * 64)
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
            data.read_shard(path)
        assert str(path) in str(error.value)


# --------------------------------------------------------------------------------------------------
# Documents


def test_file_folder_and_glob(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden/d.txt", "deep/e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(source):
        return [path.relative_to(tmp_path).as_posix() for path in data.find_files(str(source))]

    assert names(tmp_path / "b.txt") == ["b.txt"]
    assert names(tmp_path) == ["a.txt", "b.txt", "deep/c.txt", "deep/e.md"]
    assert names(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "deep/c.txt"]
    with pytest.raises(ValueError, match="--data must name a file"):
        data.find_files(str(tmp_path / "none*"))


def test_standard_library_is_python_source_without_tests():
    files = data.stdlib_files()
    names = {file.name for file in files}
    assert {"argparse.py", "json", "dataclasses.py"} & names >= {"argparse.py", "dataclasses.py"}
    assert not any({"test", "tests", "site-packages"} & set(file.parts[-3:]) for file in files)
    assert len(files) > 300
    documents = data.read_documents(files)
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_text_is_kept_to_the_byte(tmp_path):
    text = "a\r\n\r\nb_c\t\u00e9\u2028\n"
    (tmp_path / "text").write_bytes(text.encode())
    assert [d.text for d in data.read_documents([tmp_path / "text"])] == [text]


def test_separator_divides_documents(tmp_path):
    (tmp_path / "text").write_text("one<|endoftext|>\ntwo<|endoftext|><|endoftext|> \n")
    assert [d.text for d in data.read_documents([tmp_path / "text"])] == ["one", "\ntwo"]


def test_bytes_that_are_not_utf8_are_named_or_replaced(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\u00e9 noir".encode("latin-1"))
    with pytest.raises(ValueError, match="0xe9 at offset 3") as error:
        data.read_documents([path])
    assert str(path) in str(error.value)
    assert data.read_documents([path], on_bad_utf8="replace")[0].text == "caf\ufffd noir"


def test_split_depends_on_the_text_alone():
    documents = [data.Document(str(i), f"text number {i}") for i in range(1000)]
    train, val = data.split_documents(documents, 0.1)
    assert len(train) + len(val) == 1000 and 70 < len(val) < 130
    more = [data.Document("new", f"another {i}") for i in range(500)] + documents[::-1]
    train_of_more, val_of_more = data.split_documents(more, 0.1)
    assert set(val) <= set(val_of_more) and set(train) <= set(train_of_more)


def test_split_leaves_no_side_empty():
    for n in (2, 3, 5):
        documents = [data.Document(str(i), f"text {i}") for i in range(n)]
        train, val = data.split_documents(documents, 0.001)
        assert val and train


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (val,) = data.split_documents([data.Document("book", text)], 0.1)
    assert train.text + val.text == text
    assert train.text.endswith("\n") and 0.08 < len(val.text) / len(text) < 0.12
    (train,), (val,) = data.split_documents([data.Document("line", "x" * 100)], 0.1)
    assert (len(train.text), len(val.text)) == (90, 10)
