"""Encoding and decoding: special tokens, then pieces, then the merges in the order of learning; and back."""

import functools
import re
import unicodedata
from itertools import pairwise, zip_longest

import regex

from llm_basics import swap
from llm_basics.core import bpe
from llm_basics.learn import probes

step = probes.Step("tokenizer")

PUBLIC = "public solutions of CS336"
PASSES = "public solutions of CS336; passes its suite"
OWN = "written for this catalogue"

# as in GPT-2's encoder.py
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
END = "<|end|>"

# the reference class, even if it is replaced
Tokenizer = swap.reference("tokenizer.Tokenizer")


# --------------------------------------------------------------------------------------------------
# The simplest correct implementation


def pairs(*spaced):
    """`pairs("a bc")` is `[(b"a", b"bc")]`; an underscore stands for a space."""
    return [tuple(side.replace("_", " ").encode() for side in pair.split(" ")) for pair in spaced]


def vocabulary(merges, special_tokens=()):
    """Special tokens, the bytes, one token a merge."""
    tokens = [s.encode() for s in special_tokens] + [bytes([b]) for b in range(256)]
    return dict(enumerate(tokens + [left + right for left, right in merges]))


def merge(parts, pair):
    i = 0
    while i + 1 < len(parts):
        if (parts[i], parts[i + 1]) == pair:
            parts[i : i + 2] = [pair[0] + pair[1]]
        i += 1
    return parts


def right_tokens(merges, special_tokens, text):
    """The bytes of the tokens of `text`: all merges are gone through in order for each piece."""
    tokens, i = [], 0
    while i < len(text):
        here = max((s for s in special_tokens or () if text.startswith(s, i)), key=len, default="")
        if here:
            tokens.append(here.encode())
            i += len(here)
            continue
        end = min((k for s in special_tokens or () if (k := text.find(s, i)) >= 0), default=len(text))
        for piece in GPT2.findall(text[i:end]):
            parts = [bytes([byte]) for byte in piece.encode()]
            for pair in merges:
                merge(parts, pair)
            tokens += parts
        i = end
    return tokens


def right_ids(vocab, merges, special_tokens, text):
    ids = {token: id for id, token in vocab.items()}
    return [ids[token] for token in right_tokens(merges, special_tokens, text)]


# --------------------------------------------------------------------------------------------------
# Probes

WORDS = pairs(
    "t h",
    "_ th",
    "i n",
    "th e",
    "_th e",
    "in g",
    "_ s",
    "h i",
    "_s hi",
    "' s",
    "l l",
    "' ll",
    "e r",
    "\n \n",
    "_ _",
)
VOCAB = vocabulary(WORDS, [END])
# ids up to 255 are the bytes
BYTES = vocabulary(WORDS)
# what joins a word and an underscore, a digit and another number
NOT_WORDS = [(b"a", b"_"), (b"_", b"b"), (b"_", b"_"), (b"t", b"_"), (b"_", b"1")]
NOT_DIGITS = [(b"x", b"\xc2"), (b"2", b"\xc2"), (b"\xb2", b"\xc2"), (b"\xa7", b"\xd9")]


def difference(text, vocab, expected, actual):
    """The first token of `text` that differs, by its bytes."""

    def named(id):
        if id is None:
            return "nothing"
        return f"{id}, which is {vocab.get(id, 'not in vocabulary')!r}" if isinstance(id, int) else repr(id)

    if not isinstance(actual, list | tuple):
        return f"the ids must be a list, got a {type(actual).__name__}"
    for i, (wanted, got) in enumerate(zip_longest(expected, actual)):
        if wanted != got:
            x, y = (named(id) for id in (wanted, got))
            return f"token {i} of {text!r} must be {x}; got {y}"
    return "the ids must be integers"


def encodes(about, *rows, **ground):
    """A probe of the ids of texts; a row is vocabulary, merges, special tokens and a text."""
    ground = ground or {"contract": "tokenizer"}

    def ours(adapters):
        return [adapters.get_tokenizer(v.copy(), m[:], s and s[:]).encode(text) for v, m, s, text in rows]

    def words(expected, actual):
        for (vocab, _, _, text), wanted, got in zip(rows, expected, actual, strict=True):
            if wanted != got:
                return difference(text, vocab, wanted, got)
        return "the ids must be integers"

    step.value(about, ours, [right_ids(*row) for row in rows], words=words, **ground)


def text_words(expected, actual):
    for i, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        if wanted != got:
            return f"text {i} must be {wanted!r}, got {got!r}"
    return "the texts must be of type str"


def by(merges, text):
    return vocabulary(merges), merges, None, text


encodes(
    "words are bytes, merged as learned",
    (VOCAB, WORDS, None, "thing"),
    (VOCAB, WORDS, None, "the ship, the thing"),
)
encodes(
    "the merge learned first is applied first",
    by(pairs("b c", "a b", "c d"), "abcd"),
    by(pairs("a b", "b c", "c d"), "abcd"),
    by(pairs("c d", "a b", "b cd", "ab c"), "abcd"),
    by(pairs("x y", "b c", "a bc", "y a"), "xyabc"),
    by(pairs("b c", "a bc", "a b"), "abc"),
)
encodes("only pairs that were learned merge", by(pairs("b c", "a b", "ab c"), "abc"))
encodes(
    "a pair merges at every position, runs from the left",
    by(pairs("a b", "ab c"), "abcabcab"),
    by(pairs("a a", "aa b"), "aaab"),
    by(pairs("a a"), "aaaaa"),
    by(pairs("a a", "aa aa"), "aaaaaaa"),
)
encodes(
    "nothing merges across words, numbers and punctuation",
    by(pairs("n '", "a 1", "b _", "_ _", "e ,", "' T"), "don't a1 b b  c   d e, DON'T"),
    (VOCAB, WORDS, None, "  he's the  they'll\n\n ship\t\tx \r\n"),
)
encodes(
    "text of any script, unchanged",
    (VOCAB, WORDS, None, "The \u00e9 e\u0301 \u6f22 \ufb01 \U0001f643\x00"),
)
encodes(
    "underscores are punctuation, and numbers need not be digits",
    by(NOT_WORDS, "a_b __init__ x_1"),
    by(NOT_DIGITS, "x\u00b2 2\u00b2\u00bd \u2167\u0663"),
)
encodes("digits are one piece, however many", by(pairs("1 2", "3 4", "5 6"), "12345678 1234 x12"))
encodes(
    "the contractions 's 't 're 've 'm 'll 'd, in lower case",
    by(pairs("' s", "' t", "' r", "' v", "' m", "' l", "' d"), "he's don't we're I've I'm they'll you'd"),
    by(pairs("' S", "' T", "' R", "' V", "' M", "' L", "' D"), "HE'S DON'T WE'RE I'VE I'M THEY'LL YOU'D"),
)
encodes("an empty text, and spaces alone", (VOCAB, WORDS, None, ""), (VOCAB, WORDS, None, "   "))

TEXTS = [
    " the ship's  here\n",
    "\u00e9\u6f22 \U0001f643e\u0301",
    "",
]
step.value(
    "decode(encode(text)) == text",
    lambda a: [
        model.decode(model.encode(text)) for model in [a.get_tokenizer(VOCAB, WORDS, None)] for text in TEXTS
    ],
    TEXTS,
    words=text_words,
    contract="tokenizer",
)
# each token ends within a character or starts in one
SPLIT_CHARACTERS = [(b"\xe6", b"\xbc"), (b" ", b"\xc3"), (b"\xa9", b"e"), (b"\x9f", b"\x99")]
step.value(
    "decoding characters whose bytes are in two tokens",
    lambda a: [
        model.decode(model.encode(text))
        for model in [a.get_tokenizer(*by(SPLIT_CHARACTERS, "")[:3])]
        for text in ["\u6f22", " \u00e9e", "\U0001f643"]
    ],
    ["\u6f22", " \u00e9e", "\U0001f643"],
    words=text_words,
    contract="tokenizer",
)
HALVES = [[0xC3], [0xC3, 0x61], [0xFF, 0xFE, 0x62], [0xF0, 0x9F, 0x99, 0x83, 0xE6, 0xBC]]
step.value(
    "an incomplete multi-byte character is decoded to U+FFFD",
    lambda a: [model.decode(ids) for model in [a.get_tokenizer(BYTES, WORDS, None)] for ids in HALVES],
    ["\ufffd", "\ufffda", "\ufffd\ufffdb", "\U0001f643\ufffd"],
    words=text_words,
    contract="decoding",
)

# the ids are unrelated to the order of learning
SHUFFLED = dict(zip(sorted(VOCAB), [VOCAB[id] for id in reversed(VOCAB)], strict=True))
LIKE_PATTERNS = [END, "a.c", "[x]", "a+", "a b"]
BEGIN_TOGETHER = ["<a>", "<a><b>", "<a><b><c>"]

encodes(
    "ids come from the vocabulary, the order from the merges",
    (SHUFFLED, WORDS, None, "the thing is here"),
    (SHUFFLED, WORDS, None, "they'll sing"),
)
encodes(
    "a special token is one id, and text beside it is unchanged",
    (VOCAB, WORDS, [END], f"the{END}{END} ship {END}\n the  {END}"),
    (VOCAB, WORDS, [END], f"t{END}he {END[:-1]} |end|>"),
    contract="special_tokens",
)
step.value(
    "decode(encode(text)) == text, with special tokens",
    lambda a: [
        model.decode(model.encode(text))
        for model in [a.get_tokenizer(VOCAB, WORDS, [END])]
        for text in [f"the{END}{END} ship{END}"]
    ],
    [f"the{END}{END} ship{END}"],
    words=text_words,
    contract="special_tokens",
)
encodes(
    "special tokens that are not passed are text",
    (VOCAB, WORDS, None, f"the{END}thing"),
    contract="special_tokens",
)
LAST = BYTES | {len(BYTES): b"<pad>", len(BYTES) + 1: END.encode()}
CAPITALS = END.upper()
encodes(
    "special tokens at the end of the vocabulary",
    (LAST, WORDS, [END, "<pad>"], f"the{END}ship<pad>{END}"),
    contract="special_tokens",
)
encodes(
    "special tokens in another case are text",
    (VOCAB, WORDS, [END], f"the{CAPITALS}thing{END}"),
    (vocabulary(WORDS, [CAPITALS]), WORDS, [CAPITALS], f"the{END}thing{CAPITALS}"),
    contract="special_tokens",
)
encodes(
    "special tokens are not regular expressions",
    (vocabulary(WORDS, LIKE_PATTERNS), WORDS, LIKE_PATTERNS, "abca.c x[x]xaa+ a bend|"),
    contract="special_tokens",
)
encodes(
    "of special tokens that share a prefix the longest is found",
    (vocabulary(WORDS, BEGIN_TOGETHER), WORDS, BEGIN_TOGETHER, "<a><b><c><a><b>x<a>"),
    contract="special_tokens",
)
encodes(
    "the longest special token is found in any order of their list",
    (vocabulary(WORDS, BEGIN_TOGETHER), WORDS, BEGIN_TOGETHER[::-1], "<a><b><c><a><b>x<a>"),
    contract="special_tokens",
)
encodes(
    "an empty list of special tokens",
    (VOCAB, WORDS, [], f"the ship{END}"),
    beyond="an empty pattern matches everywhere; the public tests pass None where there are none",
)
encodes(
    "an empty list of merges",
    (vocabulary([]), [], None, "the ship"),
    beyond="a tokenizer of bytes has no merges; the public one has 50,000",
)


def added_specials(adapters):
    model = adapters.get_tokenizer(VOCAB.copy(), WORDS[:], ["<pad>", END])
    ids = model.encode(f"<pad>{END}the<pad>")
    return {
        "tokens": len(ids),
        "id of the one in the vocabulary": ids[1],
        "is the new id outside of it": ids[0] not in VOCAB and ids[0] == ids[-1],
        "text": model.decode(ids),
    }


step.value(
    "a special token missing from the vocabulary gets a new id",
    added_specials,
    {
        "tokens": 4,
        "id of the one in the vocabulary": 0,
        "is the new id outside of it": True,
        "text": f"<pad>{END}the<pad>",
    },
    beyond="a chat template adds special tokens to a finished vocabulary; the public tests add them before",
)

# streams
TEXT = f"the ship's here,\n\n  the thing\n{END} they'll\n sing  \n"
SPACED = [END, "<|a b|>"]


def streams(about, texts, special_tokens=(END,), merges=WORDS, **ground):
    """A probe of `encode_iterable`, which must give the ids of the joined texts."""
    special_tokens = list(special_tokens)
    vocab = vocabulary(merges, special_tokens)

    def words(expected, actual):
        return difference(texts, vocab, expected, actual)

    step.value(
        about,
        lambda a: list(a.get_tokenizer(vocab.copy(), merges[:], special_tokens).encode_iterable(texts[:])),
        right_ids(vocab, merges, special_tokens, "".join(texts)),
        words=words,
        **ground,
    )


streams("a stream of one text", [TEXT], contract="streams")
streams(
    "a stream of lines, each with its line end",
    ["the ship's here,\n", "the thing\n", f"{END}\n", "they'll sing\n"],
    contract="streams",
)
streams(
    "a stream of lines gets the ids of the whole text",
    ["the ship\n", "the thing\n", "\n", "\n", " they'll"],
    beyond="white space across two lines is one piece of the whole text; the public text has no such place",
)
streams(
    "a stream with an empty text in it",
    ["the ship\n", "", "the thing\n"],
    beyond="a stream of documents may hold an empty one; the lines of the public file do not",
)
streams(
    "a stream split within words and spaces",
    ["the sh", "ip ", " the", " thi", "ng'", "ll"],
    beyond="text from a network or a decompressor comes in pieces of any length; the public test has lines",
)
streams(
    "a stream split within a special token",
    [f"the{END[:3]}", f"{END[3:]} ship", END, "s"],
    beyond="text from a network or a decompressor comes in pieces of any length; the public test has lines",
)
streams(
    "a stream with a special token that contains a space",
    ["the <|a", " b|> ship <|a ", "b|>"],
    SPACED,
    beyond="text from a network or a decompressor comes in pieces of any length; the public test has lines",
)


class Endless:
    """A stream too large for memory; raises before memory is full."""

    def __iter__(self):
        for _ in range(200):
            yield "the ship\n" * 1000
        raise MemoryError("encode_iterable read 2 million characters before it yielded an id")


step.value(
    "a stream is read only as far as needed",
    lambda a: next(iter(a.get_tokenizer(VOCAB, WORDS, [END]).encode_iterable(iter(Endless())))),
    right_ids(VOCAB, WORDS, None, "the")[0],
    contract="streams",
)


# what belongs to the caller, and to other tokenizers
def handed_in(adapters):
    given = VOCAB.copy(), WORDS[:], ["<pad>", "<pad><pad>"]
    adapters.get_tokenizer(*given).encode("the <pad> ship")
    return [given[0] == VOCAB, given[1] == WORDS, given[2] == ["<pad>", "<pad><pad>"]]


step.value(
    "arguments are not modified",
    handed_in,
    [True, True, True],
    beyond="the caller may make another tokenizer of the same vocabulary",
    words=lambda expected, actual: (
        "it modifies the caller's "
        + " and ".join(
            n for n, ok in zip(("vocabulary", "merges", "special tokens"), actual, strict=True) if not ok
        )
    ),
)


def twice(adapters):
    model = adapters.get_tokenizer(VOCAB, WORDS, [END])
    first = list(model.encode("the ship"))
    model.encode("the ship").append(-1)
    model.encode("the").append(-1)
    return [first, model.encode("the ship")]


step.value(
    "the same text gets the same ids again",
    twice,
    [right_ids(VOCAB, WORDS, None, "the ship")] * 2,
    axes="time token",
    beyond="a cache must not hand out the list that the caller may change",
)


def side_by_side(adapters):
    models = [adapters.get_tokenizer(vocabulary(m) | {257: b"abc"}, m, s) for m, s in NEIGHBORS]
    return [model.encode("xabc abc") for model in models]


NEIGHBORS = [(pairs("a b"), None), (pairs("b c"), None), (pairs("b c"), ["abc"])]
step.value(
    "tokenizers are independent of each other",
    side_by_side,
    [right_ids(vocabulary(m) | {257: b"abc"}, m, s, "xabc abc") for m, s in NEIGHBORS],
    axes="tokenizer token",
    contract="tokenizer",
)


# --------------------------------------------------------------------------------------------------
# Mistakes in applying the merges

PIECE = "tokenizer.Tokenizer"


@step.mistake(PIECE, source=PUBLIC)
class GreedyLongestMatch(Tokenizer):
    """The longest matching token is taken repeatedly from the left. BPE gives other ids: apply the merges in
    the order in which they were learned."""

    def merge_steps(self, piece):
        known, parts = {left + right for left, right in self.merges}, []
        while piece:
            size = next(n for n in range(len(piece), 0, -1) if n == 1 or piece[:n] in known)
            parts.append(piece[:size])
            piece = piece[size:]
        yield parts


@step.mistake(PIECE, source=PUBLIC)
class LeftmostPairFirst(Tokenizer):
    """The leftmost pair that can merge is merged first. The pair that was learned first must come first, at
    any position: take the pair with the lowest rank."""

    def merge_steps(self, piece):
        parts = [bytes([byte]) for byte in piece]
        known = set(self.merges)
        while found := [i for i, pair in enumerate(pairwise(parts)) if pair in known]:
            parts[found[0] : found[0] + 2] = [parts[found[0]] + parts[found[0] + 1]]
        yield parts


def merge_best(piece, rank, choose=min):
    """Merge the pair that `choose` picks by `rank`, until no pair has one."""
    parts = [bytes([byte]) for byte in piece]
    while found := [pair for pair in pairwise(parts) if rank(pair) is not None]:
        merge(parts, choose(found, key=rank))
    return parts


@step.mistake(PIECE, source=OWN)
class LatestMergeFirst(Tokenizer):
    """The pair that was learned last is merged first. Later merges build on earlier ones: take the lowest
    rank, min instead of max."""

    def merge_steps(self, piece):
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        yield merge_best(piece, ranks.get, max)


@step.mistake(PIECE, source=OWN)
class RanksFromIds(Tokenizer):
    """The pair whose token has the lowest id is merged first. The order of the merge list decides; ids can be
    numbered in any way."""

    def merge_steps(self, piece):
        ids = {token: id for id, token in self.vocab.items()}
        ranks = {(left, right): ids[left + right] for left, right in self.merges}
        yield merge_best(piece, ranks.get)


@step.mistake(PIECE, source=OWN)
class AnythingInTheVocabularyMerges(Tokenizer):
    """Two tokens are merged if their joined bytes are in the vocabulary, although this pair was never
    learned: abc may have been made from ab and c, not from a and bc. Look up the pair in the merges."""

    def merge_steps(self, piece):
        ranks = {left + right: rank for rank, (left, right) in enumerate(self.merges)}
        yield merge_best(piece, lambda pair: ranks.get(pair[0] + pair[1]))


@step.mistake(PIECE, source=OWN)
class OnlyOneRound(Tokenizer):
    """The bytes are scanned once, and merged tokens are not merged again, so no token gets longer than two
    bytes. Repeat until no pair of the pre-token is in the merges."""

    def merge_steps(self, piece):
        parts = [bytes([byte]) for byte in piece]
        for pair in self.merges:
            if len(pair[0] + pair[1]) == 2:
                merge(parts, pair)
        yield parts


@step.mistake(PIECE, source=OWN)
class OnlyTheFirstOccurrenceMerged(Tokenizer):
    """Each merge is applied to the first occurrence of its pair only. Merge all occurrences in the pre-token
    before the next merge."""

    def merge_steps(self, piece):
        parts = [bytes([byte]) for byte in piece]
        for pair in self.merges:
            if pair in (found := list(pairwise(parts))):
                i = found.index(pair)
                parts[i : i + 2] = [pair[0] + pair[1]]
        yield parts


@step.mistake(PIECE, source=OWN)
class RunsMergedFromTheRight(Tokenizer):
    """In aaa the last two tokens are merged instead of the first two. Training scans from left to right, and
    encoding must do the same to give the same tokens."""

    def merge_steps(self, piece):
        parts = [bytes([byte]) for byte in piece]
        for pair in self.merges:
            i = len(parts) - 2
            while i >= 0:
                if (parts[i], parts[i + 1]) == pair:
                    parts[i : i + 2] = [pair[0] + pair[1]]
                    i -= 1
                i -= 1
        yield parts


@step.mistake(PIECE, source=OWN)
class MergesWithoutTheLast(Tokenizer):
    """The last merge is never applied, perhaps because a loop over the merges ends one early, or a rank is
    compared with < to the highest one. Its token is then never used."""

    def merge_steps(self, piece):
        ranks = {pair: rank for rank, pair in enumerate(self.merges[:-1])}
        yield merge_best(piece, ranks.get)


@step.mistake(PIECE, source=OWN)
class FirstMergeNeverApplied(Tokenizer):
    """The first merge is never applied: its rank is 0, which is false in `if ranks.get(pair)`. Compare with
    `is not None`, or use `in`."""

    def merge_steps(self, piece):
        ranks = {pair: rank for rank, pair in enumerate(self.merges) if rank}
        yield merge_best(piece, ranks.get)


@step.mistake(PIECE, source=OWN)
class IdsCountedFromTheBytes(Tokenizer):
    """The id of a byte is assumed to be its value, and that of a merge 256 plus its rank, without the
    vocabulary. If special tokens come first, every id is wrong; look up the bytes."""

    def encode_bytes(self, content):
        ids = {bytes([b]): b for b in range(256)}
        ids |= {left + right: 256 + rank for rank, (left, right) in enumerate(self.merges)}
        return [ids[self.vocab[id]] for id in super().encode_bytes(content)]


# --------------------------------------------------------------------------------------------------
# Mistakes in cutting the text


@step.mistake(PIECE, source=PUBLIC)
class NoPretokenization(Tokenizer):
    """The merges are applied to the whole text instead of each pre-token, so tokens cross word boundaries,
    which never happens in training. Split with the pre-tokenization pattern first."""

    def encode_bytes(self, content):
        *_, parts = self.merge_steps(content)
        return [self._ids[part] for part in parts]


@step.mistake(PIECE, source=OWN)
class SplitOnWhiteSpace(Tokenizer):
    """The text is split with split(), which discards white space, so decoding gives words without spaces. Use
    the pre-tokenization pattern, which keeps every character."""

    def encode_bytes(self, content):
        return [
            id
            for word in content.decode().split()
            for id in super(SplitOnWhiteSpace, self).encode_bytes(word.encode())
        ]


@step.mistake(PIECE, source=OWN)
class SpacePutInFront(Tokenizer):
    """A space is added before the text, so that the first word is encoded like the others. GPT-2's tokenizer
    does not add one, and decoding gives a text with one space too many."""

    def encode(self, text):
        return super().encode(" " + text)


@step.mistake(PIECE, source=OWN)
class TextStripped(Tokenizer):
    """White space at both ends of the text is stripped before encoding. Every character must be restored by
    decoding; encode the text as it is."""

    def encode(self, text):
        return super().encode(text.strip())


@step.mistake(PIECE, source=OWN)
class TextNormalized(Tokenizer):
    """The text is converted to a Unicode normal form first, which replaces ligatures and combining accents by
    other characters. A byte-level tokenizer never changes the text."""

    def encode(self, text):
        return super().encode(unicodedata.normalize("NFKC", text))


@step.mistake(PIECE, source=OWN)
class TextInLowerCase(Tokenizer):
    """The text is lowercased first, and decoding cannot restore the capitals. A byte-level tokenizer never
    changes the text."""

    def encode(self, text):
        return super().encode(text.lower())


@step.mistake(PIECE, source=OWN)
class CharactersForBytes(Tokenizer):
    """Each character is converted to a byte with ord(c), which is right for ASCII only. Encode the text as
    UTF-8, and iterate over its bytes."""

    def encode_ordinary(self, text):
        return self.encode_bytes(text.encode("latin-1"))


class CutBy(Tokenizer):
    """It splits with a `wrong` pattern."""

    def encode_bytes(self, content):
        return [id for piece in self.wrong.findall(content.decode()) for id in self._cached_merges(piece)]


@step.mistake(PIECE, source=PUBLIC)
class UnderscoresLost(CutBy):
    r"""Letters are [^\W\d_] and punctuation is [^\s\w], often because the module re has no \p{L}. The
    underscore is neither, so findall skips it, and code loses every "_". Use the regex module with \p{L} and
    \p{N}, whose pattern leaves nothing out."""

    wrong = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+")


@step.mistake(PIECE, source=OWN)
class WordsByBackslashW(CutBy):
    r"""Words are \w+, which matches letters, digits and the underscore, so a1 and b_c stay whole. GPT-2
    separates letters, numbers and punctuation: \p{L} and \p{N} of the regex module."""

    wrong = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?\w+| ?[^\s\w]+|\s+(?!\S)|\s+")


@step.mistake(PIECE, source=OWN)
class LettersOfAsciiOnly(CutBy):
    r"""Letters are [A-Za-z] and digits [0-9], often because the module re has no \p{L}. Words with accents
    and other scripts then count as punctuation. Use the regex module instead of re."""

    wrong = re.compile(
        r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    )


@step.mistake(PIECE, source=OWN)
class NumbersOfDigitsOnly(CutBy):
    r"""Numbers are \d+, which are decimal digits, so superscripts, fractions and Roman numerals count as
    punctuation. GPT-2's pattern has \p{N}, all numbers of Unicode."""

    wrong = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\d+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+")


@step.mistake(PIECE, source=OWN)
class DigitsInGroupsOfThree(CutBy):
    r"""Numbers are split after three digits, as in GPT-4's pattern (\p{N}{1,3}). GPT-2's keeps all digits of
    a number together, \p{N}+, and the merges were learned with it."""

    wrong = regex.compile(GPT2.pattern.replace(r"\p{N}+|", r"\p{N}{1,3}|"))


@step.mistake(PIECE, source=OWN)
class DigitsOneByOne(CutBy):
    r"""Each digit is a pre-token of its own, as in Llama 2. GPT-2's pattern keeps all digits of a number
    together, \p{N}+, and the merges were learned with it."""

    wrong = regex.compile(GPT2.pattern.replace(r"\p{N}+|", r"\p{N}|"))


@step.mistake(PIECE, source=OWN)
class NoContractions(CutBy):
    """The contractions 's 't 're 've 'm 'll 'd at the start of the pattern are missing, so the apostrophe and
    the letters after it become two pre-tokens that can never merge."""

    wrong = regex.compile(GPT2.pattern.split("'d|")[1])


@step.mistake(PIECE, source=OWN)
class TwoContractionsOnly(CutBy):
    """Of the contractions only 's and 't are in the pattern. GPT-2's has seven: 's 't 're 've 'm 'll 'd; for
    the others the apostrophe and the letters become two pre-tokens that can never merge."""

    wrong = regex.compile("'s|'t|" + GPT2.pattern.split("'d|")[1])


@step.mistake(PIECE, source=OWN)
class ContractionsInCapitalsToo(CutBy):
    """Contractions also match in capitals, as in DON'T. GPT-2's pattern matches lowercase contractions only,
    and another pattern gives other tokens. Do not use IGNORECASE."""

    wrong = regex.compile("(?i)" + GPT2.pattern)


@step.mistake(PIECE, source=OWN)
class SpacesApartFromWords(CutBy):
    """Spaces are pre-tokens of their own instead of the start of the following word, so no token with a
    leading space is ever used. In GPT-2's pattern words, numbers and punctuation start with an optional
    space."""

    wrong = regex.compile(GPT2.pattern.replace(" ?", ""))


@step.mistake(PIECE, source=OWN)
class NoLookaheadAtWhiteSpace(CutBy):
    r"""The part \s+(?!\S) of the pattern is missing, so of several spaces the last one does not go to the
    following word. That word lacks its leading space and gets different tokens."""

    wrong = regex.compile(GPT2.pattern.replace(r"\s+(?!\S)|", ""))


# --------------------------------------------------------------------------------------------------
# Mistakes with special tokens


@step.mistake(PIECE, source=PUBLIC)
class NoSpecialTokensFail(Tokenizer):
    """The constructor fails for special_tokens=None, its default: None cannot be iterated or sorted. Use
    `special_tokens or []`."""

    def __init__(self, vocab, merges, special_tokens=None, pattern=bpe.SPLIT_PATTERN):
        super().__init__(vocab, merges, sorted(special_tokens, key=len), pattern)


@step.mistake(PIECE, source=OWN)
class SpecialIdsByPosition(Tokenizer):
    """The id of a special token is its position in the list, as if they came first in every vocabulary. In
    GPT-2's <|endoftext|> is the last. Look up its bytes in the vocabulary."""

    def __init__(self, vocab, merges, special_tokens=None, pattern=bpe.SPLIT_PATTERN):
        super().__init__(vocab, merges, special_tokens, pattern)
        self._special_ids = {special: i for i, special in enumerate(self.special_tokens)}


@step.mistake(PIECE, source=OWN)
class SpecialsInAnyCase(Tokenizer):
    """Special tokens are also found in another case: the pattern ignores case, or the text is lowercased for
    the search. Only the exact text is the special token."""

    def encode(self, text):
        for special in self.special_tokens:
            text = regex.sub(regex.escape(special), lambda _, s=special: s, text, flags=regex.IGNORECASE)
        return super().encode(text)


def encode_between(model, pattern, text, keep=True, part=lambda text: text):
    """The ids of the text, in which `pattern` finds the special tokens."""
    ids, end = [], 0
    for match in regex.finditer(pattern, text) if pattern else []:
        ids += model.encode_ordinary(part(text[end : match.start()]))
        if keep:
            ids.append(model._special_ids[match.group()])
        end = match.end()
    return ids + model.encode_ordinary(part(text[end:]))


def longest_first(model):
    return sorted(model.special_tokens, key=len, reverse=True)


def escaped(specials):
    return "|".join(map(regex.escape, specials))


@step.mistake(PIECE, source=OWN)
class SpecialsAsText(Tokenizer):
    """Special tokens are encoded like ordinary text, so the end of a document becomes several tokens instead
    of the one that the model knows. Split the text at special tokens first, and append their ids."""

    def encode(self, text):
        return self.encode_ordinary(text)


@step.mistake(PIECE, source=OWN)
class SpecialsDropped(Tokenizer):
    """The text is split at special tokens, but their ids are never appended. Split with a capturing group, or
    use finditer, which returns them too."""

    def encode(self, text):
        return encode_between(self, escaped(longest_first(self)), text, keep=False)


@step.mistake(PIECE, source=PUBLIC)
class SpecialsNotSortedByLength(Tokenizer):
    """Of two special tokens that share a prefix, the one listed first matches, even inside the longer one.
    Sort them by length, longest first, before joining them with |."""

    def encode(self, text):
        return encode_between(self, escaped(self.special_tokens), text)


@step.mistake(PIECE, source=PUBLIC)
class SpecialsNotEscaped(Tokenizer):
    """Special tokens are put into a regular expression unescaped, where the | of <|endoftext|> means "or" and
    a dot matches anything. Apply regex.escape to each."""

    def encode(self, text):
        return encode_between(self, "|".join(longest_first(self)), text)


@step.mistake(PIECE, source=OWN)
class NeighborsOfSpecialsStripped(Tokenizer):
    """White space around a special token is stripped. It is part of the text, and decoding must restore
    it."""

    def encode(self, text):
        if not self.special_tokens:
            return super().encode(text)
        return encode_between(self, escaped(longest_first(self)), text, part=str.strip)


@step.mistake(PIECE, source=OWN)
class SpecialsFoundOnlyOnce(Tokenizer):
    """Only the first occurrence of each special token is found, and later ones are encoded as ordinary text,
    as with partition or split(special, 1). Find all of them."""

    def encode(self, text):
        ids = []
        for special in longest_first(self):
            before, found, text = text.partition(special) if special in text else ("", "", text)
            ids += self.encode_ordinary(before) + [self._special_ids[found]] * bool(found)
        return ids + self.encode_ordinary(text)


@step.mistake(PIECE, source=OWN)
class EndAddedToEveryText(Tokenizer):
    """The first special token is appended to every text. Encoding must not add tokens, or decoding does not
    restore the text; the caller adds them between documents."""

    def encode(self, text):
        return super().encode(text) + [self._special_ids[special] for special in self.special_tokens[:1]]


@step.mistake(PIECE, source=OWN)
class SpecialsNeverAdded(Tokenizer):
    """A special token that is not in the vocabulary gets no id, so encoding it fails. Assign the next free id
    to each of them in the constructor."""

    def __init__(self, vocab, merges, special_tokens=None, pattern=bpe.SPLIT_PATTERN):
        super().__init__(vocab, merges, special_tokens, pattern)
        self._special_ids = {s: id for s, id in self._special_ids.items() if id in vocab}


@step.mistake(PIECE, source=OWN)
class SpecialsAddedAgain(Tokenizer):
    """Every special token gets a new id, even if it is already in the vocabulary, so it is not the id that
    the model was trained with. Add only those that are missing."""

    def __init__(self, vocab, merges, special_tokens=None, pattern=bpe.SPLIT_PATTERN):
        super().__init__(vocab, merges, special_tokens, pattern)
        for special in self.special_tokens:
            if self._special_ids[special] in vocab:
                self._special_ids[special] = len(self.vocab)
                self.vocab[len(self.vocab)] = special.encode()


# --------------------------------------------------------------------------------------------------
# Mistakes in decoding


@step.mistake(PIECE, source=PUBLIC)
class DecodedTokenByToken(Tokenizer):
    """Each token is decoded separately, so a character whose bytes are split between two tokens becomes two
    U+FFFD. Join the bytes of all tokens first, then decode once."""

    def decode(self, ids):
        return "".join(self.decode_bytes([id]).decode("utf-8", errors="replace") for id in ids)


@step.mistake(PIECE, source=OWN)
class LongTokensDecodedAlone(Tokenizer):
    """Single bytes are joined before decoding, but a token of several bytes is decoded by itself, although it
    may end or start within a character. Join the bytes of all tokens first, then decode once."""

    def decode(self, ids):
        text, waiting = "", b""
        for token in [self.vocab[id] for id in ids]:
            if len(token) == 1:
                waiting += token
                continue
            text += waiting.decode("utf-8", errors="replace") + token.decode("utf-8", errors="replace")
            waiting = b""
        return text + waiting.decode("utf-8", errors="replace")


@step.mistake(PIECE, source=OWN)
class IdsDecodedAsBytes(Tokenizer):
    """An id below 256 is decoded as the byte with this number. Ids can be numbered in any way, and special
    tokens often come first; look up the bytes of every id in the vocabulary."""

    def decode(self, ids):
        tokens = [bytes([id]) if id < 256 else self.vocab[id] for id in ids]
        return b"".join(tokens).decode("utf-8", errors="replace")


@step.mistake(PIECE, source=OWN)
class BrokenCharactersLeftOut(Tokenizer):
    """Bytes that are not valid UTF-8 are silently dropped by errors="ignore". A model can generate them:
    errors="replace" shows them as U+FFFD."""

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="ignore")


@step.mistake(PIECE, source=OWN)
class BrokenCharactersFail(Tokenizer):
    """Decoding raises an error if the bytes are not valid UTF-8. A model can generate them, and any sequence
    of ids must be decodable: use errors="replace"."""

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8")


@step.mistake(PIECE, source=OWN)
class DecodedByteByByte(Tokenizer):
    """Each byte is converted to the character with its number, which is right for ASCII only. The bytes of
    all tokens together are UTF-8; decode them as such."""

    def decode(self, ids):
        return self.decode_bytes(ids).decode("latin-1")


@step.mistake(PIECE, source=OWN)
class SpacesPutBetweenTokens(Tokenizer):
    """Decoding joins tokens with a space. The spaces of the text are part of the tokens; join the bytes
    without a separator."""

    def decode(self, ids):
        return b" ".join(self.vocab[id] for id in ids).decode("utf-8", errors="replace")


@step.mistake(PIECE, source=OWN)
class DecodedTextStripped(Tokenizer):
    """White space at both ends of the decoded text is stripped, so the text is not restored, and texts
    decoded in parts lose their spaces. Return it as it is."""

    def decode(self, ids):
        return super().decode(ids).strip()


@step.mistake(PIECE, source=OWN)
class SpecialsLeftOutWhenDecoding(Tokenizer):
    """Decoding skips special tokens, so the text is not restored. A caller that does not want them removes
    their ids first."""

    def decode(self, ids):
        return super().decode([id for id in ids if id not in self._special_ids.values()])


# --------------------------------------------------------------------------------------------------
# Mistakes with streams


@step.mistake(PIECE, source=PUBLIC)
class StreamEncodedPartByPart(Tokenizer):
    """Each text of the stream is encoded separately, but a token may begin in one and end in the next: blank
    lines, long words, special tokens. Buffer the end until a certain boundary is found."""

    def encode_iterable(self, texts):
        for text in texts:
            yield from self.encode(text)


@step.mistake(PIECE, source=PUBLIC)
class StreamOfStrippedLines(Tokenizer):
    r"""The line end of each text in the stream is stripped, so its token is missing. Iterating over a file
    yields lines with their \n, which is part of the text."""

    def encode_iterable(self, texts):
        return super().encode_iterable(text.rstrip("\n") for text in texts)


@step.mistake(PIECE, source=OWN)
class StreamWithLineEndsAdded(Tokenizer):
    r"""The texts of the stream are joined with an additional \n. They follow each other directly; iterating
    over a file yields lines with their line ends."""

    def encode_iterable(self, texts):
        return super().encode_iterable("\n" * (i > 0) + text for i, text in enumerate(texts))


@step.mistake(PIECE, source=PASSES)
class StreamReadAtOnce(Tokenizer):
    """The whole stream is joined into one text before encoding, so memory grows with the file. Encode what is
    certainly complete, yield its ids, and read on."""

    def encode_iterable(self, texts):
        return iter(self.encode("".join(texts)))


def stream_by(model, texts, find_cut):
    """Encode up to where `find_cut` cuts, and keep the rest for later."""
    waiting = ""
    for text in texts:
        waiting += text
        cut = find_cut(waiting)
        yield from model.encode(waiting[:cut])
        waiting = waiting[cut:]
    yield from model.encode(waiting)


@step.mistake(PIECE, source=OWN)
class StreamCutBehindSpaces(Tokenizer):
    """The stream is split after its last white space, which separates the next word from its leading space.
    Split before the space: a token ends there whatever follows."""

    def encode_iterable(self, texts):
        return stream_by(self, texts, lambda text: max(map(text.rfind, " \t\n")) + 1)


@step.mistake(PIECE, source=OWN)
class SpecialsCutInTheStream(Tokenizer):
    """The stream is split before a space, which is right between words, but breaks a special token that
    contains a space. Buffer what may be the beginning of one."""

    def encode_iterable(self, texts):
        border = regex.compile(r"(?r)(?<=\S)(?=\s)")
        return stream_by(self, texts, lambda text: match.start() if (match := border.search(text)) else 0)


@step.mistake(PIECE, source=OWN)
class EndOfStreamForgotten(Tokenizer):
    """The buffer left at the end of the stream is never encoded, so the last word is missing. Encode the rest
    after the loop."""

    def encode_iterable(self, texts):
        waiting = ""
        for text in texts:
            *words, waiting = regex.split(r"(?<=\S)(?=\s)", waiting + text)
            yield from self.encode("".join(words))


@step.mistake(PIECE, source=OWN)
class StreamEndsAtAnEmptyText(Tokenizer):
    """An empty text in the stream is treated as its end, as with read(), and the rest is never encoded. The
    stream ends when the iterator does."""

    def encode_iterable(self, texts):
        return super().encode_iterable(iter(functools.partial(next, iter(texts), ""), ""))


@step.mistake(PIECE, source=OWN)
class StreamOfLists(Tokenizer):
    """A list of ids is yielded for each text instead of one id at a time. Use `yield from`, or yield each id
    in a loop."""

    def encode_iterable(self, texts):
        for text in texts:
            yield self.encode(text)


# --------------------------------------------------------------------------------------------------
# Mistakes in what is kept


@step.mistake(PIECE, source=PUBLIC)
class CacheOfAllTokenizers(Tokenizer):
    """The cache of pre-tokens is a class attribute, so a second tokenizer returns the ids of the first.
    Create it in __init__, one per tokenizer."""

    cache = {}

    def encode_ordinary(self, text):
        for piece in GPT2.findall(text):
            if piece not in self.cache:
                self.cache[piece] = super().encode_ordinary(piece)
        return [id for piece in GPT2.findall(text) for id in self.cache[piece]]


@step.mistake(PIECE, source=OWN)
class CachedListGivenAway(Tokenizer):
    """A list from the cache is returned itself, and if the caller appends to it, the same text gets other ids
    the next time. Return a new list, or cache tuples."""

    def encode(self, text):
        self.cache = getattr(self, "cache", {})
        return self.cache.setdefault(text, super().encode(text))


@step.mistake(PIECE, source=OWN)
class VocabularyOfTheCallerChanged(Tokenizer):
    """New special tokens are written into the caller's dict, so other tokenizers that share it get them too.
    Work on a copy: dict(vocab)."""

    def __init__(self, vocab, merges, special_tokens=None, pattern=bpe.SPLIT_PATTERN):
        super().__init__(vocab, merges, special_tokens, pattern)
        vocab.update(self.vocab)


@step.mistake(PIECE, source=OWN)
class SpecialsOfTheCallerSorted(Tokenizer):
    """The caller's list of special tokens is sorted in place, so code that numbers them by position gets
    other numbers. Use sorted(), which makes a new list."""

    def __init__(self, vocab, merges, special_tokens=None, pattern=bpe.SPLIT_PATTERN):
        super().__init__(vocab, merges, special_tokens, pattern)
        if special_tokens:
            special_tokens.sort(key=len, reverse=True)
