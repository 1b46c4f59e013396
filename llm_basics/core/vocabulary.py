"""A trained vocabulary and its files in GPT-2's format, `vocab.json` and `merges.txt`.

Special tokens and the split pattern, which that format lacks, are stored beside them. Formats of other
programs are in `data.tokenizer_formats`.

    >>> bytes_to_unicode(b" low"), unicode_to_bytes("\u0120low")
    ('\u0120low', b' low')
"""

import contextlib
import dataclasses
import functools
import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from llm_basics.core import bpe, files

# other spellings of GPT-2's pattern that split every text identically
SAME_AS_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, merges in the order of learning, which tokens are special, and the split pattern."""

    vocab: Mapping[int, bytes]
    merges: Sequence[tuple[bytes, bytes]]
    special_tokens: Sequence[str]
    pattern: regex.Pattern = bpe.SPLIT_PATTERN

    def __post_init__(self) -> None:
        check_ids(self.vocab)

    def special_ids(self) -> dict[str, int]:
        """The id of each special token."""
        ids = {token: id for id, token in self.vocab.items()}
        return {special: ids[special.encode("utf-8")] for special in self.special_tokens}


def check_ids(vocab: Mapping[int, bytes]) -> None:
    """Raise ValueError unless every id fits into a token file."""
    for id, token in vocab.items():
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**31:
            raise ValueError(f"an id must be a whole number from 0 to 2**31 - 1, got {id!r} for {token!r}")


def compile_pattern(pattern: str) -> regex.Pattern:
    """Compile a split pattern; a spelling of GPT-2's becomes `bpe.SPLIT_PATTERN`."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"a pattern must be a non-empty string, got {pattern!r}")
    return bpe.SPLIT_PATTERN if pattern in SAME_AS_GPT2 else own_pattern(regex.compile(pattern))


def text_of(pattern: regex.Pattern) -> str:
    """The source of a pattern. Raises ValueError for flags that are not part of it."""
    if regex.compile(pattern.pattern).flags != pattern.flags:
        raise ValueError(
            f"a pattern must have its flags inline to be stored, as in (?i:...), got {pattern.pattern!r}"
        )
    return pattern.pattern


@contextlib.contextmanager
def reading(must: str) -> Iterator[None]:
    """Convert errors of reading a file to ValueError, with the message `must`, the requirement."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{must}; {error.filename} cannot be read ({error.strerror}) or is missing"
        ) from None
    except KeyError as error:
        raise ValueError(f"{must}; {error.args[0]} is missing") from None
    except RecursionError:
        raise ValueError(f"{must}; it is nested too deeply") from None
    except Exception as error:
        raise ValueError(f"{must}; {textwrap.shorten(str(error), 300)}") from None


def own_pattern(pattern: regex.Pattern) -> regex.Pattern:
    """The pattern of `bpe` that equals `pattern`, if any, else `pattern`.

    Patterns are compared by identity, which is lost by pickling.
    """
    own = [own for own in (bpe.SPLIT_PATTERN, bpe.CL100K_PATTERN) if own.pattern == pattern.pattern]
    return own[0] if own and own[0].flags == pattern.flags else pattern


# --------------------------------------------------------------------------------------------------
# GPT-2's format: vocab.json, merges.txt, and beside them special_tokens.json and pattern.txt


def write_gpt2(vocabulary: Vocabulary, folder: str | os.PathLike[str]) -> None:
    """Write `vocab.json`, `merges.txt`, `special_tokens.json`, and `pattern.txt` if it is not GPT-2's."""
    pattern = text_of(vocabulary.pattern)
    folder = Path(folder)
    files.create_folder(folder)
    vocab = {bytes_to_unicode(token): id for id, token in sorted(vocabulary.vocab.items())}
    merges = "".join(
        f"{bytes_to_unicode(left)} {bytes_to_unicode(right)}\n" for left, right in vocabulary.merges
    )
    specials = json.dumps(list(vocabulary.special_tokens), ensure_ascii=False)
    contents: dict[Path, str | bytes] = {
        folder / "vocab.json": json.dumps(vocab, ensure_ascii=False, indent=0) + "\n",
        folder / "merges.txt": "#version: 0.2\n" + merges,
        folder / "special_tokens.json": specials + "\n",
    }
    if vocabulary.pattern != bpe.SPLIT_PATTERN:
        contents[folder / "pattern.txt"] = pattern
    files.write_all(contents)
    if vocabulary.pattern == bpe.SPLIT_PATTERN:
        (folder / "pattern.txt").unlink(missing_ok=True)


def read_gpt2_folder(folder: str | os.PathLike[str]) -> Vocabulary:
    """Read a folder written by `write_gpt2`."""
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"a saved tokenizer must be a folder, got the file {folder}")
        raise ValueError(f"a tokenizer must be a folder or a tokenizer.json, but {folder} does not exist")
    special_tokens, pattern = None, bpe.SPLIT_PATTERN
    if (path := folder / "special_tokens.json").exists():
        with reading(f"{path} must be a list of texts"):
            special_tokens = files.read_json(path)
            if not isinstance(special_tokens, list):
                raise ValueError(f"got {special_tokens!r}")
            for special in special_tokens:
                if not isinstance(special, str) or not special.encode("utf-8"):
                    raise ValueError(f"got {special!r} in it")
    if (path := folder / "pattern.txt").exists():
        with reading(f"{path} must be a pattern"):
            pattern = compile_pattern(path.read_bytes().decode("utf-8"))
    found = read_gpt2(folder / "vocab.json", folder / "merges.txt", special_tokens)
    return dataclasses.replace(found, pattern=pattern)


def read_gpt2(
    vocab_path: str | os.PathLike[str],
    merges_path: str | os.PathLike[str],
    special_tokens: Sequence[str] | None = None,
) -> Vocabulary:
    """Read a vocabulary and merges in GPT-2's format.

    By default the special tokens are the entries that are neither a byte nor the result of a merge.
    """
    with reading(f"{vocab_path} and {merges_path} must be in GPT-2's format"):
        lines = Path(merges_path).read_text(encoding="utf-8-sig").split("\n")
        if lines[0].startswith("#version"):
            lines = lines[1:]
        pairs = [line.split(" ") for line in lines if line]
        return from_spellings(files.read_json(Path(vocab_path)), pairs, special_tokens)


def from_spellings(
    spellings: dict[str, Any], pairs: list[Any], special_tokens: Sequence[str] | None
) -> Vocabulary:
    """A vocabulary from GPT-2's spellings of tokens and merges; `special_tokens` as in `read_gpt2`."""
    vocab: dict[int, bytes] = {}
    for spelling, id in spellings.items():
        if id in vocab:
            raise ValueError(
                f"an id must have one token, got id {id} for both {bytes_to_unicode(vocab[id])!r} "
                f"and {spelling!r}"
            )
        vocab[id] = unicode_to_bytes(spelling)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise ValueError(f"a merge must be a pair of tokens, got {pair!r}")
    merges = [(unicode_to_bytes(left), unicode_to_bytes(right)) for left, right in pairs]
    if special_tokens is None:
        learned = {bytes([b]) for b in range(256)} | {left + right for left, right in merges}
        special_tokens = [token.decode("utf-8") for token in vocab.values() if token not in learned]
    return Vocabulary(vocab, merges, special_tokens)


@functools.cache
def _characters() -> dict[int, str]:
    """One printable character per byte: that of Latin-1 if printable, else one from U+0100 on."""
    order = [byte[0] for byte in bpe.alphabet(bpe.LOWEST_ID)]
    others = sorted(order[188:])
    return {b: chr(b) for b in order[:188]} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def _bytes() -> dict[str, int]:
    return {character: byte for byte, character in _characters().items()}


def bytes_to_unicode(token: bytes) -> str:
    """GPT-2's spelling of a token, one printable character per byte."""
    characters = _characters()
    return "".join(characters[byte] for byte in token)


def unicode_to_bytes(spelling: str) -> bytes:
    """The bytes of a spelling; its UTF-8 bytes if it has other characters, as in special tokens."""
    byte_of = _bytes()
    if all(character in byte_of for character in spelling):
        return bytes(byte_of[character] for character in spelling)
    return spelling.encode("utf-8")


def show_token(token: bytes) -> str:
    """A token in quotes; bytes that are not valid UTF-8 in hexadecimal.

    >>> show_token(b" the"), show_token(b"\\n"), show_token(b"\\xe2\\x82")
    ("' the'", "'\\\\n'", '<e2 82>')
    """
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return f"<{token.hex(' ')}>"
