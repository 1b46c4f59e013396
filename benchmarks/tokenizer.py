"""Benchmarks tokenizer training and encoding against tiktoken, Hugging Face tokenizers and rustbpe.

uv run --group benchmark python benchmarks/tokenizer.py                      on the source of Python's library
uv run --group benchmark python benchmarks/tokenizer.py --data prose.txt --vocab-size 10000
tiktoken reads GPT-2's vocabulary from TIKTOKEN_CACHE_DIR, or downloads it; without it, encoding is skipped.

Each contender runs in a separate process, in turns, for some rounds; medians are compared. A process first
trains on or encodes a few words, so that libraries and machine code are loaded before timing. Memory is the
peak resident size, and its growth during the work.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_basics.core import bpe, vocabulary
from llm_basics.data import documents as corpus
from llm_basics.data import shards, tokenizer_formats

END_OF_TEXT = "<|endoftext|>"


def main() -> None:
    """Run the benchmarks and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="stdlib", help="a text file, or stdlib")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["train", "encode"])
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(CONTENDERS[options.contender](Path(options.data), options.vocab_size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.data)
        if options.data == "stdlib":
            path = Path(folder) / "stdlib.txt"
            path.write_bytes(
                END_OF_TEXT.join(d.text for d in corpus.read_documents(corpus.stdlib_files())).encode()
            )
        print(f"{path.name}: {path.stat().st_size:,} bytes; {options.rounds} rounds; {os.cpu_count()} cores")
        if options.only != "encode":
            compare("train", path, options.vocab_size, options.rounds)
        if options.only != "train":
            if reason := without_gpt2():
                print(
                    f"no rows of encoding: GPT-2's vocabulary is missing ({reason}); see TIKTOKEN_CACHE_DIR"
                )
            else:
                compare("encode", path, options.vocab_size, options.rounds)


def compare(kind: str, path: Path, vocab_size: int, rounds: int) -> None:
    """Run all contenders of a kind in turns, and print medians and their ratios to the first (ours)."""
    names = [name for name in CONTENDERS if name.startswith(kind)]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--contender", name]
            command += ["--data", str(path), "--vocab-size", str(vocab_size)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[name].append(json.loads(said.splitlines()[-1]))
    print(f"\n| {kind} | seconds (all rounds) | MB/s | times ours | peak memory | of it while working |")
    print("|---|---|---|---|---|---|")
    ours = statistics.median(r["seconds"] for r in results[names[0]])
    for name in names:
        seconds = [r["seconds"] for r in results[name]]
        middle = statistics.median(seconds)
        speed = path.stat().st_size / middle / 1e6
        peak, grown = (statistics.median(r[key] / 1e6 for r in results[name]) for key in ("peak", "grown"))
        every = " ".join(f"{s:.2f}" for s in sorted(seconds))
        print(
            f"| {name.removeprefix(kind + ' ')} | {middle:.3f} ({every}) | {speed:.1f} | {middle / ours:.2f} "
            f"| {peak:.0f} MB | {grown:.0f} MB |"
        )
    digests = {name: {r["result"] for r in results[name]} for name in names}
    print("results:", ", ".join(f"{name}: {'/'.join(sorted(digest))}" for name, digest in digests.items()))


def measured(work: Callable[[], Any], result: Callable[[Any], str]) -> dict[str, Any]:
    """Seconds and memory of `work`, and a digest of its result."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    done = work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak, "grown": peak - before, "result": result(done)}


def digest(content: Any) -> str:
    """A short hash to compare results."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


# --------------------------------------------------------------------------------------------------
# Training


def train_ours(path: Path, vocab_size: int, ties: str = bpe.LOWEST_ID) -> dict[str, Any]:
    from llm_basics.fast import bpe as fast

    with tempfile.NamedTemporaryFile() as file:
        # enough distinct words to grow and merge the tables
        file.write(b"".join(b" word%d" % i for i in range(300_000)))
        file.flush()
        fast.train_bpe(file.name, 260, n_workers=2)
    return measured(
        lambda: fast.train_bpe(path, vocab_size, [END_OF_TEXT], ties=ties),
        lambda learned: digest(
            [(vocabulary.bytes_to_unicode(a), vocabulary.bytes_to_unicode(b)) for a, b in learned[1]]
        ),
    )


def hugging_face_trainer(vocab_size: int) -> tuple[Any, Any]:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return model, trainer


def merges_of(model: Any) -> str:
    return digest([tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]])


def train_hugging_face(path: Path, vocab_size: int) -> dict[str, Any]:
    model, trainer = hugging_face_trainer(vocab_size)
    return measured(lambda: model.train([str(path)], trainer), lambda _: merges_of(model))


def train_hugging_face_documents(path: Path, vocab_size: int) -> dict[str, Any]:
    model, trainer = hugging_face_trainer(vocab_size)
    # `train` reads files by lines, which splits white space differently; documents give our merges
    documents = path.read_bytes().decode("utf-8").split(END_OF_TEXT)
    return measured(lambda: model.train_from_iterator(documents, trainer), lambda _: merges_of(model))


def train_rustbpe(path: Path, vocab_size: int) -> dict[str, Any]:
    import rustbpe

    model = rustbpe.Tokenizer()

    def train() -> None:
        with open(path, encoding="utf-8", newline="") as file:
            blocks = iter(lambda: file.read(1 << 16), "")
            model.train_from_iterator(blocks, vocab_size, pattern=bpe.SPLIT_PATTERN.pattern)

    return measured(train, lambda _: digest(model.get_mergeable_ranks()))


# --------------------------------------------------------------------------------------------------
# Encoding with GPT-2's vocabulary


def parts_of(path: Path, n: int = 64) -> list[str]:
    """Split the text into `n` parts at spaces."""
    text = path.read_bytes().decode("utf-8")
    cuts = [0, *(text.index(" ", len(text) * k // n) for k in range(1, n)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def without_gpt2() -> str:
    """Why GPT-2's vocabulary is unavailable; "" if it is available."""
    try:
        import tiktoken

        tiktoken.get_encoding("gpt2")
    # no library, no network, a proxy, a damaged download
    except Exception as error:
        return type(error).__name__
    return ""


def gpt2() -> Any:
    """Our tokenizer with GPT-2's vocabulary, compiled, with a fresh cache."""
    import tiktoken

    from llm_basics.fast import tokenizer

    theirs = tiktoken.get_encoding("gpt2")
    chosen = tokenizer.Tokenizer.from_vocabulary(
        tokenizer_formats.from_ranks(theirs._mergeable_ranks, {END_OF_TEXT: theirs.eot_token})
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "words").write_text("a few words")
        shards.encode_to_file(tokenizer.Tokenizer.byte_level(), Path(folder) / "words", folder, "words", 1)
    tokenizer.Tokenizer.byte_level().encode_batch(["a few words"], 1)
    return chosen


def encode_ours(path: Path, _: int) -> dict[str, Any]:
    chosen, text = gpt2(), path.read_bytes().decode("utf-8")
    return measured(lambda: chosen.encode_ordinary(text), digest)


def encode_ours_to_array(path: Path, _: int, n_threads: int) -> dict[str, Any]:
    chosen, text = gpt2(), path.read_bytes().decode("utf-8")
    return measured(lambda: chosen.encode_to_array(text, n_threads), lambda ids: digest(ids.tolist()))


def encode_ours_batch(path: Path, _: int, n_threads: int) -> dict[str, Any]:
    chosen, parts = gpt2(), parts_of(path)
    return measured(lambda: chosen.encode_batch(parts, n_threads), digest)


def encode_ours_to_file(path: Path, _: int, n_threads: int) -> dict[str, Any]:

    chosen = gpt2()
    with tempfile.TemporaryDirectory() as folder:
        return measured(
            lambda: shards.encode_to_file(chosen, path, folder, "text", n_threads),
            lambda paths: digest([shards.read_shard(path).tokens.tobytes() for path in paths]),
        )


def encode_tiktoken(path: Path, _: int) -> dict[str, Any]:
    import tiktoken

    theirs, text = tiktoken.get_encoding("gpt2"), path.read_bytes().decode("utf-8")
    theirs.encode_ordinary("a few words")
    return measured(lambda: theirs.encode_ordinary(text), digest)


def encode_tiktoken_to_array(path: Path, _: int) -> dict[str, Any]:
    import tiktoken

    theirs, text = tiktoken.get_encoding("gpt2"), path.read_bytes().decode("utf-8")
    theirs.encode_ordinary("a few words")
    return measured(
        lambda: theirs.encode_to_numpy(text, allowed_special="all"), lambda ids: digest(ids.tolist())
    )


def encode_tiktoken_batch(path: Path, _: int) -> dict[str, Any]:
    import tiktoken

    theirs, parts = tiktoken.get_encoding("gpt2"), parts_of(path)
    theirs.encode_ordinary("a few words")
    return measured(lambda: theirs.encode_batch(parts, num_threads=2, allowed_special="all"), digest)


def encode_hugging_face(path: Path, _: int) -> dict[str, Any]:
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        tokenizer_formats.write_tokenizer_json(
            dataclasses.replace(gpt2().to_vocabulary(), special_tokens=[]), Path(folder) / "tokenizer.json"
        )
        theirs = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    parts = parts_of(path)
    theirs.encode("a few words")
    return measured(lambda: [encoded.ids for encoded in theirs.encode_batch_fast(parts)], digest)


CONTENDERS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "train ours": train_ours,
    "train rustbpe": train_rustbpe,
    "train Hugging Face, by lines": train_hugging_face,
    "train Hugging Face, by documents": train_hugging_face_documents,
    "encode ours": encode_ours,
    "encode tiktoken": encode_tiktoken,
    "encode ours, to array, 1 thread": functools.partial(encode_ours_to_array, n_threads=1),
    "encode ours, to array, 2 threads": functools.partial(encode_ours_to_array, n_threads=2),
    "encode tiktoken, to array": encode_tiktoken_to_array,
    "encode Hugging Face, 64 parts, 2 threads": encode_hugging_face,
    "encode ours, 64 parts, 1 thread": functools.partial(encode_ours_batch, n_threads=1),
    "encode ours, 64 parts, 2 threads": functools.partial(encode_ours_batch, n_threads=2),
    "encode tiktoken, 64 parts, 2 threads": encode_tiktoken_batch,
    "encode ours, to file, 1 thread": functools.partial(encode_ours_to_file, n_threads=1),
    "encode ours, to file, 2 threads": functools.partial(encode_ours_to_file, n_threads=2),
}

if __name__ == "__main__":
    main()
