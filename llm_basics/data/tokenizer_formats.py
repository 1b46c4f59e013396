"""Other tokenizer formats: Hugging Face's `tokenizer.json`, tiktoken's ranks and `tiktoken.Encoding`.

Files are supported only if the ids equal those of their library (except for a post-processor). Regex engines
differ: a custom pattern should match every character and use only syntax common to all engines.

    >>> low = from_ranks({b"l": 0, b"o": 1, b"w": 2, b"lo": 3, b"low": 4}, special_ids={})
    >>> low.merges
    [(b'l', b'o'), (b'lo', b'w')]
"""

import base64
import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import tiktoken

from llm_basics.core import bpe, files, tokenizer, vocabulary

# --------------------------------------------------------------------------------------------------
# Hugging Face: tokenizer.json


def write_tokenizer_json(known: vocabulary.Vocabulary, path: str | os.PathLike[str]) -> None:
    """Write a `tokenizer.json` for `tokenizers.Tokenizer.from_file` and `transformers`."""
    special_ids = known.special_ids()
    specials = set(special_ids.values())
    names = {
        id: token.decode("utf-8") if id in specials else vocabulary.bytes_to_unicode(token)
        for id, token in sorted(known.vocab.items())
    }
    for special, id in special_ids.items():
        if any(name == special and other != id for other, name in names.items()):
            raise ValueError(f"a special token must not be spelled as another token, got {special!r}")
    text = vocabulary.text_of(known.pattern)
    if known.pattern == bpe.SPLIT_PATTERN:
        split: dict[str, Any] = _byte_level(use_regex=True)
    else:
        isolate = {"type": "Split", "behavior": "Isolated", "invert": False}
        isolate["pattern"] = {"Regex": PORTABLE.get(text, text)}
        split = {"type": "Sequence", "pretokenizers": [isolate, _byte_level(use_regex=False)]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": special, **flags}
            for special, id in sorted(special_ids.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", *AFFIXES)),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {name: id for id, name in names.items()},
            "merges": [
                [vocabulary.bytes_to_unicode(left), vocabulary.bytes_to_unicode(right)]
                for left, right in known.merges
            ],
        },
    }
    files.write(Path(path), json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")

# equivalents for engines where `{1,3}+` is a nested repetition and `$` the end of a line
PORTABLE = {
    bpe.CL100K_PATTERN.pattern: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"
    )
}


def read_tokenizer_json(path: str | os.PathLike[str]) -> vocabulary.Vocabulary:
    """The vocabulary of a byte-level BPE `tokenizer.json`. Raises ValueError for any other kind."""
    with vocabulary.reading(f"{path} must be a byte-level BPE tokenizer of Hugging Face"):
        content = files.read_json(Path(path))
        if not isinstance(content, dict) or not isinstance(content["model"], dict):
            raise ValueError(f"got {type(content).__name__} instead of an object with a model")
        model = content["model"]
        if model["type"] != "BPE":
            raise ValueError(f"the model must be BPE, got {model['type']!r}")
        switches = ("dropout", *AFFIXES, "byte_fallback", "ignore_merges")
        for part, name in ((content, "normalizer"), *((model, name) for name in switches)):
            if part.get(name):
                raise ValueError(f"{name} must be off, got {part[name]!r}")
        added = _added_tokens(content["added_tokens"], model["vocab"])
        spellings = {name: id for name, id in model["vocab"].items() if name not in added}
        if not isinstance(model["merges"], list):
            raise ValueError(f"merges must be a list, got {type(model['merges']).__name__}")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        found = vocabulary.from_spellings(spellings, pairs, [])
        for special, id in added.items():
            if id in found.vocab:
                other = vocabulary.bytes_to_unicode(found.vocab[id])
                raise ValueError(f"id {id} is given to both {other!r} and {special!r}")
        specials = {id: special.encode("utf-8") for special, id in added.items()}
        pattern = _pattern_of(content["pre_tokenizer"])
        return vocabulary.Vocabulary(dict(found.vocab) | specials, found.merges, list(added), pattern)


def load(path: str | os.PathLike[str]) -> tokenizer.Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a folder saved by this or another library."""
    path = Path(path)
    # folders of other libraries are complete in tokenizer.json alone
    if (path / "tokenizer.json").is_file() and not (path / "special_tokens.json").exists():
        path = path / "tokenizer.json"
    if path.is_file():
        return tokenizer.Tokenizer.from_vocabulary(read_tokenizer_json(path), path)
    return tokenizer.Tokenizer.load(path)


def _added_tokens(tokens: Sequence[Mapping[str, Any]], vocab: Mapping[str, int]) -> dict[str, int]:
    added: dict[str, int] = {}
    for token in tokens:
        name, id = token["content"], token["id"]
        if not isinstance(name, str) or isinstance(id, bool) or not isinstance(id, int):
            raise ValueError(f"an added token must have a string and an integer, got {name!r} and {id!r}")
        if name in added or id in added.values() or vocab.get(name, id) != id:
            raise ValueError(f"the added token {name!r} with id {id} contradicts another entry")
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(f"{flag} of the added token {name!r} must be off")
        added[name] = id
    return added


def _pattern_of(pre_tokenizer: Mapping[str, Any] | None) -> regex.Pattern:
    if not isinstance(pre_tokenizer, dict):
        raise ValueError(f"there must be a pre-tokenizer, got {pre_tokenizer!r}")
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [part["type"] for part in parts]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]) or parts[-1]["add_prefix_space"]:
        raise ValueError(
            f"the pre-tokenizer must be ByteLevel or Split and ByteLevel, without a prefix space, got {kinds}"
        )
    if len(parts) == 1 and parts[0].get("use_regex", True):
        return bpe.SPLIT_PATTERN
    split = parts[0]
    isolates = split.get("behavior") == "Isolated" and not split.get("invert")
    if parts[-1].get("use_regex", True) or not isolates or "Regex" not in split["pattern"]:
        raise ValueError("the pre-tokenizer must have one pattern, a Regex, that isolates pre-tokens")
    original = {portable: pattern for pattern, portable in PORTABLE.items()}
    return vocabulary.compile_pattern(original.get(split["pattern"]["Regex"], split["pattern"]["Regex"]))


# --------------------------------------------------------------------------------------------------
# tiktoken: a rank per token, which is also its id


def from_ranks(
    ranks: Mapping[bytes, int], special_ids: Mapping[str, int], pattern: regex.Pattern = bpe.SPLIT_PATTERN
) -> vocabulary.Vocabulary:
    """A vocabulary from tiktoken's ranks; a token's merge is the pair left of its bytes by earlier merges."""
    vocab = {id: token for token, id in ranks.items()}
    specials = {id: special.encode("utf-8") for special, id in special_ids.items()}
    if len(vocab | specials) < len(ranks) + len(special_ids):
        raise ValueError("tokens must have distinct ranks, and special tokens distinct ids")
    return vocabulary.Vocabulary(vocab | specials, _merges_of(ranks), list(special_ids), pattern)


def _merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    return [_last_pair(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]


def read_ranks(
    path: str | os.PathLike[str],
    special_ids: Mapping[str, int],
    pattern: regex.Pattern = bpe.SPLIT_PATTERN,
) -> vocabulary.Vocabulary:
    """A vocabulary from a file of ranks, with a base64 token and its rank per line."""
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    with vocabulary.reading(f"{path} must be a file of ranks"):
        for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
            if not line:
                continue
            found = re.fullmatch(rb"(\S+) (\d{1,9})", line)
            token = b""
            with contextlib.suppress(ValueError):
                token = base64.b64decode(found[1], validate=True) if found else b""
            if not found or not token or token in ranks or int(found[2]) in seen:
                raise ValueError(
                    f"{path}:{number} must be a new token in base64 and its rank, got {line[:60]!r}"
                )
            ranks[token] = int(found[2])
            seen.add(ranks[token])
        return from_ranks(ranks, special_ids, pattern)


def to_tiktoken(known: vocabulary.Vocabulary, name: str = "llm_basics") -> tiktoken.Encoding:
    """The `tiktoken.Encoding` with the same ids. tiktoken merges in the order of ids: raises ValueError if
    that differs from the order of the merges."""
    special_ids = known.special_ids()
    ranks = {token: id for id, token in known.vocab.items() if id not in special_ids.values()}
    learned = [ranks[left + right] for left, right in known.merges]
    for before, after in pairwise(learned):
        if before >= after:
            raise ValueError(
                f"for tiktoken ids must ascend in the order of merges, got {after} learned after {before}; "
                "export tokenizer.json instead"
            )
    if list(known.merges) != _merges_of(ranks):
        raise ValueError(
            "for tiktoken every token must be a byte or the result of its own merge; "
            "export tokenizer.json instead"
        )
    return tiktoken.Encoding(
        name, pat_str=vocabulary.text_of(known.pattern), mergeable_ranks=ranks, special_tokens=special_ids
    )


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair = min(pairwise(parts), key=lambda pair: ranks.get(pair[0] + pair[1], math.inf))
        parts = bpe.merge_pair(parts, pair, pair[0] + pair[1])
    return parts[0], parts[1]
