"""Data quality in use: hostile input, `prepare --clean`. Alone: uv run pytest tests/test_quality.py

The pieces are tested by their doctests and by the probes of the course data (test_mistakes.py).
"""

import json
import time

import numpy as np
import pytest

from llm_basics.cli import commands
from llm_basics.core import files
from llm_basics.data import prepare, shard_builder
from llm_basics.quality import deduplication, masking

WORDS = (
    "river stone garden window bridge morning letter silver forest candle harbor meadow winter planet".split()
)


def text_of(seed, n=60):
    """Random words, ten a line."""
    random = np.random.default_rng(seed)
    words = [str(random.choice(WORDS)) + str(random.choice(["", "s", "ing"])) for _ in range(n)]
    return "".join(" ".join(words[i : i + 10]) + ".\n" for i in range(0, n, 10))


@pytest.fixture
def crawl(tmp_path):
    """Twelve pages with a menu, one of them short, one twice and one a little changed."""
    texts = [text_of(seed) for seed in range(12)]
    texts += [
        texts[3],
        texts[4].replace("\n", " \n").replace(".", "!", 1),
        "Too short.\n",
        "1 2 3 4 5\n" * 30,
    ]
    path = tmp_path / "crawl.jsonl"
    path.write_text("".join(json.dumps({"text": f"Home | About\n{text}"}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("mask", [masking.mask_emails, masking.mask_phone_numbers, masking.mask_ips])
@pytest.mark.parametrize("row", ["a", "a.", "1", "1.", "1-", "(111)", "a@", "a@a."])
def test_a_long_row_takes_linear_time(mask, row):
    started = time.process_time()
    mask(row * (200_000 // len(row)))
    assert time.process_time() - started < 2


def test_signatures_estimate_the_similarity():
    first, second = set(map(str, range(300))), set(map(str, range(100, 400)))
    coefficients = deduplication.hash_coefficients(2000)
    pair = [deduplication.minhash_signature(each, coefficients) for each in (first, second)]
    # four standard errors
    assert abs((pair[0] == pair[1]).mean() - 0.5) < 4 * (0.25 / 2000) ** 0.5
    assert deduplication.jaccard_similarity(first, second) == 0.5


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "page.txt").write_text(text_of(1))
    paths = [tmp_path / folder / "page.txt" for folder in ("a", "b")]
    with pytest.raises(ValueError, match=r"different names, got 2 named page\.txt"):
        deduplication.exact_line_deduplication(paths, tmp_path / "out")
    with pytest.raises(ValueError, match=r"different names, got 2 named page\.txt"):
        deduplication.minhash_deduplication(paths, 20, 4, 3, 0.8, tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# prepare --clean

DROPPED = {"near duplicates": 1, "repeated lines": 15 + 6 + 29, "too few words": 3}


def config_of(crawl, **changes):
    given = {
        "source": str(crawl),
        "out": str(crawl.parent / "out"),
        "tokenizer": "bytes",
        "val_fraction": 0.3,
    }
    return commands.PrepareConfig(**given | {"clean": True, "fast": "off"} | changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_what_is_dropped_is_counted_and_stored(crawl, capsys):
    assert prepare.main(config_of(crawl)) == 0
    meta = files.read_json(crawl.parent / "out" / shard_builder.META)
    assert meta["dropped"] == DROPPED and sum(meta["documents"].values()) == 12
    assert "dropped     3: too few words\n" in capsys.readouterr().out
    prepared = prepare.load(crawl.parent / "out")
    ids = [int(i) for shard in (*prepared.train, prepared.val) for i in shard.tokens]
    text = prepared.tokenizer.decode(ids)
    assert text.count("Home | About") == 1 and "Too short" not in text
    assert all(text_of(seed) in text for seed in range(12))


def test_cleaning_resumes_after_a_kill(crawl, monkeypatch):
    whole = prepare.build(config_of(crawl, shard_tokens=600), lambda line: None)
    commit, n_commits = shard_builder.Journal.commit, []

    def killed(journal, state):
        commit(journal, state)
        n_commits.append(state)
        if len(n_commits) == 2:
            raise KeyboardInterrupt

    options = config_of(crawl, shard_tokens=600, out=str(crawl.parent / "again"))
    monkeypatch.setattr(shard_builder.Journal, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.build(options, lambda line: None)
    lines = []
    resumed = prepare.build(options, lines.append)
    assert any("resuming after document" in line for line in lines)
    assert resumed["dropped"] == whole["dropped"] == DROPPED
    assert contents(crawl.parent / "again") == contents(crawl.parent / "out")


def test_counts_are_found_again_if_only_the_last_file_is_missing(crawl, monkeypatch):
    def killed(work, about):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shard_builder, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare.build(config_of(crawl), lambda line: None)
    assert prepare.build(config_of(crawl), lambda line: None)["dropped"] == DROPPED


def test_other_options_are_refused(crawl):
    prepare.build(config_of(crawl, clean=False), lambda line: None)
    with pytest.raises(ValueError, match="clean was False, now True"):
        prepare.build(config_of(crawl), lambda line: None)


def test_a_folder_from_before_there_was_the_option_is_accepted(crawl):
    options = config_of(crawl, clean=False)
    meta = prepare.build(options, lambda line: None)
    del meta["settings"]["clean"]
    files.write(crawl.parent / "out" / shard_builder.META, json.dumps(meta))
    assert prepare.build(options, lambda line: None) == meta


def test_nothing_left_is_an_error_with_its_reason(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.\n")
    with pytest.raises(ValueError, match=r"all of .*short\.txt are dropped \(.*1 too few words\)"):
        prepare.build(config_of(tmp_path / "short.txt"), lambda line: None)
