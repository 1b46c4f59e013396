"""A source without repeated lines, bad documents and near duplicates (`prepare --clean`).

Documents are cleaned one by one in the order of the source: the result is deterministic, and an interrupted
preparation resumes by reading the source again. The first of several copies is kept: which lines occur only
once is not known before the end, when the first documents are already written.

Gopher's rules count words between spaces, so they drop text in Chinese or Thai.
"""

import collections
import itertools
from collections.abc import Iterator

import numpy as np

from llm_basics.data import documents, sources
from llm_basics.quality import deduplication, gopher

# 20 bands of 5 hashes find documents of similarity 0.8 with a probability of 0.9996
NUM_HASHES, NUM_BANDS, NGRAMS, JACCARD_THRESHOLD = 100, 20, 5, 0.8


class CleanSource(sources.Source):
    """Another source, cleaned; `dropped` counts the removed items by rule since the last start."""

    def __init__(self, source: sources.Source) -> None:
        super().__init__(source.name, source.text_field)
        self.source = source
        self.dropped: collections.Counter[str] = collections.Counter()

    def about(self) -> str:
        return self.source.about()

    def documents(self) -> Iterator[documents.Document]:
        self.dropped = collections.Counter()
        lines, near, is_empty = _Lines(), _NearDuplicates(), True
        for document in self.source.documents():
            self.fraction = self.source.fraction
            text, n_repeated = lines.without_repeated(document.text)
            self.dropped["repeated lines"] += n_repeated
            rule = gopher.broken_rule(text) or ("near duplicates" if near.has(text) else None)
            if rule:
                self.dropped[rule] += 1
            else:
                is_empty = False
                yield documents.Document(document.name, text)
        self.fraction = self.source.fraction
        if is_empty and self.dropped:
            counts = ", ".join(f"{number} {rule}" for rule, number in self.dropped.items())
            raise ValueError(
                f"--clean must leave documents, but all of {self.name} are dropped ({counts}); prepare it "
                "without --clean, whose rules need spaces between words and 50 words in a document"
            )

    def dropped_before(self, n_documents: int) -> dict[str, int]:
        """The dropped items up to the document after the first `n_documents`; reads the source if needed."""
        if not self.dropped:
            collections.deque(itertools.islice(self.documents(), n_documents + 1), maxlen=0)
        return dict(sorted(self.dropped.items()))


class _Lines:
    """The hashes of all lines so far, 16 bytes each."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def without_repeated(self, text: str) -> tuple[str, int]:
        """The new and blank lines of a text, and the number of repeated ones."""
        kept, split = [], deduplication.split_lines(text)
        for line in split:
            digest = deduplication.line_hash(line)
            if digest not in self.seen or not line.strip():
                kept.append(line)
            self.seen.add(digest)
        return "".join(kept), len(split) - len(kept)


class _NearDuplicates:
    """The signatures of the documents so far, by their bands."""

    def __init__(self) -> None:
        self.coefficients = deduplication.hash_coefficients(NUM_HASHES)
        self.signatures: list[np.ndarray] = []
        self.buckets: dict[tuple[int, bytes], list[int]] = collections.defaultdict(list)

    def has(self, text: str) -> bool:
        """Whether a text is similar to an earlier one; if not, records its signature.

        Similarity is the fraction of equal hashes, with a standard error of 0.04 at the threshold: signatures
        fit into memory, unlike the n-grams of all documents.
        """
        ngrams = deduplication.word_ngrams(text, NGRAMS)
        signature = deduplication.minhash_signature(ngrams, self.coefficients).astype(np.uint32)
        keys = [(i, part.tobytes()) for i, part in enumerate(np.split(signature, NUM_BANDS))]
        candidates = {number for key in keys for number in self.buckets.get(key, ())}
        if any((self.signatures[i] == signature).mean() >= JACCARD_THRESHOLD for i in candidates):
            return True
        for key in keys:
            self.buckets[key].append(len(self.signatures))
        self.signatures.append(signature)
        return False
