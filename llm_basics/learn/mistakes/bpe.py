"""BPE training: split the text, count the pre-tokens, merge the most frequent pair, count again."""

import functools
import re
import tempfile
import zlib
from collections import Counter
from itertools import pairwise, zip_longest
from pathlib import Path

import regex

from llm_basics.core import bpe
from llm_basics.learn import probes

step = probes.Step("bpe")

PUBLIC = "public solutions of CS336"
PASSES = "public solutions of CS336; passes its suite"
OWN = "written for this catalogue"

# as in GPT-2's encoder.py
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END = "<|end|>"


# --------------------------------------------------------------------------------------------------
# The simplest correct implementation


def segments(text, special_tokens):
    """The text between special tokens, which are searched at each position."""
    found, start, i = [], 0, 0
    while i < len(text):
        here = max((s for s in special_tokens if text.startswith(s, i)), key=len, default="")
        if here:
            found.append(text[start:i])
            start = i + len(here)
        i += len(here) or 1
    return [*found, text[start:]]


def pieces(text, special_tokens=()):
    return [piece for part in segments(text, special_tokens) for piece in regex.findall(GPT2, part)]


def count_pairs(words):
    counts = Counter()
    for word, frequency in words.items():
        for pair in pairwise(word):
            counts[pair] += frequency
    return counts


def greatest(counts):
    return max(counts, key=lambda pair: (counts[pair], pair))


def merge_word(word, pair):
    merged, rest = [], list(word)
    while rest:
        size = 2 if tuple(rest[:2]) == pair else 1
        merged.append(b"".join(rest[:size]))
        del rest[:size]
    return tuple(merged)


def as_bytes(word):
    return tuple(bytes([byte]) for byte in word)


def start(special_tokens):
    """The vocabulary before the first merge."""
    return dict(enumerate([s.encode() for s in special_tokens] + [bytes([b]) for b in range(256)]))


def learn(pretokens, n_merges, count=count_pairs, choose=greatest, merge=merge_word, cut=as_bytes):
    """The merges, all pairs being counted anew for each."""
    words = {cut(word): frequency for word, frequency in pretokens.items()}
    merges = []
    while len(merges) < n_merges and (counts := count(words)):
        merges.append(choose(counts))
        words = {merge(word, merges[-1]): frequency for word, frequency in words.items()}
    return merges


def finish(special_tokens, merges):
    """What training returns."""
    return start(special_tokens) | {
        256 + len(special_tokens) + i: a + b for i, (a, b) in enumerate(merges)
    }, merges


def learn_all(pretokens, vocab_size, special_tokens, **wrong):
    return finish(special_tokens, learn(pretokens, vocab_size - 256 - len(special_tokens), **wrong))


# --------------------------------------------------------------------------------------------------
# Probes


def lines(**frequencies):
    """Each word repeated by its frequency, on separate lines, so that no word has a neighbor."""
    return "".join(f"{word}\n" * frequency for word, frequency in frequencies.items())


@functools.cache
def folder():
    """It is removed when the program ends."""
    return tempfile.TemporaryDirectory(prefix="catalogue_bpe_")


@functools.cache
def file_of(text):
    path = Path(folder().name) / f"{zlib.crc32(text.encode())}.txt"
    path.write_bytes(text.encode())
    return path


# the public tests always pass a special token
def train(adapters, text, n_merges, special_tokens=(END,)):
    vocab_size = 256 + len(special_tokens) + n_merges
    return adapters.run_train_bpe(file_of(text), vocab_size, list(special_tokens))


def right_merges(text, n_merges, special_tokens=(END,)):
    return learn(Counter(piece.encode() for piece in pieces(text, special_tokens)), n_merges)


def show(merge):
    return " + ".join(map(repr, merge)) if isinstance(merge, tuple | list) else repr(merge)


def short(text):
    words = Counter(text.splitlines())
    if text.endswith("\n") and "".join(words).isalpha():
        return ", ".join(f"{frequency} {word}" for word, frequency in words.items())
    period = (text + text).find(text, 1)
    return f"{text[:period]!r} * {len(text) // period}" if 0 < period < len(text) else repr(text)


def merge_words(rows):
    """The first merge that differs, of the texts `rows`."""

    def words(expected, actual):
        for (text, *_), right, found in zip(rows, expected, actual, strict=True):
            if not isinstance(found, list | tuple):
                return f"the merges must be a list of pairs of bytes, got a {type(found).__name__}"
            i = next((i for i, (x, y) in enumerate(zip(right, found, strict=False)) if x != y), len(right))
            if len(found) < len(right) and right[: len(found)] == list(found):
                return f"training on {short(text)}, it stops after {len(found)} merges of {len(right)}"
            if i < len(right):
                return f"training on {short(text)}, merge {i} must be {show(right[i])}, got {show(found[i])}"
            if i < len(found):
                return f"training on {short(text)}, it must stop after {i} merges, but adds {show(found[i])}"
        return "the merges must be pairs of bytes"

    return words


def merges_of(about, *rows, ends=False, **ground):
    """A probe of the merges of some texts; a row is a text, a number of merges, and special tokens.

    Unless the text `ends` first, they are no more than it has: what to do without a pair is not promised.
    """
    ground = ground or {"contract": "train_bpe"}
    if not ends:
        rows = [(text, len(right_merges(text, *more)), *more[1:]) for text, *more in rows]
    step.value(
        about,
        lambda a: [train(a, *row)[1] for row in rows],
        [right_merges(*row) for row in rows],
        axes="text merge",
        words=merge_words(rows),
        **ground,
    )


def pieces_of(about, *rows):
    """A probe of the pieces into which texts are cut; a row is a text and special tokens."""

    def words(expected, actual):
        for (text, _), right, found in zip(rows, expected, actual, strict=True):
            for i, (x, y) in enumerate(zip_longest(right, found)):
                if x != y:
                    wanted, got = (f"{z!r}" if z is not None else "none" for z in (x, y))
                    return f"pre-token {i} of {short(text)} must be {wanted}, got {got}"
        return "pre-tokens must be strings"

    step.value(
        about,
        lambda a: [list(a.run_pretokenize(text, list(specials))) for text, specials in rows],
        [pieces(text, specials) for text, specials in rows],
        words=words,
    )


# up to "equally frequent" no two pairs are ever equally frequent
merges_of("the most frequent pair is merged, repeatedly", (lines(low=31, lot=13, net=59, new=5), 5))

pieces_of(
    "words with their space, numbers and punctuation are separate", ("The cat, 12 mice: a1 b_c x-10 =", [])
)
pieces_of("contractions are split off, in lower case only", ("I'm we've they'll it's DON'T o'clock", []))
pieces_of("the last space of a run belongs to the next word", ("  a  b\n\nc \n d\t\te \r\n\r\nf   ", []))
pieces_of("letters and digits of all scripts", ("na\u00efve \u6f22\u5b57 \u0663x\u00b2 \u2167 \u00c5", []))
pieces_of(
    "numbers of any length are whole, and underscores are punctuation",
    ("12345678 12.5 __init__ a_b1 2\u00b2\u00bd", []),
)
pieces_of(
    "special tokens are removed, and text on their two sides is not joined",
    (f"ab{END}cd {END}\n ef{END}{END}  g", [END]),
)
pieces_of("all of several special tokens are removed", ("one<|a|>two<|b|>one", ["<|a|>", "<|b|>"]))
pieces_of(
    "special tokens are not regular expressions", ("a.cabc[x]x a+aa <|end|>|end", ["a.c", "[x]", "a+", END])
)
pieces_of(
    "of special tokens that share a prefix the longest is found",
    ("x<a><b>y<a>z<b>", ["<a>", "<a><b>"]),
)
pieces_of(
    "the longest special token is found in any order of their list", ("x<a><b>y<a>z<b>", ["<a><b>", "<a>"])
)

merges_of("words are weighted by frequency", (lines(abc=1, abd=1, abe=1, abf=1, xy=5), 2))
merges_of("pairs count at every position of a word", (lines(abab=3, cabcab=2, zz=8), 3))
merges_of("pairs that occur once are merged too", (lines(ab=3, cd=1), 2))
merges_of(
    "training ends when no pair is left",
    (lines(ab=3, abc=2), 50, []),
    ("", 5, []),
    ("a", 5, [END]),
    ends=True,
    beyond="a short text has fewer pairs than the vocabulary has room for; the public texts have more",
)
merges_of("runs such as aaa contain two pairs", (lines(aaa=3, xy=5), 3))
merges_of("runs such as aaaa merge from the left", *((f"{run}\n{run}\n", 9) for run in ("aaa", "aaaa")))
merges_of("only whole tokens merge, not their ends", (lines(xb=20, xbc=2, bc=9), 3))
merges_of(
    "a merge lowers the counts of the pairs that it breaks",
    (lines(abc=9, bc=9, ab=1, xy=5), 4),
    (lines(abc=9, ab=9, bc=1, xy=5), 4),
    (lines(abcd=9, abc=1, bc=1, cd=1, xy=8), 5),
)
merges_of("words are bytes, not characters", (lines(**{"\u00e9": 5, "\u00e8": 3}), 2))
merges_of(
    "ties: the greater pair of byte strings goes first",
    (lines(ab=2, mn=2, zy=2, cd=2), 4),
    contract="ties",
)
merges_of(
    "ties: the left sides are compared first, and length is irrelevant",
    (lines(az=2, ba=2), 2),
    (lines(zx=3, zxa=2, bc=2), 3),
    (lines(ab=3, abc=2, zx=2), 3),
    contract="ties",
)
merges_of(
    "ties of longer tokens: bytes decide, not ids, length or join",
    (lines(bd=9, ab=4, abd=2, abc=2), 4),
    (lines(cd=9, ce=8, acd=2, ace=2), 4),
    (lines(ab=3, aba=2, aca=2), 4),
    contract="ties",
)
merges_of(
    "ties: the space and bytes above 127 compare as unsigned bytes",
    ("x a a zz zz\n", 3),
    ("\u00e9\n\u00e9\nzz\nzz\n", 2),
    ("\u00e9t\u00e9 \u6f22\u5b57\u6f22\n" * 3, 9),
    contract="ties",
)
merges_of(
    "longer and mixed runs merge from the left too, at every position",
    *((f"{run}\n{run}\n", 9) for run in ("aaaaaaa", "baaab", "ababa", "aabaaab")),
    (lines(abab=3, cabcab=2, zz=8), 9),
)
merges_of(
    "words, numbers, punctuation and white space never merge", ("don't a12 b_c,  DON'T\n\n\nx " * 5, 40)
)
merges_of(
    "underscores, long numbers and all contractions",
    ("__init__ a_b1 12345678 2\u00b2\u00bd we're I've I'm they'll you'd he's don't\n" * 5, 60),
)
merges_of(
    "line ends are learned as they are in the file",
    ("a\r\n\r\nb\r\n\r\n\r\n" * 5 + "c\n\n\nd\n", 9),
    beyond="a file read in text mode loses \\r; the files of the public tests have none",
)
merges_of(
    "special tokens are neither learned nor merged across",
    (f"{END}ab{END}cd{END} " * 5, 20, [END]),
    (f"ab {END}\ncd{END}\n\nab" * 4, 20, [END]),
    (f"ab\n\n\n{END}" * 5, 20, [END]),
    contract="split",
)
merges_of(
    "text is split at each of several special tokens",
    ("one<|a|>two<|b|>one" * 4, 20, ["<|a|>", "<|b|>"]),
    contract="split",
)
merges_of(
    "special tokens may look like regular expressions",
    ("a.cabcabca[x]xxa.c" * 5, 20, ["a.c", "[x]"]),
    contract="split",
)
merges_of(
    "special tokens may share a prefix",
    ("<a>yzxw<a>" * 5, 20, ["<a>", "<a>yz"]),
    beyond="the longest wins, as in encoding, where the public tests check it",
)
merges_of(
    "no special tokens",
    (lines(low=31, lot=13, net=59, new=5), 5, []),
    beyond="an empty pattern matches everywhere; the public tests always pass a special token",
)
merges_of(
    "a file of several documents",
    (END.join(["low low low lower", "new new newest low", "wide wider widest new", "low wide"]), 20, [END]),
    contract="split",
)
merges_of(
    "no room for a merge in the vocabulary",
    (lines(ab=3), 0, []),
    (lines(ab=3), 0, [END, "<|pad|>"]),
    beyond="a tokenizer of bytes has no merges; the public vocabularies have room for some",
)


SPECIALS = [END, "<|pad|>", "<|sep|>"]
PROSE = "low lower lowest newer newest wider widest " * 4
TOKENS = set(finish(SPECIALS, right_merges(PROSE, 7, SPECIALS))[0].values())


def vocabulary(adapters):
    vocab, _ = train(adapters, PROSE, 7, SPECIALS)
    return {
        "size": len(vocab),
        "ids without gaps from 0": sorted(vocab) == list(range(len(vocab))),
        "lacking": sorted(TOKENS - set(vocab.values())),
        "foreign": sorted(set(vocab.values()) - TOKENS),
    }


def vocabulary_words(expected, actual):
    for what, tokens in (("lacks", actual["lacking"]), ("must not contain", actual["foreign"])):
        if tokens:
            return f"the vocabulary {what} {tokens[0]!r}" + f" and {len(tokens) - 1} more" * (len(tokens) > 1)
    if actual["size"] != expected["size"]:
        return f"the vocabulary must have {expected['size']} tokens, got {actual['size']}"
    return "the ids of the vocabulary must be 0, 1, 2 and so on"


step.value(
    "the vocabulary: the special tokens, all 256 bytes, one token per merge",
    vocabulary,
    {"size": 256 + 3 + 7, "ids without gaps from 0": True, "lacking": [], "foreign": []},
    contract="vocabulary",
    words=vocabulary_words,
)


def tokens_in_order(adapters):
    vocab, _ = train(adapters, PROSE, 7, SPECIALS)
    return [vocab[id] for id in sorted(vocab)]


step.value(
    "the order of ids: special tokens, bytes, merges as learned",
    tokens_in_order,
    list(finish(SPECIALS, right_merges(PROSE, 7, SPECIALS))[0].values()),
    words=lambda expected, actual: next(
        (
            f"id {id} must be {right!r}, got {found!r}"
            for id, (right, found) in enumerate(zip_longest(expected, actual))
            if right != found
        ),
        "the tokens must be bytes",
    ),
    beyond="the public test compares ids and tokens as sets; a saved model needs the same ids again",
)


# --------------------------------------------------------------------------------------------------
# Mistakes in cutting the text

SPLIT = bpe.SPLIT_PATTERN


@step.mistake("bpe.pretokenize", source=PUBLIC)
def split_on_white_space(text, special_tokens=(), pattern=SPLIT):
    """The text is split with split(), which discards all white space, so no token has a leading space, and
    text cannot be reconstructed. Use GPT-2's pattern with finditer, which keeps every character."""
    for segment in segments(text, special_tokens):
        yield from segment.split()


@step.mistake("bpe.pretokenize", source=OWN)
def whole_text_as_one_piece(text, special_tokens=(), pattern=SPLIT):
    """The text is split at special tokens only, not by the pre-tokenization pattern, so merges join the end
    of a word, the space and the start of the next word. Apply the pattern to each segment."""
    return [segment for segment in segments(text, special_tokens) if segment]


@step.mistake("bpe.pretokenize", source=PASSES)
def specials_not_split_off(text, special_tokens=(), pattern=SPLIT):
    """Special tokens are left in the text, and merges are learned from them like from words. Split the text
    at them first, and apply the pattern to what is between them."""
    return pattern.findall(text)


@step.mistake("bpe.pretokenize", source=PASSES)
def specials_not_escaped(text, special_tokens=(), pattern=SPLIT):
    """Special tokens are put into a regular expression unescaped, where the | of <|endoftext|> means "or" and
    a dot matches anything. Apply regex.escape to each before joining them."""
    if not special_tokens:
        return pattern.findall(text)
    ordered = sorted(special_tokens, key=len, reverse=True)
    return [p for segment in regex.split("|".join(ordered), text) for p in pattern.findall(segment or "")]


@step.mistake("bpe.pretokenize", source=OWN)
def specials_not_sorted_by_length(text, special_tokens=(), pattern=SPLIT):
    """Of two special tokens that share a prefix, the one listed first matches, and the rest of the longer one
    is left as text. Sort them by length, longest first, before joining them with |."""
    if not special_tokens:
        return pattern.findall(text)
    found = regex.split("|".join(map(regex.escape, special_tokens)), text)
    return [p for segment in found for p in pattern.findall(segment)]


@step.mistake("bpe.pretokenize", source=PASSES)
def specials_removed_so_that_neighbors_join(text, special_tokens=(), pattern=SPLIT):
    """Special tokens are deleted before pre-tokenization, so the last word of one document joins the first
    word of the next. Split the text at them, and pre-tokenize each part separately."""
    for special in sorted(special_tokens, key=len, reverse=True):
        text = text.replace(special, "")
    return pattern.findall(text)


@step.mistake("bpe.pretokenize", source=OWN)
def specials_replaced_by_a_space(text, special_tokens=(), pattern=SPLIT):
    """Each special token is replaced by a space, which is then counted as if it were in the text. Split the
    text there, and pre-tokenize each part separately."""
    for special in sorted(special_tokens, key=len, reverse=True):
        text = text.replace(special, " ")
    return pattern.findall(text)


@step.mistake("bpe.pretokenize", source=OWN)
def specials_kept_as_pieces(text, special_tokens=(), pattern=SPLIT):
    """The text is split at special tokens, but they are also counted as pre-tokens, so merges are learned
    inside them. In training they only separate: drop what the capturing group of split returns."""
    found = regex.split(f"({bpe.special_pattern(special_tokens).pattern})", text)
    for part in found:
        yield from [part] if part in special_tokens else pattern.findall(part or "")


@step.mistake("bpe.pretokenize", source=OWN)
def only_the_first_special_split_off(text, special_tokens=(), pattern=SPLIT):
    """The text is split at special_tokens[0] only; merges are learned from the others like from words. Build
    one pattern of all special tokens, and split with that."""
    found = text.split(special_tokens[0]) if special_tokens else [text]
    return [p for segment in found for p in pattern.findall(segment)]


@step.mistake("bpe.pretokenize", source=OWN)
def empty_pattern_without_specials(text, special_tokens=(), pattern=SPLIT):
    """Without special tokens the split pattern is empty, and re.split splits at every character, so only
    bytes of one character are ever merged. Skip the split if there are no special tokens."""
    ordered = sorted(special_tokens, key=len, reverse=True)
    found = re.split("|".join(map(re.escape, ordered)), text)
    return [p for segment in found for p in pattern.findall(segment)]


@step.mistake("bpe.pretokenize", source=OWN)
def documents_stripped(text, special_tokens=(), pattern=SPLIT):
    """White space at the start and end of each document is stripped, although it is part of the text, so the
    counts differ from those of other tokenizers. Use each segment as it is."""
    return [p for segment in segments(text, special_tokens) for p in pattern.findall(segment.strip())]


@step.mistake("bpe.pretokenize", source=OWN)
def text_in_lower_case(text, special_tokens=(), pattern=SPLIT):
    """The text is lowercased before counting, so capital letters get no tokens and are later encoded as
    single bytes. A byte-level tokenizer never changes the text."""
    return [p for segment in segments(text, special_tokens) for p in pattern.findall(segment.lower())]


def cut_by(wrong, text, special_tokens):
    return [p for segment in segments(text, special_tokens) for p in regex.findall(wrong, segment)]


@step.mistake("bpe.pretokenize", source=OWN)
def no_lookahead_at_white_space(text, special_tokens=(), pattern=SPLIT):
    r"""The part \s+(?!\S) of the pattern is missing, so of several spaces the last one does not go to the
    following word. That word lacks its leading space and gets different tokens."""
    return cut_by(GPT2.replace(r"\s+(?!\S)|", ""), text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def spaces_apart_from_words(text, special_tokens=(), pattern=SPLIT):
    """Spaces are pre-tokens of their own instead of the start of the following word, which costs one more
    token per word. In GPT-2's pattern words, numbers and punctuation start with an optional space."""
    return cut_by(GPT2.replace(" ?", ""), text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def no_contractions(text, special_tokens=(), pattern=SPLIT):
    """The contractions 's 't 're 've 'm 'll 'd at the start of the pattern are missing, so the apostrophe and
    the letters after it become two pre-tokens that can never merge."""
    return cut_by(GPT2.split("'d|")[1], text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def two_contractions_only(text, special_tokens=(), pattern=SPLIT):
    """Of the contractions only 's and 't are in the pattern. GPT-2's has seven: 's 't 're 've 'm 'll 'd; for
    the others the apostrophe and the letters become two pre-tokens that can never merge."""
    return cut_by("'s|'t|" + GPT2.split("'d|")[1], text, special_tokens)


@step.mistake("bpe.pretokenize", source=PUBLIC)
def underscores_lost(text, special_tokens=(), pattern=SPLIT):
    r"""Letters are [^\W\d_] and punctuation is [^\s\w], often because the module re has no \p{L}. The
    underscore is neither, so findall skips it. Use the regex module with \p{L} and \p{N}, whose pattern
    leaves nothing out."""
    wrong = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+"
    return [p for segment in segments(text, special_tokens) for p in re.findall(wrong, segment)]


@step.mistake("bpe.pretokenize", source=OWN)
def numbers_of_digits_only(text, special_tokens=(), pattern=SPLIT):
    r"""Numbers are \d+, which are decimal digits, so superscripts, fractions and Roman numerals count as
    punctuation. GPT-2's pattern has \p{N}, all numbers of Unicode."""
    return cut_by(GPT2.replace(r"\p{N}", r"\d"), text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def digits_in_groups_of_three(text, special_tokens=(), pattern=SPLIT):
    r"""Numbers are split after three digits, as in GPT-4's pattern (\p{N}{1,3}). GPT-2's keeps all digits of
    a number together: \p{N}+."""
    return cut_by(GPT2.replace(r"\p{N}+|", r"\p{N}{1,3}|"), text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def digits_one_by_one(text, special_tokens=(), pattern=SPLIT):
    r"""Each digit is a pre-token of its own, as in Llama 2. GPT-2's pattern keeps all digits of a number
    together: \p{N}+."""
    return cut_by(GPT2.replace(r"\p{N}+|", r"\p{N}|"), text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def contractions_in_capitals_too(text, special_tokens=(), pattern=SPLIT):
    """Contractions also match in capitals, as in DON'T. GPT-2's pattern matches lowercase contractions only,
    and another pattern gives other tokens. Do not use IGNORECASE."""
    return cut_by("(?i)" + GPT2, text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def letters_of_ascii_only(text, special_tokens=(), pattern=SPLIT):
    r"""Letters are [A-Za-z] and digits [0-9], often because the module re has no \p{L}. Words with accents
    then fall apart, and other scripts count as punctuation. Use the regex module instead of re."""
    ascii_only = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
    return cut_by(ascii_only, text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def words_by_backslash_w(text, special_tokens=(), pattern=SPLIT):
    r"""Words are \w+, which matches letters, digits and the underscore, so a1 and b_c stay whole. GPT-2
    separates letters, numbers and punctuation: \p{L} and \p{N} of the regex module."""
    return cut_by(r"'s|'t|'re|'ve|'m|'ll|'d| ?\w+| ?[^\s\w]+|\s+(?!\S)|\s+", text, special_tokens)


@step.mistake("bpe.pretokenize", source=OWN)
def white_space_left_out(text, special_tokens=(), pattern=SPLIT):
    """The pattern has no alternative for white space, so blank lines and indentation are silently skipped.
    Every character must be part of a pre-token; joined, they must give the text back."""
    return cut_by(GPT2.removesuffix(r"|\s+(?!\S)|\s+"), text, special_tokens)


# --------------------------------------------------------------------------------------------------
# Mistakes in counting the pieces


def count(text, special_tokens):
    return Counter(piece.encode() for piece in bpe.pretokenize(text, special_tokens))


@step.mistake("bpe.count_pretokens", source=OWN)
def line_ends_translated(input_path, special_tokens, n_workers=None, pattern=SPLIT, progress=bpe.silent):
    r"""The file is opened in text mode, where Python turns \r\n into \n, so carriage returns are never
    learned. Read bytes and decode them, or open with newline=""."""
    return count(Path(input_path).read_text(encoding="utf-8"), special_tokens)


@step.mistake("bpe.count_pretokens", source=OWN)
def file_cut_line_by_line(input_path, special_tokens, n_workers=None, pattern=SPLIT, progress=bpe.silent):
    """The file is counted line by line, which splits white space that spans lines, such as blank lines or
    indentation. Split large files at special tokens only, where no merge can cross."""
    total = Counter()
    for line in Path(input_path).read_bytes().splitlines(keepends=True):
        total += count(line.decode(), special_tokens)
    return total


@step.mistake("bpe.count_pretokens", source=OWN)
def file_cut_anywhere(input_path, special_tokens, n_workers=None, pattern=SPLIT, progress=bpe.silent):
    """The file is split into equal chunks for several workers, in the middle of words and characters. Move
    each boundary to the next special token before counting."""
    data, total = Path(input_path).read_bytes(), Counter()
    size = len(data) // 4 + 1
    for begin in range(0, len(data), size):
        total += count(data[begin : begin + size].decode(errors="replace"), special_tokens)
    return total


@step.mistake("bpe.count_pretokens", source=OWN)
def last_document_forgotten(input_path, special_tokens, n_workers=None, pattern=SPLIT, progress=bpe.silent):
    """Text after the last special token is never counted, and a file without special tokens is not counted at
    all. The last boundary must be the end of the file."""
    *documents, _ = segments(Path(input_path).read_bytes().decode(), special_tokens)
    return sum((count(document, special_tokens) for document in documents), Counter())


@step.mistake("bpe.count_pretokens", source=OWN)
def counts_of_documents_overwritten(
    input_path, special_tokens, n_workers=None, pattern=SPLIT, progress=bpe.silent
):
    """The counts of the documents are combined with dict.update(), which replaces the earlier count of a word
    instead of adding to it. Use a Counter, whose update() adds."""
    total = {}
    for document in segments(Path(input_path).read_bytes().decode(), special_tokens):
        total.update(count(document, special_tokens))
    return total


# --------------------------------------------------------------------------------------------------
# Mistakes in choosing the pair

MERGES = "bpe.learn_merges"


@step.mistake(MERGES, source=PUBLIC)
def ties_to_the_first_seen(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Of equally frequent pairs, max() takes the one counted first, so the result depends on the order of the
    text. Add the pair to the key: max(counts, key=lambda pair: (counts[pair], pair))."""
    return learn_all(pretokens, vocab_size, special_tokens, choose=lambda counts: max(counts, key=counts.get))


@step.mistake(MERGES, source=OWN)
def ties_to_the_last_seen(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Of equally frequent pairs the one counted last is taken, as by >= in a loop. The greatest pair of byte
    strings must win: compare (count, pair), not the count alone."""

    def choose(counts):
        return max(reversed(counts), key=counts.get)

    return learn_all(pretokens, vocab_size, special_tokens, choose=choose)


@step.mistake(MERGES, source=PUBLIC)
def ties_to_the_smallest(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Of equally frequent pairs the lexicographically smallest is taken, as by a heap of (-count, pair). The
    greatest must win, so the order of the pairs has to be reversed too."""

    def choose(counts):
        return min(counts, key=lambda pair: (-counts[pair], pair))

    return learn_all(pretokens, vocab_size, special_tokens, choose=choose)


@step.mistake(MERGES, source=PUBLIC)
def ties_by_the_joined_bytes(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Equally frequent pairs are compared by their joined bytes. Compare the pairs themselves, left sides
    first: (ab, c) is greater than (a, bd), although abc is less than abd."""

    def choose(counts):
        return max(counts, key=lambda pair: (counts[pair], pair[0] + pair[1]))

    return learn_all(pretokens, vocab_size, special_tokens, choose=choose)


@step.mistake(MERGES, source=PUBLIC)
def ties_to_the_longest(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Of equally frequent pairs the longest is preferred before the bytes are compared. Length does not
    matter; compare (count, pair) alone."""

    def choose(counts):
        return max(counts, key=lambda pair: (counts[pair], len(pair[0] + pair[1]), pair))

    return learn_all(pretokens, vocab_size, special_tokens, choose=choose)


@step.mistake(MERGES, source=OWN)
def ties_to_the_shortest(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Of equally frequent pairs the shortest is preferred before the bytes are compared. Length does not
    matter; compare (count, pair) alone."""

    def choose(counts):
        return max(counts, key=lambda pair: (counts[pair], -len(pair[0] + pair[1]), pair))

    return learn_all(pretokens, vocab_size, special_tokens, choose=choose)


@step.mistake(MERGES, source=OWN)
def ties_by_ids(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Equally frequent pairs are compared by their ids, where every merged token is greater than every byte.
    Look up the bytes of both sides in the vocabulary, and compare those."""
    ids = {bytes([b]): b for b in range(256)}

    def choose(counts):
        left, right = max(counts, key=lambda pair: (counts[pair], ids[pair[0]], ids[pair[1]]))
        ids[left + right] = len(ids)
        return left, right

    return learn_all(pretokens, vocab_size, special_tokens, choose=choose)


@step.mistake(MERGES, source=OWN)
def ties_by_the_printed_characters(
    pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent
):
    """Equally frequent pairs are compared in GPT-2's printable form, in which the space is U+0120, greater
    than every letter. Compare the bytes themselves: the space is 32, less than any letter."""
    printed = {bytes([b]): chr(b) if 33 <= b < 127 or b > 173 else chr(256 + b) for b in range(256)}

    def spell(token):
        return "".join(printed[bytes([byte])] for byte in token)

    def choose(counts):
        return max(counts, key=lambda pair: (counts[pair], spell(pair[0]), spell(pair[1])))

    return learn_all(pretokens, vocab_size, special_tokens, choose=choose)


@step.mistake(MERGES, source=PUBLIC)
def frequencies_ignored(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Each distinct word counts once, however often it occurs, so rare words count as much as frequent ones.
    Add the word's frequency to the count of each of its pairs."""
    return learn_all(dict.fromkeys(pretokens, 1), vocab_size, special_tokens)


@step.mistake(MERGES, source=OWN)
def pair_counted_once_a_word(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """A pair that occurs twice in a word counts once, as if the word's pairs were a set. Iterate over all
    adjacent pairs of the word, and add its frequency each time."""

    def once(words):
        counts = Counter()
        for word, frequency in words.items():
            for pair in dict.fromkeys(pairwise(word)):
                counts[pair] += frequency
        return counts

    return learn_all(pretokens, vocab_size, special_tokens, count=once)


@step.mistake(MERGES, source=OWN)
def runs_counted_without_overlap(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """In aaa the pair (a, a) counts once, because its occurrences overlap. All adjacent pairs count, so it is
    2; only merging must not use a token twice."""

    def apart(words):
        counts = Counter()
        for word, frequency in words.items():
            last = None
            for pair in pairwise(word):
                last = None if pair == last else pair
                counts[pair] += frequency if last else 0
        return counts

    return learn_all(pretokens, vocab_size, special_tokens, count=apart)


# --------------------------------------------------------------------------------------------------
# Mistakes in merging it


@step.mistake(MERGES, source=PUBLIC)
def only_the_first_occurrence_merged(
    pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent
):
    """In a word that contains the pair twice, only the first occurrence is merged, and the same pair is
    learned again later. Continue after the merged token until the end of the word."""

    def first(word, pair):
        for i, found in enumerate(pairwise(word)):
            if found == pair:
                return (*word[:i], pair[0] + pair[1], *word[i + 2 :])
        return word

    return learn_all(pretokens, vocab_size, special_tokens, merge=first)


@step.mistake(MERGES, source=PUBLIC)
def runs_merged_from_the_right(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """In aaa the last two tokens are merged instead of the first two. Scan the word from left to right, and
    advance by two after a merge; the encoder does the same."""

    def from_the_right(word, pair):
        word, i = list(word), len(word) - 2
        while i >= 0:
            if (word[i], word[i + 1]) == pair:
                word[i : i + 2] = [pair[0] + pair[1]]
                i -= 1
            i -= 1
        return tuple(word)

    return learn_all(pretokens, vocab_size, special_tokens, merge=from_the_right)


@step.mistake(MERGES, source=OWN)
def ends_of_tokens_merged(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Pairs are merged by replacing text in words whose tokens are joined by a separator, so (b, c) also
    matches at the end of the token xb. Compare whole tokens in a list."""

    def replace(word, pair):
        return tuple(b"\0".join(word).replace(b"\0".join(pair), b"".join(pair)).split(b"\0"))

    return learn_all(pretokens, vocab_size, special_tokens, merge=replace)


def update_counts(pretokens, n_merges, lower, raise_):
    """Merges by cached counts; `lower` and `raise_` select the pairs of a changed word to update."""
    words = [(as_bytes(word), frequency) for word, frequency in pretokens.items()]
    counts = count_pairs(dict(words))
    merges = []
    while len(merges) < n_merges and max(counts.values(), default=0) > 0:
        pair = greatest(counts)
        merges.append(pair)
        for i, (old, frequency) in enumerate(words):
            new = merge_word(old, pair)
            if new != old:
                words[i] = new, frequency
                counts.subtract({p: n * frequency for p, n in Counter(lower(old, pair)).items()})
                counts.update({p: n * frequency for p, n in Counter(raise_(new, pair)).items()})
        del counts[pair]
    return merges


@step.mistake(MERGES, source=PUBLIC)
def old_neighbors_not_lowered(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """When (b, c) is merged in abc, (a, b) is no longer there, but its count is not decremented, so pairs
    that no longer exist get merged. Decrement the counts of the pairs on both sides."""

    def made(new, pair):
        return [p for p in pairwise(new) if pair[0] + pair[1] in p]

    n_merges = vocab_size - 256 - len(special_tokens)
    return finish(special_tokens, update_counts(pretokens, n_merges, lambda old, pair: [], made))


@step.mistake(MERGES, source=OWN)
def right_neighbor_not_lowered(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """When (a, b) is merged in abc, the count of (b, c) is not decremented; only that of the pair on the left
    is. A merge removes the pairs on both of its sides."""

    def without_the_right(old, pair):
        found = list(pairwise(old))
        right = [q for p, q in pairwise(found) if p == pair and q != pair]
        return (Counter(found) - Counter(right)).elements()

    n_merges = vocab_size - 256 - len(special_tokens)
    return finish(
        special_tokens, update_counts(pretokens, n_merges, without_the_right, lambda new, pair: pairwise(new))
    )


@step.mistake(MERGES, source=OWN)
def new_pairs_not_counted(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The pairs that a merged token forms with its neighbors are never counted, so no token gets longer than
    two bytes. After each merge, add the counts of the new pairs."""

    def old_ones(new, pair):
        return [p for p in pairwise(new) if pair[0] + pair[1] not in p]

    n_merges = vocab_size - 256 - len(special_tokens)
    return finish(
        special_tokens, update_counts(pretokens, n_merges, lambda old, pair: pairwise(old), old_ones)
    )


@step.mistake(MERGES, source=OWN)
def pairs_counted_only_at_the_start(
    pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent
):
    """Byte pairs are counted once and merged in the order of those counts. Every merge changes the pairs:
    recount after it, or update the counts that it affects."""
    counts = count_pairs({as_bytes(word): frequency for word, frequency in pretokens.items()})
    ordered = sorted(counts, key=lambda pair: (counts[pair], pair), reverse=True)
    return finish(special_tokens, ordered[: vocab_size - 256 - len(special_tokens)])


@step.mistake(MERGES, source=OWN)
def characters_for_bytes(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Words start as characters instead of bytes, so an accented letter is one token from the start, although
    the vocabulary does not contain it. Encode each word as UTF-8 before splitting it."""

    def characters(word):
        return tuple(c.encode() for c in word.decode())

    return learn_all(pretokens, vocab_size, special_tokens, cut=characters)


# --------------------------------------------------------------------------------------------------
# Mistakes in when to stop, and in what is returned


@step.mistake(MERGES, source=PUBLIC)
def specials_counted_twice(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The number of special tokens is subtracted from vocab_size twice, so that many merges are missing. The
    number of merges is vocab_size - 256 - len(special_tokens)."""
    return finish(special_tokens, learn(pretokens, vocab_size - 256 - 2 * len(special_tokens)))


@step.mistake(MERGES, source=OWN)
def specials_not_counted(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """There are vocab_size - 256 merges, and the special tokens are added on top, so the vocabulary is larger
    than requested, and the embedding has no row for the last ids. Special tokens count in vocab_size."""
    return finish(special_tokens, learn(pretokens, vocab_size - 256))


@step.mistake(MERGES, source=OWN)
def one_merge_short(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The loop ends one merge before the vocabulary is full. Continue while len(vocab) < vocab_size, where
    vocab includes the bytes and the special tokens."""
    return learn_all(pretokens, vocab_size - 1, special_tokens)


@step.mistake(MERGES, source=OWN)
def one_merge_too_many(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The loop ends one merge after the vocabulary is full, as with <= instead of <. The last id is then
    outside the embedding, which has vocab_size rows."""
    return learn_all(pretokens, vocab_size + 1, special_tokens)


@step.mistake(MERGES, source=OWN)
def as_many_merges_as_vocab_size(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """There are vocab_size merges, and the bytes and special tokens come on top. vocab_size is the total
    number of tokens; subtract 256 and the special tokens."""
    return finish(special_tokens, learn(pretokens, vocab_size))


@step.mistake(MERGES, source=PASSES)
def no_stop_when_no_pair_is_left(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Once every word is a single token there are no pairs, and max() of an empty sequence raises an error.
    Stop when the counts are empty; the vocabulary is then smaller than requested."""
    n_merges = vocab_size - 256 - len(special_tokens)
    merges = learn(pretokens, n_merges)
    if len(merges) < n_merges:
        merges.append(greatest({}))
    return finish(special_tokens, merges)


@step.mistake(MERGES, source=PASSES)
def pairs_that_are_gone_merged(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """Pairs whose count fell to 0 stay in the Counter, and once nothing else is left they are merged although
    they occur nowhere. Stop when the highest count is 0, or delete such pairs."""
    known = {}

    def with_zeros(words):
        counts = {**dict.fromkeys(known, 0), **count_pairs(words)}
        known.update(counts)
        return counts

    def choose(counts):
        pair = greatest(counts)
        del known[pair]
        return pair

    return learn_all(pretokens, vocab_size, special_tokens, count=with_zeros, choose=choose)


@step.mistake(MERGES, source=OWN)
def stops_at_pairs_that_occur_once(
    pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent
):
    """Training stops when the most frequent pair occurs only once, so the vocabulary of a small text is
    smaller than requested. Merge as long as there is a pair and the vocabulary is not full."""

    def twice(words):
        counts = count_pairs(words)
        return counts if max(counts.values(), default=0) > 1 else {}

    return learn_all(pretokens, vocab_size, special_tokens, count=twice)


@step.mistake(MERGES, source=OWN)
def vocabulary_without_specials(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The special tokens count in vocab_size, but get no entry in the vocabulary, so they cannot be encoded
    later. Add the bytes of each special token with an id of its own."""
    vocab, merges = learn_all(pretokens, vocab_size, special_tokens)
    return dict(enumerate(list(vocab.values())[len(special_tokens) :])), merges


@step.mistake(MERGES, source=OWN)
def specials_at_the_end(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The special tokens get the last ids, after bytes and merges. The tokens are right, but a larger
    vocabulary of the same text then gives them other ids. Here they come first, then the 256 bytes."""
    vocab, merges = learn_all(pretokens, vocab_size, special_tokens)
    tokens = list(vocab.values())
    return dict(enumerate(tokens[len(special_tokens) :] + tokens[: len(special_tokens)])), merges


@step.mistake(MERGES, source=OWN)
def specials_after_the_bytes(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The special tokens get the ids from 256 on, between bytes and merges. Here they come first, then the
    256 bytes, then the merges in the order of learning."""
    vocab, merges = learn_all(pretokens, vocab_size, special_tokens)
    tokens, n = list(vocab.values()), len(special_tokens)
    return dict(enumerate(tokens[n : n + 256] + tokens[:n] + tokens[n + 256 :])), merges


@step.mistake(MERGES, source=OWN)
def ids_in_the_order_of_the_bytes(
    pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent
):
    """The ids are assigned to the sorted tokens, or to those of a set, so they are unrelated to the order of
    learning. Add each token with the next id when it is made."""
    vocab, merges = learn_all(pretokens, vocab_size, special_tokens)
    return dict(enumerate(sorted(vocab.values()))), merges


@step.mistake(MERGES, source=OWN)
def vocabulary_of_seen_bytes_only(
    pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent
):
    """The vocabulary starts with the bytes that occur in the training text. A later text with any other byte
    cannot be encoded; start with all 256."""
    seen = sorted({byte for word in pretokens for byte in word})
    merges = learn(pretokens, vocab_size - 256 - len(special_tokens))
    tokens = [s.encode() for s in special_tokens] + [bytes([b]) for b in seen] + [a + b for a, b in merges]
    return dict(enumerate(tokens)), merges


@step.mistake(MERGES, source=OWN)
def vocabulary_from_bytes_to_ids(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The vocabulary is inverted: it maps bytes to ids. It must map each id to its bytes, which is what
    decoding looks up."""
    vocab, merges = learn_all(pretokens, vocab_size, special_tokens)
    return {token: id for id, token in vocab.items()}, merges


@step.mistake(MERGES, source=OWN)
def merges_of_ids(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The merges are pairs of ids. They must be pairs of byte strings, in the order of learning, so that they
    do not depend on the numbering. Look up both sides in the vocabulary."""
    vocab, merges = learn_all(pretokens, vocab_size, special_tokens)
    ids = {token: id for id, token in reversed(vocab.items())}
    return vocab, [(ids[left], ids[right]) for left, right in merges]


@step.mistake(MERGES, source=OWN)
def merges_sorted(pretokens, vocab_size, special_tokens, ties="greatest", progress=bpe.silent):
    """The merges are returned sorted. Their order must be the order of learning, in which the encoder applies
    them. Return the list as it was built."""
    vocab, merges = learn_all(pretokens, vocab_size, special_tokens)
    return vocab, sorted(merges)


# --------------------------------------------------------------------------------------------------
# Mistakes in putting the two together


@step.mistake("bpe.train_bpe", source=OWN)
def only_the_first_document_learned(
    input_path,
    vocab_size,
    special_tokens=(),
    n_workers=None,
    pattern=SPLIT,
    ties="greatest",
    progress=bpe.silent,
):
    """Merges are learned from the first document only: text after the first special token is never counted.
    Count the pre-tokens of all segments."""
    text = Path(input_path).read_bytes().decode()
    return bpe.learn_merges(count(segments(text, special_tokens)[0], []), vocab_size, special_tokens)
