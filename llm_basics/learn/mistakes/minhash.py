"""MinHash deduplication: n-grams, signatures, bands, groups, files."""

import collections
import functools
import itertools
import pathlib
import tempfile
import types
import unicodedata

import numpy as np

from llm_basics.learn import probes
from llm_basics.quality import deduplication

step = probes.Step("minhash")
# the right functions, also where one of them is replaced
right = types.SimpleNamespace(**vars(deduplication))

LICENSE = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software "
    "and associated "
    "documentation files, to deal in the software without restriction, including without limitation "
    "the rights to "
    "use, copy, modify, merge, publish, distribute, sublicense, and sell copies of the software."
)
STORY = (
    "Once upon a time there was a little boat that wanted to see the ocean. Every morning it asked "
    "the river how "
    "far the ocean was, and every morning the river answered: not far for those who float, and very "
    "far for others."
)
RECIPE = (
    "Melt the butter, add flour and milk, and stir for ten minutes until the sauce is thick. Season "
    "with nutmeg."
)
NEAR = LICENSE.replace("hereby granted", "hereby granted today")


def survivors(a, texts, threshold=0.8, folder="out", **choices):
    """Content of each file that is kept, by its name."""
    with tempfile.TemporaryDirectory() as top:
        source, out = pathlib.Path(top, "in"), pathlib.Path(top, folder)
        source.mkdir()
        if folder == "out":
            out.mkdir()
        for i, text in enumerate(texts):
            (source / f"{i}.txt").write_bytes(text.encode())
        paths = [source / f"{i}.txt" for i in range(len(texts))]
        parts = {"num_hashes": 100, "num_bands": 20, "ngrams": 3} | choices
        a.run_minhash_deduplication(paths, *parts.values(), threshold, out)
        return [f"{path.name}: {path.read_bytes().decode()}" for path in sorted(out.iterdir())]


def kept(about, texts, numbers, is_free=False, beyond="", **choices):
    """Which files are kept; the copy that is kept is free for the assignment, so only the number is."""
    found = [f"{i}.txt: {texts[i]}" for i in numbers]
    if is_free:
        step.value(about, lambda a: len(survivors(a, texts, **choices)), len(found), contract="minhash")
    else:
        step.value(
            about,
            lambda a: survivors(a, texts, **choices),
            found,
            axes="file",
            **({"beyond": beyond} if beyond else {"contract": "minhash"}),
        )


kept("different documents", [LICENSE, STORY, RECIPE], [0, 1, 2])
kept(
    "a copy with capitals and without commas",
    [LICENSE, STORY, LICENSE.upper().replace(",", "")],
    [0, 1],
    True,
)
kept("a copy with one more word", [STORY, LICENSE, NEAR], [0, 1], True)
kept("documents with half in common", [f"{LICENSE} {STORY}", f"{LICENSE} {RECIPE}"], [0, 1], threshold=0.9)
FIRST = "which copy is kept is free in the assignment; the first one makes a run repeatable"
kept("the first of three copies", [STORY, LICENSE, STORY, STORY], [0, 1], beyond=FIRST)
kept("empty files", ["", "", STORY], [0, 1, 2], beyond="an empty set has nothing in common with another")
kept(
    "a similarity of exactly the threshold",
    ["a b c", "a b d", STORY],
    [0, 2],
    threshold=0.5,
    ngrams=1,
    num_bands=100,
    beyond="the threshold itself is a duplicate: Jaccard similarity of jaccard_threshold or more",
)
kept(
    "a folder that does not exist yet",
    [STORY],
    [0],
    folder="new/out",
    beyond="the first run of a program finds no folder for its output",
)

NORMAL = {
    "To BE": "to be",
    "well-known, (yes)!": "well known yes",
    "Caf\u00e9": "cafe",
    "  a \n\n b\t": "a b",
    "\u0414\u0410": "\u0434\u0430",
}
step.value(
    "normalized texts",
    lambda a: [a.run_normalize_text(text) for text in NORMAL],
    list(NORMAL.values()),
    axes="text",
)
GRAMS = [("a b c d", 2), ("a b c d", 4), ("a b", 3), ("", 3), ("A, b", 1), ("a b a b", 2)]
ROWS = ["a b|b c|c d", "a b c d", "a b", "", "a|b", "a b|b a"]
step.value(
    "n-grams of words",
    lambda a: ["|".join(sorted(a.run_word_ngrams(*pair))) for pair in GRAMS],
    ROWS,
    axes="text",
)
SETS = [
    ({"a", "b", "c"}, {"b", "c", "d", "e"}),
    ({"a"}, {"a"}),
    ({"a"}, {"b"}),
    (set(), set()),
    ({"a", "b", "c"}, {"a"}),
]
step.value(
    "similarities",
    lambda a: [float(a.run_jaccard_similarity(*map(set, pair))) for pair in SETS],
    [0.4, 1.0, 0.0, 0.0, 1 / 3],
    axes="pair",
)
COEFFICIENTS = deduplication.hash_coefficients(6, seed=1)
TEXTS = [set("abc"), set("abcdefgh"), {"to be", "be or", "or not"}, set()]
step.value(
    "signatures",
    lambda a: [
        np.asarray(a.run_minhash_signature(set(each), COEFFICIENTS.copy())).tolist() for each in TEXTS
    ],
    [right.minhash_signature(each, COEFFICIENTS).tolist() for each in TEXTS],
    axes="document hash",
)
BANDS = np.array(
    [[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 5, 6], [1, 8, 3, 6], [1, 2, 9, 9], [3, 4, 0, 0], [1, 2, 3, 4]]
)


def pairs_of(a, bands):
    return [
        "{}-{}".format(*map(int, pair))
        for pair in sorted(map(tuple, a.run_candidate_pairs(BANDS.copy(), bands)))
    ]


def by_hand(bands):
    """All pairs with an equal band, one after the other."""
    width = BANDS.shape[1] // bands
    starts = range(0, BANDS.shape[1], width)
    return [
        f"{i}-{j}"
        for i, j in itertools.combinations(range(len(BANDS)), 2)
        if any((BANDS[i, s : s + width] == BANDS[j, s : s + width]).all() for s in starts)
    ]


for n in (1, 2, 4):
    step.value(
        f"pairs by {n} bands", functools.partial(lambda n, a: pairs_of(a, n), n), by_hand(n), axes="pair"
    )
step.probes.append(
    probes.Probe(
        "three bands of four hashes",
        lambda a: {"result": pairs_of(a, 3)},
        lambda: {"error": "ValueError: 3 bands and 4 hashes"},
        0.0,
        0.0,
    )
)
CHAIN = [(0, 3), (3, 4), (1, 5)]
step.value(
    "groups",
    lambda a: [sorted(map(int, g)) for g in sorted(a.run_connected_groups(6, CHAIN))],
    [[0, 3, 4], [1, 5], [2]],
    axes="group document",
)


def mistake(piece, wrong, name, text):
    wrong.__name__, wrong.__doc__ = name, text
    step.mistake(f"deduplication.{piece}", source="written for this catalogue")(wrong)


def normalized(text, lower=True, marks=True, punctuation=" ", spaces=True):
    text = unicodedata.normalize("NFD" if marks else "NFC", text.lower() if lower else text)
    if punctuation is not None:
        text = "".join(punctuation if unicodedata.category(c)[0] in "PS" else c for c in text)
    text = "".join(c for c in text if unicodedata.category(c)[0] != "M")
    return " ".join(text.split()) if spaces else text


N, W, J, S, C, G, M = (
    "normalize_text word_ngrams jaccard_similarity minhash_signature candidate_pairs connected_groups "
    "minhash_deduplication"
).split()
mistake(
    N,
    lambda text: normalized(text, lower=False),
    "capitals kept",
    "Capital letters stay, so a copy in capitals "
    "has no n-gram in common with its original. Make the text lower case.",
)
mistake(
    N,
    lambda text: normalized(text, marks=False),
    "accents kept",
    "Accents stay. NFD writes an accent as a character of its own; those of category M are then removed.",
)
mistake(
    N,
    lambda text: normalized(text, punctuation=None),
    "punctuation kept",
    "Punctuation stays at its word, so one comma changes every n-gram around it. Replace it.",
)
mistake(
    N,
    lambda text: normalized(text, punctuation=""),
    "words joined",
    "Punctuation is removed without a space, so well-known becomes one word. Put a space in its place.",
)
mistake(
    N,
    lambda text: normalized(text, spaces=False),
    "spaces kept",
    "Rows of spaces and line feeds stay. Layout "
    "is what copies differ in: split, and join with single spaces.",
)
mistake(
    N,
    lambda text: normalized(text).encode("ascii", "ignore").decode(),
    "ascii alone",
    "All letters but a to z are "
    "removed, so every text in Cyrillic or Chinese is empty. Remove categories M, P and S.",
)
mistake(
    W,
    lambda text, n: {
        right.normalize_text(text)[i : i + n] for i in range(len(right.normalize_text(text)) - n + 1)
    },
    "n-grams of characters".replace("-", " "),
    "The rows are characters, not words. Short rows of characters occur "
    "in every text; split the text into words first.",
)
mistake(
    W,
    lambda text, n: {
        " ".join(right.normalize_text(text).split()[i : i + n])
        for i in range(len(right.normalize_text(text).split()) - n)
    },
    "last one missing",
    "The last row is missing: of m words there are m - n + 1 rows of n, not m - n.",
)
mistake(
    W,
    lambda text, n: {
        " ".join(right.normalize_text(text).split()[i : i + n])
        for i in range(len(right.normalize_text(text).split()) - n + 1)
    },
    "short texts empty",
    "A text of fewer than n words has no row, so that short copies are never found. Let all its "
    "words be one row.",
)
mistake(
    W,
    lambda text, n: {
        " ".join(right.normalize_text(text).split()[i : i + n])
        for i in range(0, len(right.normalize_text(text).split()), n)
    },
    "rows side by side",
    "The rows do not overlap, so one word more at the beginning changes all of them. Begin a row at "
    "every word.",
)
mistake(
    W,
    lambda text, n: (
        right.word_ngrams(text.lower(), n)
        if text.islower()
        else {
            " ".join(text.split()[i : i + n])
            for i in range(max(min(1, len(text.split())), len(text.split()) - n + 1))
        }
    ),
    "not normalized",
    "The text is not normalized before it is cut, so capitals and commas make other rows. Call "
    "normalize_text first.",
)
mistake(
    J,
    lambda a, b: len(a & b) / max(1, min(len(a), len(b))),
    "smaller set below",
    "The intersection is divided by "
    "the smaller set: a quotation is then a duplicate of its book. Divide by the union.",
)
mistake(
    J,
    lambda a, b: 2 * len(a & b) / max(1, len(a) + len(b)),
    "dice coefficient",
    "This is the Dice coefficient, "
    "2 |A and B| / (|A| + |B|), which is larger. MinHash estimates |A and B| / |A or B|.",
)
mistake(
    J,
    lambda a, b: len(a & b) / max(1, len(a)),
    "first set below",
    "The intersection is divided by the first set, so the result depends on the order. Divide by the union.",
)
mistake(
    J,
    lambda a, b: len(a & b) / max(1, len(a) + len(b)),
    "common ones twice",
    "The lengths are added, which counts "
    "what both have twice, so equal sets have 0.5. The union is |A| + |B| - |A and B|.",
)
mistake(
    J,
    lambda a, b: len(a & b) / len(a | b),
    "nothing by nothing",
    "Two empty sets divide by zero, so two empty files stop the run. They have nothing in common: 0.",
)


def signature(
    ngrams, coefficients, smallest=min, b=1, prime=deduplication.PRIME, hashed=None, empty=None, same=False
):
    def digest(text):
        found = deduplication.hashlib.blake2b(text.encode(), digest_size=4).digest()
        return int.from_bytes(found, "little") % deduplication.PRIME

    values = [(hashed or digest)(each) for each in ngrams]
    columns = coefficients.T.tolist()
    columns = [columns[0]] * len(columns) if same else columns
    none = deduplication.PRIME if empty is None else empty
    return np.array([smallest(((x * a + b * c) % prime for x in values), default=none) for a, c in columns])


mistake(
    S,
    functools.partial(signature, smallest=max),
    "largest instead",
    "The maximum is taken. It has the same "
    "chance to agree, but signatures of MinHash are minima, and so are all stored ones.",
)
mistake(
    S,
    functools.partial(signature, b=0),
    "b forgotten",
    "b is not added: h(x) = 0 then has hash 0 in each "
    "function, and the functions are not independent. Use (a x + b) mod PRIME.",
)
mistake(
    S,
    functools.partial(signature, prime=2**32),
    "another modulus",
    "The remainder is of 2^32, and an even a then loses bits of x. The modulus must be a prime, PRIME.",
)
mistake(
    S,
    functools.partial(signature, same=True),
    "one function",
    "All values come from the first hash function, so "
    "the signature has no more information than one value. Use each column of the coefficients.",
)
mistake(
    S,
    functools.partial(signature, hashed=lambda text: hash(text) % deduplication.PRIME),
    "hash of python",
    "Python's hash of a text differs from process to process, so signatures of two runs never agree. Use the "
    "first bytes of BLAKE2b.",
)
mistake(
    S,
    functools.partial(signature, empty=0),
    "zero for nothing",
    "The empty set has zeros, which a set may have, too. Begin with PRIME, which no remainder equals.",
)
mistake(
    S,
    functools.partial(
        signature,
        hashed=lambda text: (
            int.from_bytes(deduplication.hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
            % deduplication.PRIME
        ),
    ),
    "big endian",
    "The bytes are read from the most significant one. The piece is little-endian; signatures of "
    "two programs "
    "agree only if both do the same.",
)


def candidates(signatures, num_bands, key=None, is_all=False, is_only_first=False, width=None, shared=False):
    width = width or signatures.shape[1] // num_bands
    bands = [signatures[:, i : i + width] for i in range(0, signatures.shape[1], width)]
    if not (width * num_bands == signatures.shape[1] or is_all):
        raise ValueError("num_bands must divide num_hashes")
    bands = bands[:1] if is_only_first else bands
    found = collections.Counter()
    buckets = collections.defaultdict(list)
    for number, band in enumerate(bands):
        for i, part in enumerate(band):
            buckets[(0 if shared else number, part.tobytes())].append(i)
    for (_, _), documents in buckets.items():
        found.update({(i, j) for i, j in itertools.combinations(sorted(set(documents)), 2)})
    return found


def through_width(signatures, num_bands):
    right.candidate_pairs(signatures, num_bands)
    return right.candidate_pairs(signatures, signatures.shape[1] // num_bands)


def in_all(signatures, num_bands):
    found = candidates(signatures, num_bands)
    return {pair for pair, n_bands in found.items() if n_bands == num_bands}


def with_first(signatures, num_bands):
    right.candidate_pairs(signatures, num_bands)
    found = set()
    for band in np.split(signatures, num_bands, axis=1):
        first = {}
        for i, part in enumerate(band):
            if (low := first.setdefault(part.tobytes(), i)) != i:
                found.add((low, i))
    return found


mistake(
    C,
    in_all,
    "all bands",
    "A pair must agree in all bands, which only copies do. One band is enough: that is "
    "what makes the chance 1 - (1 - J^r)^b.",
)
mistake(
    C,
    lambda s, n: set(candidates(s, n, is_only_first=True)),
    "first band alone",
    "Only the first band is compared, so most near duplicates are missed. Go through all bands.",
)
mistake(
    C,
    lambda s, n: set(candidates(s, n, shared=True)),
    "bands mixed",
    "Bands of different numbers share a bucket, "
    "so the first band of one document meets the second of another. Make the number part of the key.",
)
mistake(
    C,
    through_width,
    "bands of this length",
    "num_bands is taken as the length of a band. There are num_bands "
    "bands of num_hashes / num_bands hashes each.",
)
mistake(
    C,
    with_first,
    "pairs with the first",
    "Only pairs with the first document of a bucket are found. If that one "
    "is below the threshold, the others are never compared: take all combinations.",
)
mistake(
    C,
    lambda s, n: set(candidates(s[:, : s.shape[1] // n * n], n)),
    "rest dropped",
    "Hashes that fill no band are "
    "dropped in silence. Raise ValueError if num_bands does not divide num_hashes.",
)
mistake(
    C,
    lambda s, n: {(j, i) for i, j in right.candidate_pairs(s, n)},
    "larger first",
    "The pairs have the larger "
    "number first. Sort each pair, so that it is found once, as (1, 4) and not as (4, 1).",
)
mistake(
    C,
    lambda s, n: right.candidate_pairs(s, n) | {(i, i) for i in range(len(s))},
    "pairs with itself",
    "Each document is paired with itself, and is then its own duplicate. Take combinations of two.",
)


def unchained(n_documents, pairs):
    group = list(range(n_documents))
    for i, j in pairs:
        group[j] = i
    return [[i for i in range(n_documents) if group[i] == each] for each in sorted(set(group))]


mistake(
    G,
    unchained,
    "chain broken",
    "A document gets the number of its last neighbor, so a chain of near duplicates "
    "falls apart. Follow the numbers to the first document before joining.",
)
mistake(
    G,
    lambda n, pairs: [each for each in right.connected_groups(n, pairs) if len(each) > 1],
    "single ones lost",
    "Documents without a duplicate are in no group, so the whole good part of the data is dropped. "
    "Each document "
    "is in one group.",
)
mistake(
    G,
    lambda n, pairs: right.connected_groups(n, []),
    "nothing joined",
    "The pairs are not used, so that each "
    "document is alone and no copy is dropped. Join the groups of both documents of a pair.",
)


def files(name, text, threshold=lambda t: t, choose=lambda group: group[:1], makes=True, grams=lambda n: n):
    def wrong(input_files, num_hashes, num_bands, ngrams, jaccard_threshold, output_directory):
        out, paths = pathlib.Path(output_directory), [pathlib.Path(path) for path in input_files]
        if makes:
            out.mkdir(parents=True, exist_ok=True)
        texts = [path.read_bytes().decode() for path in paths]
        for group in right.near_duplicates(
            texts, num_hashes, num_bands, grams(ngrams), threshold(jaccard_threshold)
        ):
            for i in choose(group):
                (out / paths[i].name).write_bytes(paths[i].read_bytes())

    mistake(M, wrong, name, text)


files(
    "every copy dropped",
    "None of the copies is kept, and their text is lost. Keep one document of each group.",
    choose=lambda group: group if len(group) == 1 else [],
)
files(
    "last one kept",
    "The last document of each group is kept. Any is allowed, but with the first one a run that "
    "reads more files keeps what it kept before.",
    choose=lambda group: group[-1:],
)
files(
    "threshold left out",
    "Candidates are dropped without comparing them. Bands are chance: compute the Jaccard "
    "similarity of the n-grams, and compare it with the threshold.",
    threshold=lambda t: 0.0,
)
files(
    "above the threshold",
    "A similarity of exactly the threshold is no duplicate here. The threshold belongs to "
    "the duplicates: use >=.",
    threshold=lambda t: t + 1e-9,
)
files(
    "duplicates written",
    "All documents are written, copies as well. Write the first document of each group alone.",
    choose=lambda group: group,
)
files(
    "distinct ones lost",
    "Only documents that have a copy are written. A document that is alone in its group is "
    "what the data is for: write it, too.",
    choose=lambda group: group[:1] if len(group) > 1 else [],
)
files(
    "folder must exist",
    "The output directory is not created, and the program fails where it does not exist yet. "
    "Create it with its parents.",
    makes=False,
)
