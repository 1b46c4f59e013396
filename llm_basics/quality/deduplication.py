"""Duplicates: lines that occur more than once, and documents that are almost the same.

Models memorize text that occurs often (arXiv 2107.06499). Lines are compared exactly, by a hash. Documents
are compared by MinHash: the probability that two sets have the same minimum of a random hash function is
their Jaccard similarity, so that short signatures represent the sets, and only documents whose signatures
agree in a whole band are compared.

On the resemblance and containment of documents (Broder, 1997). Bands: Mining of Massive Datasets, chapter 3.
"""

import collections
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from llm_basics.core import files

# the largest prime below 2^32: products of two remainders fit into 64 bits
PRIME = 4_294_967_291


def split_lines(text: str) -> list[str]:
    """The lines of a text with their line feeds, which are the only line ends.

    >>> split_lines("one\\n\\ntwo")
    ['one\\n', '\\n', 'two']
    """
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def line_hash(line: str) -> bytes:
    """A hash of a line without its end, of 16 bytes.

    >>> line_hash("a line\\r\\n") == line_hash("a line"), len(line_hash("a line"))
    (True, 16)
    """
    return hashlib.blake2b(line.rstrip("\r\n").encode("utf-8", "surrogatepass"), digest_size=16).digest()


def unique_lines(texts: Iterable[str]) -> list[str]:
    """The texts without the lines that occur more than once in all of them; no copy of such a line is kept.

    >>> unique_lines(["menu\\nfirst\\n", "menu\\nsecond\\n"])
    ['first\\n', 'second\\n']
    """
    split = [split_lines(text) for text in texts]
    counts = collections.Counter(line_hash(line) for lines in split for line in lines)
    return ["".join(line for line in lines if counts[line_hash(line)] == 1) for lines in split]


def exact_line_deduplication(
    input_files: Sequence[str | os.PathLike[str]], output_directory: str | os.PathLike[str]
) -> None:
    """Write the `unique_lines` of files under their names into a folder, which is created.

    Raises ValueError for two files of one name.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("menu\\nfirst\\n"), (folder / "b.txt").write_text("menu\\n")
    >>> exact_line_deduplication([folder / "a.txt", folder / "b.txt"], folder / "unique")
    >>> (folder / "unique/a.txt").read_text(), (folder / "unique/b.txt").read_text()
    ('first\\n', '')
    """
    paths = _distinct(input_files)
    files.create_folder(output_directory)
    for path, text in zip(paths, unique_lines(map(files.read_text, paths)), strict=True):
        files.write(Path(output_directory) / path.name, text)


def _distinct(input_files: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths, which must have different names, since the copies have the same ones."""
    paths = [Path(path) for path in input_files]
    [(name, n_files)] = collections.Counter(path.name for path in paths).most_common(1) or [("", 0)]
    if n_files > 1:
        raise ValueError(
            f"files must have different names, got {n_files} named {name} (input_files); rename them, "
            "since the output has one file of each name"
        )
    return paths


# --------------------------------------------------------------------------------------------------
# Near duplicates


def normalize_text(text: str) -> str:
    """Normalize a text to lower case without accents and punctuation, with single spaces.

    >>> normalize_text("  The Caf\\u00e9,\\n(closed)! ")
    'the cafe closed'
    """
    # NFD encodes an accent as a separate character of category M; punctuation and symbols are P and S
    decomposed = unicodedata.normalize("NFD", text.lower())
    kept = (" " if unicodedata.category(c)[0] in "PS" else c for c in decomposed)
    return " ".join("".join(c for c in kept if unicodedata.category(c)[0] != "M").split())


def word_ngrams(text: str, n: int) -> set[str]:
    """All rows of `n` words of a normalized text; a shorter text is one row, and an empty one has none.

    >>> sorted(word_ngrams("To be, or not to be", 2))
    ['be or', 'not to', 'or not', 'to be']
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n} (words of an n-gram); 5 is usual")
    words = normalize_text(text).split()
    return {" ".join(words[i : i + n]) for i in range(max(min(1, len(words)), len(words) - n + 1))}


def jaccard_similarity(first: set[str], second: set[str]) -> float:
    """The size of the intersection of two sets divided by that of their union; 0 if both are empty.

    J(A, B) = |A and B| / |A or B|

    >>> jaccard_similarity({"a", "b", "c"}, {"b", "c", "d"})
    0.5
    """
    return len(first & second) / max(1, len(first | second))


def hash_coefficients(num_hashes: int, seed: int = 0) -> Int[np.ndarray, "two hashes"]:
    """Random a and b of hash functions (a x + b) mod PRIME, with 1 <= a < PRIME and 0 <= b < PRIME.

    >>> hash_coefficients(3).shape, bool((hash_coefficients(3) == hash_coefficients(3)).all())
    ((2, 3), True)
    """
    random = np.random.default_rng(seed)
    return np.stack([random.integers(1, PRIME, num_hashes), random.integers(0, PRIME, num_hashes)])


def minhash_signature(
    ngrams: set[str], coefficients: Int[np.ndarray, "two hashes"]
) -> Int[np.ndarray, " hashes"]:
    """The minimum of each hash function over a set; PRIME, which is not a hash value, for the empty set.

    signature[i] = min over x in ngrams of (a[i] h(x) + b[i]) mod PRIME

    h(x) is the first 4 bytes of BLAKE2b, little-endian: Python's `hash` differs from process to process.

    >>> coefficients = hash_coefficients(1000)
    >>> first, second = (minhash_signature(set(text), coefficients) for text in ("abc", "bcd"))
    >>> bool(abs((first == second).mean() - 0.5) < 0.05)
    True
    """
    a, b = coefficients.astype(np.uint64)
    smallest = np.full(len(a), PRIME, np.uint64)
    for ngram in ngrams:
        digest = hashlib.blake2b(ngram.encode("utf-8", "surrogatepass"), digest_size=4).digest()
        hashed = np.uint64(int.from_bytes(digest, "little") % PRIME)
        smallest = np.minimum(smallest, (a * hashed + b) % np.uint64(PRIME))
    return smallest.astype(np.int64)


def candidate_pairs(signatures: Int[np.ndarray, "documents hashes"], num_bands: int) -> set[tuple[int, int]]:
    """The pairs of documents whose signatures agree in at least one of `num_bands` bands of equal length.

    P(pair) = 1 - (1 - J^r)^bands, with r = hashes / bands

    Raises ValueError if the bands do not divide the signatures.

    >>> candidate_pairs(np.array([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 5, 6], [1, 8, 3, 6]]), num_bands=2)
    {(0, 1), (1, 2)}
    """
    num_hashes = signatures.shape[1]
    if num_bands < 1 or num_hashes % num_bands:
        raise ValueError(
            f"num_bands must divide num_hashes, got {num_bands} and {num_hashes} (num_bands, num_hashes); "
            "try 20 bands of 5 hashes"
        )
    found: set[tuple[int, int]] = set()
    for band in np.split(signatures, num_bands, axis=1):
        buckets: dict[bytes, list[int]] = collections.defaultdict(list)
        for document, part in enumerate(band):
            buckets[part.tobytes()].append(document)
        for documents in buckets.values():
            found |= set(itertools.combinations(documents, 2))
    return found


def connected_groups(n_documents: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected components of the graph of documents with the given pairs as edges.

    >>> connected_groups(5, [(0, 3), (3, 4)])
    [[0, 3, 4], [1], [2]]
    """
    group = list(range(n_documents))

    def first_of(document: int) -> int:
        while group[document] != document:
            document = group[document]
        return document

    for pair in pairs:
        low, high = sorted(map(first_of, pair))
        group[high] = low
    members: dict[int, list[int]] = collections.defaultdict(list)
    for document in range(n_documents):
        members[first_of(document)].append(document)
    return list(members.values())


def near_duplicates(
    texts: Sequence[str], num_hashes: int, num_bands: int, ngrams: int, jaccard_threshold: float
) -> list[list[int]]:
    """`connected_groups` of the candidate pairs whose n-grams have this Jaccard similarity or more.

    >>> near_duplicates(["MIT license, 1998", "MIT License 1998", "a story"], 20, 10, 2, 0.8)
    [[0, 1], [2]]
    """
    sets = [word_ngrams(text, ngrams) for text in texts]
    coefficients = hash_coefficients(num_hashes)
    signatures = np.array([minhash_signature(each, coefficients) for each in sets]).reshape(-1, num_hashes)
    pairs = candidate_pairs(signatures, num_bands)
    return connected_groups(
        len(texts), [(i, j) for i, j in pairs if jaccard_similarity(sets[i], sets[j]) >= jaccard_threshold]
    )


def minhash_deduplication(
    input_files: Sequence[str | os.PathLike[str]],
    num_hashes: int,
    num_bands: int,
    ngrams: int,
    jaccard_threshold: float,
    output_directory: str | os.PathLike[str],
) -> None:
    """Copy the first file of each group of `near_duplicates` into a folder, which is created.

    Raises ValueError for two files of one name.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("One, two."), (folder / "b.txt").write_text("one two")
    >>> minhash_deduplication([folder / "a.txt", folder / "b.txt"], 20, 10, 2, 0.8, folder / "unique")
    >>> [path.name for path in (folder / "unique").iterdir()]
    ['a.txt']
    """
    paths = _distinct(input_files)
    files.create_folder(output_directory)
    texts = [files.read_text(path) for path in paths]
    for group in near_duplicates(texts, num_hashes, num_bands, ngrams, jaccard_threshold):
        files.write(Path(output_directory) / paths[group[0]].name, paths[group[0]].read_bytes())
