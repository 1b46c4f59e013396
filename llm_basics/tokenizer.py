"""Text to token ids and back, with a vocabulary that `bpe` has learned.

Encoding repeats what training did: cut the text at special tokens and into pre-tokens, then apply the merges
to each pre-token, always the one that was learned first. Any text can be encoded, and decoding what was
encoded gives it back. Saved in GPT-2's format, `vocab.json` and `merges.txt`.

    >>> tokenizer = Tokenizer.of_bytes()
    >>> tokenizer.encode("Hi!<|endoftext|>")
    [72, 105, 33, 256]
"""

import functools
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import regex

from llm_basics import bpe

END_OF_TEXT = "<|endoftext|>"

# pre-tokens whose ids are remembered
CACHE_SIZE = 1 << 18

# searched from the end: where white space begins
SPACE_BEGINS = regex.compile(r"(?r)(?<=\S)(?=\s)")


class Tokenizer:
    """A byte-level BPE tokenizer.

    `vocab` maps ids to bytes, `merges` stands in the order of learning. Special tokens that the vocabulary
    lacks get new ids behind it.
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
    ) -> None:
        self.vocab = dict(vocab)
        self.merges = list(merges)
        bpe.check_special_tokens(special_tokens or ())
        self.special_tokens = list(dict.fromkeys(special_tokens or ()))
        self._special_pattern = bpe.special_pattern(self.special_tokens)
        self._ids = {token: id for id, token in self.vocab.items()}
        for special in self.special_tokens:
            if special.encode("utf-8") not in self._ids:
                id = max(self.vocab, default=-1) + 1
                self.vocab[id] = special.encode("utf-8")
                self._ids[self.vocab[id]] = id
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in self._ids]
        missing += [left + right for left, right in self.merges if left + right not in self._ids]
        if missing:
            raise ValueError(
                f"the vocabulary must hold all 256 bytes and every merge, but lacks {missing[0]!r}"
            )
        learned = {left + right for left, right in self.merges}
        for special in self.special_tokens:
            if special.encode("utf-8") in learned:
                raise ValueError(f"a special token must not be made by a merge too, got {special!r}")
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._special_ids = {special: self._ids[special.encode("utf-8")] for special in self.special_tokens}
        self._encode_pretoken = functools.lru_cache(CACHE_SIZE)(self._apply_merges)

    @classmethod
    def of_bytes(cls, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> "Tokenizer":
        """The tokenizer that has learned nothing: one token a byte, and the special tokens behind."""
        return cls({b: bytes([b]) for b in range(256)}, [], special_tokens)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.vocab) + 1

    def special_id(self, special: str) -> int:
        """The id of a special token. Raises KeyError if it is none."""
        return self._special_ids[special]

    # -- encoding ---------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, in which the tokenizer's own special tokens count as such."""
        ids: list[int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            ids += self.encode_ordinary(text[end : match.start()])
            ids.append(self._special_ids[match.group()])
            end = match.end()
        return ids + self.encode_ordinary(text[end:])

    def encode_ordinary(self, text: str) -> list[int]:
        """The token ids of `text`, in which special tokens are ordinary text: what untrusted text needs."""
        ids: list[int] = []
        for piece in bpe.pretokenize(text):
            ids += self._encode_pretoken(piece)
        return ids

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """The ids of the texts joined together, read only as far as needed: for a file larger than memory.

        The end of each text may belong to a token that goes on in the next, so it waits until a place is seen
        where a token ends for certain.

        >>> list(Tokenizer.of_bytes().encode_iterable(["on", "e <|end", "oftext|>"]))
        [111, 110, 101, 32, 256]
        """
        waiting, searched = "", 0
        for text in texts:
            waiting += text
            if len(waiting) < 2 * searched:
                continue  # a search for every character of a long word would be quadratic
            cut = self._safe_cut(waiting)
            searched = 0 if cut else len(waiting)
            if cut:
                yield from self.encode(waiting[:cut])
                waiting = waiting[cut:]
        yield from self.encode(waiting)

    def _safe_cut(self, text: str) -> int:
        """An offset in `text` where tokens end, whatever follows; 0 if there is none.

        No pre-token has white space behind another character, so it ends where white space begins, and at a
        special token. Only of the last characters it is not known yet whether a special token begins there.
        """
        known = len(text) - max(map(len, self.special_tokens), default=0)
        boundary = SPACE_BEGINS.search(text, endpos=max(known, 0))
        cut = boundary.start() if boundary else 0
        for match in self._special_pattern.finditer(text):
            if match.start() <= known:
                cut = max(cut, match.end())
        return cut

    def _apply_merges(self, piece: str) -> list[int]:
        """Merge the bytes of one pre-token, always the pair that was learned first, until none is left."""
        parts = [bytes([byte]) for byte in piece.encode("utf-8")]
        unranked = len(self._ranks)
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, unranked))
            if pair not in self._ranks:
                break
            parts = bpe.merge_pair(parts, pair, pair[0] + pair[1])
        return [self._ids[part] for part in parts]

    # -- decoding ---------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`. Raises ValueError for an id that the vocabulary does not have."""
        try:
            return b"".join([self.vocab[int(id)] for id in ids])
        except KeyError as error:
            raise ValueError(
                f"a token id must be in the vocabulary of {len(self.vocab)} tokens, got {error.args[0]}"
            ) from None

    # -- files ------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `vocab.json` and `merges.txt` in GPT-2's format, and `special_tokens.json`, a list."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        printable = _byte_to_character()
        spell = functools.partial(_spell, printable=printable)
        vocab = {spell(token): id for id, token in sorted(self.vocab.items())}
        merges = "".join(f"{spell(left)} {spell(right)}\n" for left, right in self.merges)
        _write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False, indent=0) + "\n")
        _write(folder / "merges.txt", "#version: 0.2\n" + merges)
        _write(folder / "special_tokens.json", json.dumps(self.special_tokens, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that `save` has written to `folder`."""
        folder = Path(folder)
        specials = folder / "special_tokens.json"
        try:
            special_tokens = json.loads(specials.read_text(encoding="utf-8")) if specials.exists() else None
        except ValueError as error:
            raise ValueError(f"{specials} must be JSON; {error}") from None
        if special_tokens is not None and not (
            isinstance(special_tokens, list) and all(isinstance(t, str) and t for t in special_tokens)
        ):
            raise ValueError(f"{specials} must be a list of texts, got {special_tokens!r}")
        return cls.from_gpt2_files(folder / "vocab.json", folder / "merges.txt", special_tokens)

    @classmethod
    def from_gpt2_files(
        cls,
        vocab_path: str | os.PathLike[str],
        merges_path: str | os.PathLike[str],
        special_tokens: Sequence[str] | None = None,
    ) -> "Tokenizer":
        """A tokenizer from a vocabulary and merges in GPT-2's format.

        Unless special tokens are named, they are the entries that are neither a byte nor made by a merge.
        """
        byte_of = {character: byte for byte, character in _byte_to_character().items()}
        try:
            spellings = json.loads(Path(vocab_path).read_text(encoding="utf-8-sig"))
            vocab = {operator.index(id): _unspell(spelling, byte_of) for spelling, id in spellings.items()}
            lines = Path(merges_path).read_text(encoding="utf-8-sig").split("\n")
            if lines[0].startswith("#version"):
                lines = lines[1:]
            pairs = [line.split(" ") for line in lines if line]
            merges = [(_unspell(left, byte_of), _unspell(right, byte_of)) for left, right in pairs]
            if special_tokens is None:
                learned = {bytes([b]) for b in range(256)} | {left + right for left, right in merges}
                special_tokens = [token.decode("utf-8") for token in vocab.values() if token not in learned]
            return cls(vocab, merges, special_tokens)
        except FileNotFoundError as error:
            raise ValueError(f"a tokenizer needs both of its files; {error.filename} is missing") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{vocab_path} and {merges_path} must be in GPT-2's format; {error}") from None

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int], special_ids: Mapping[str, int]) -> "Tokenizer":
        """A tokenizer from tiktoken's form: the rank, which is also the id, of every token.

        The pair that a token was merged from is what the merges before it leave of its bytes.
        """
        merges = [
            _last_pair(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
        ]
        vocab = {id: token for token, id in ranks.items()}
        return cls(
            vocab | {id: special.encode() for special, id in special_ids.items()}, merges, list(special_ids)
        )

    def fingerprint(self) -> str:
        """A SHA-256 over all that decides which ids a text gets."""
        content = [sorted(self._special_ids.items()), sorted((id, t.hex()) for id, t in self.vocab.items())]
        content.append([(left.hex(), right.hex()) for left, right in self.merges])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# GPT-2's spelling of bytes


@functools.cache
def _byte_to_character() -> dict[int, str]:
    """One printable character for each byte: itself where it has one in Latin-1, else one from U+0100 on.

    >>> _byte_to_character()[ord("A")], hex(ord(_byte_to_character()[ord(" ")]))
    ('A', '0x120')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _spell(token: bytes, printable: Mapping[int, str]) -> str:
    return "".join(printable[byte] for byte in token)


def _unspell(spelling: str, byte_of: Mapping[str, int]) -> bytes:
    """The bytes that `spelling` stands for; a special token with other characters stands for itself."""
    if all(character in byte_of for character in spelling):
        return bytes(byte_of[character] for character in spelling)
    return spelling.encode("utf-8")


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair = min(pairwise(parts), key=lambda pair: ranks.get(pair[0] + pair[1], math.inf))
        parts = bpe.merge_pair(parts, pair, pair[0] + pair[1])
    return parts[0], parts[1]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
