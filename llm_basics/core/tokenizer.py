"""Converts text to token ids and back, with a vocabulary learned by `bpe`.

Encoding repeats the steps of training: split the text at special tokens and into pre-tokens, then apply the
merges to each pre-token in the order of learning. Any text can be encoded, and decoding its ids restores it.
Tokenizers are saved in GPT-2's format, `vocab.json` and `merges.txt`. On the command line:
`uv run python -m llm_basics.tokenizer --help`.

    >>> tokenizer = Tokenizer.byte_level()
    >>> tokenizer.encode("Hi!<|endoftext|>")
    [72, 105, 33, 256]
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex

from llm_basics.core import bpe, vocabulary

END_OF_TEXT = "<|endoftext|>"

# number of pre-tokens whose ids are cached
CACHE_SIZE = 1 << 18

# bytes of a file encoded per call
PART_BYTES = 1 << 24

# positions where a pre-token ends for any following text, searched from the end; other patterns have none
BOUNDARIES = {
    bpe.SPLIT_PATTERN: regex.compile(r"(?r)(?<=\S)(?=\s)"),
    bpe.CL100K_PATTERN: regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=\s)"),
}
NO_BOUNDARY = regex.compile(r"(?!)")


class Tokenizer:
    """A byte-level BPE tokenizer.

    `vocab` maps ids to bytes, `merges` are in the order of learning. Special tokens that the vocabulary does
    not contain get new ids at its end. `pattern` splits text into pre-tokens.
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        pattern: regex.Pattern = bpe.SPLIT_PATTERN,
    ) -> None:
        self.vocab = dict(vocab)
        vocabulary.check_ids(self.vocab)
        self.merges = list(merges)
        self.special_tokens = bpe.check_special_tokens(special_tokens or ())
        self.pattern = vocabulary.own_pattern(pattern)
        self._special_pattern = bpe.special_pattern(self.special_tokens)
        self._ids = {token: id for id, token in self.vocab.items()}
        for special in self.special_tokens:
            if special.encode("utf-8") not in self._ids:
                id = max(self.vocab, default=-1) + 1
                self.vocab[id] = special.encode("utf-8")
                self._ids[self.vocab[id]] = id
        _check(self._ids, self.merges, self.special_tokens)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._special_ids = {special: self._ids[special.encode("utf-8")] for special in self.special_tokens}
        self._cached_merges = functools.lru_cache(CACHE_SIZE)(self._apply_merges)

    @classmethod
    def byte_level(cls, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> "Tokenizer":
        """A tokenizer without merges: one token per byte, then the special tokens."""
        return cls({b: bytes([b]) for b in range(256)}, [], special_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.vocab, self.merges, self.special_tokens, self.pattern)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.vocab) + 1

    def special_id(self, special: str) -> int:
        """The id of a special token. Raises KeyError for any other text."""
        return self._special_ids[special]

    @property
    def end_of_text_id(self) -> int:
        """The id of END_OF_TEXT, which ends every document. Raises ValueError without this special token."""
        if END_OF_TEXT not in self._special_ids:
            raise ValueError(
                f"the tokenizer must have the special token {END_OF_TEXT}, which ends documents, got "
                f"{', '.join(self.special_tokens) or 'none'}"
            )
        return self._special_ids[END_OF_TEXT]

    # -- encoding ---------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, where special tokens get their own ids.

        An unpaired surrogate, which UTF-8 cannot encode, becomes U+FFFD.
        """
        text = replace_surrogates(text)
        ids: list[int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            ids += self.encode_ordinary(text[end : match.start()])
            ids.append(self._special_ids[match.group()])
            end = match.end()
        return ids + self.encode_ordinary(text[end:])

    def encode_ordinary(self, text: str) -> list[int]:
        """The token ids of `text`, with special tokens as ordinary text: for untrusted input."""
        return self.encode_bytes(replace_surrogates(text).encode("utf-8"))

    def encode_bytes(self, content: bytes) -> list[int]:
        """The token ids of any bytes, with special tokens as ordinary text. The inverse is `decode_bytes`.

        A byte that is not UTF-8 is split like punctuation: neither letter, number nor white space.
        """
        ids: list[int] = []
        for pretoken in bpe.pretokenize(content.decode("utf-8", "surrogateescape"), (), self.pattern):
            ids += self._cached_merges(pretoken)
        return ids

    def encode_to_array(self, text: str, n_threads: int | None = None) -> np.ndarray:
        """`encode` as an int32 array. `n_threads` has no effect here, since Python code holds the GIL."""
        return np.array(self.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str], n_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text. `n_threads` has no effect here."""
        return [self.encode(text) for text in texts]

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """The ids of the concatenated texts, read lazily: for a file larger than memory.

        A token may continue in the next text, so the end of a text is buffered up to a boundary that no token
        crosses.

        >>> list(Tokenizer.byte_level().encode_iterable(["on", "e <|end", "oftext|>"]))
        [111, 110, 101, 32, 256]
        """
        pending, searched = "", 0
        for text in texts:
            pending += text
            if len(pending) < 2 * searched:
                continue  # a search per character of a long word would be quadratic
            cut = self._safe_cut(pending)
            searched = 0 if cut else len(pending)
            if cut:
                yield from self.encode(pending[:cut])
                pending = pending[cut:]
        yield from self.encode(pending)

    def _safe_cut(self, text: str) -> int:
        """An offset in `text` where a token ends for any following text; 0 if there is none.

        The last characters may be the start of a special token, so they are not searched.
        """
        known = len(text) - max(map(len, self.special_tokens), default=0)
        boundary = BOUNDARIES.get(self.pattern, NO_BOUNDARY).search(text, endpos=max(known, 0))
        cut = boundary.start() if boundary else 0
        for match in self._special_pattern.finditer(text):
            if match.start() <= known:
                cut = max(cut, match.end())
        return cut

    def encode_file(
        self, path: str | os.PathLike[str], n_threads: int | None = None
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        """The ids of a UTF-8 file in parts, each with its offset and its number of bytes."""
        n_parts = Path(path).stat().st_size // PART_BYTES + 1
        with open(path, "rb") as file:
            for start, end in pairwise(bpe.chunk_boundaries(path, self.special_tokens, n_parts)):
                text = bpe.check_utf8(file.read(end - start), path, start)
                yield np.array(self.encode(text), np.int32), start, end - start

    def _apply_merges(self, pretoken: str) -> list[int]:
        *_, parts = self.merge_steps(pretoken.encode("utf-8", "surrogateescape"))
        return [self._ids[part] for part in parts]

    def merge_steps(self, piece: bytes) -> Iterator[list[bytes]]:
        """The tokens of one pre-token: its bytes, then the result of each merge.

        Each merge replaces the pair that was learned first, until no pair has a merge.
        """
        parts = [bytes([byte]) for byte in piece]
        yield parts
        unranked = len(self._ranks)
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, unranked))
            if pair not in self._ranks:
                break
            parts = bpe.merge_pair(parts, pair, pair[0] + pair[1])
            yield parts

    # -- decoding ---------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        """`decode` of each sequence of ids."""
        return [self.decode(ids) for ids in batch]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`. Raises ValueError for an id outside the vocabulary."""
        try:
            return b"".join([self.vocab[int(id)] for id in ids])
        except KeyError as error:
            raise ValueError(
                f"a token id must be in the vocabulary of {len(self.vocab)} tokens, got {error.args[0]}"
            ) from None

    # -- files ------------------------------------------------------------------------------------

    @classmethod
    def from_vocabulary(cls, found: vocabulary.Vocabulary, source: object = "a vocabulary") -> "Tokenizer":
        """A tokenizer from a vocabulary that was read from `source`."""
        try:
            return cls(found.vocab, found.merges, found.special_tokens, found.pattern)
        except ValueError as error:
            raise ValueError(f"{source} must hold a complete tokenizer; {error}") from None

    def to_vocabulary(self) -> vocabulary.Vocabulary:
        """The vocabulary, merges, special tokens and pattern, for the writers in `vocabulary`."""
        return vocabulary.Vocabulary(self.vocab, self.merges, self.special_tokens, self.pattern)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `vocab.json` and `merges.txt` in GPT-2's format, and `special_tokens.json`, a list."""
        vocabulary.write_gpt2(self.to_vocabulary(), folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Load a tokenizer written by `save`."""
        found = vocabulary.read_gpt2_folder(folder)
        return cls.from_vocabulary(found, f"vocab.json and merges.txt in {folder}")

    @classmethod
    def from_gpt2_files(
        cls,
        vocab_path: str | os.PathLike[str],
        merges_path: str | os.PathLike[str],
        special_tokens: Sequence[str] | None = None,
    ) -> "Tokenizer":
        """A tokenizer from a vocabulary and merges in GPT-2's format: `vocabulary.read_gpt2`."""
        found = vocabulary.read_gpt2(vocab_path, merges_path, special_tokens)
        return cls.from_vocabulary(found, f"{vocab_path} and {merges_path}")

    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the ids of a text."""
        content: list[Any] = [sorted(self._special_ids.items())]
        content.append(sorted((id, token.hex()) for id, token in self.vocab.items()))
        content.append([(left.hex(), right.hex()) for left, right in self.merges])
        if self.pattern != bpe.SPLIT_PATTERN:
            content.append([self.pattern.pattern, self.pattern.flags])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def replace_surrogates(text: str) -> str:
    """Join the halves of surrogate pairs; an unpaired half becomes U+FFFD.

    >>> replace_surrogates("\\ud83d\\ude00 \\ud83d") == "\\U0001f600 \\ufffd"
    True
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check(
    ids: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]], special_tokens: Sequence[str]
) -> None:
    """Raise ValueError unless each token is a byte, a special token, or the merge of earlier tokens."""
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in ids]
    missing += [left + right for left, right in merges if left + right not in ids]
    if missing:
        raise ValueError(f"the vocabulary must hold all 256 bytes and every merge, but lacks {missing[0]!r}")
    known = {bytes([b]) for b in range(256)}
    for left, right in merges:
        if left not in known or right not in known:
            raise ValueError(f"a merge must join bytes or earlier merges, got {left!r} and {right!r}")
        if left + right in known:
            raise ValueError(f"a token must be made by one merge, got a second one for {left + right!r}")
        known.add(left + right)
    for special in special_tokens:
        if special.encode("utf-8") in known:
            raise ValueError(f"a special token must not be made by a merge too, got {special!r}")
