"""Quality rules of Gopher, which drop documents unlike running text.

The rules are statistics of words and lines. They were made for English web pages; text without spaces between
words, such as Chinese, has too few and too long words.

Scaling Language Models (Gopher), arXiv 2112.11446, appendix A.1.1. Its rules about symbols, bullets and stop
words are not used here: the first four need no list for each language.
"""

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_LENGTH, MAX_MEAN_LENGTH = 3.0, 10.0
MAX_ELLIPSIS_FRACTION = 0.3
MIN_ALPHABETIC_FRACTION = 0.8

# three dots, or the character with three dots
ELLIPSES = ("...", "\u2026")


def mean_word_length(words: list[str]) -> float:
    """The mean number of characters of words; 0 if there are none.

    >>> mean_word_length(["a", "bcd"])
    2.0
    """
    return sum(map(len, words)) / len(words) if words else 0.0


def ellipsis_fraction(text: str) -> float:
    """The fraction of lines that end with an ellipsis, without blank lines.

    >>> ellipsis_fraction("Read more...\\n\\nThe end.")
    0.5
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return sum(line.endswith(ELLIPSES) for line in lines) / len(lines) if lines else 0.0


def alphabetic_fraction(words: list[str]) -> float:
    """The fraction of words with at least one letter, of any alphabet; 0 if there are no words.

    >>> alphabetic_fraction(["b2b", "42", "--", "yes"])
    0.5
    """
    return sum(any(map(str.isalpha, word)) for word in words) / len(words) if words else 0.0


def broken_rule(text: str) -> str | None:
    """The first rule that a document violates, or None; words are separated by white space.

    50 <= words <= 100,000, 3 <= mean length <= 10, lines with ellipsis <= 30%, words with a letter >= 80%

    >>> broken_rule("too short")
    'too few words'
    >>> broken_rule("one two three four five " * 10)
    """
    words = text.split()
    if len(words) < MIN_WORDS:
        return "too few words"
    if len(words) > MAX_WORDS:
        return "too many words"
    length = mean_word_length(words)
    if length < MIN_MEAN_LENGTH:
        return "words too short"
    if length > MAX_MEAN_LENGTH:
        return "words too long"
    if ellipsis_fraction(text) > MAX_ELLIPSIS_FRACTION:
        return "lines with ellipsis"
    if alphabetic_fraction(words) < MIN_ALPHABETIC_FRACTION:
        return "words without letters"
    return None


def gopher_quality_filter(text: str) -> bool:
    """Whether a document passes the rules of `broken_rule`.

    >>> gopher_quality_filter("one two three four five " * 10), gopher_quality_filter("1 2 3 4 5 " * 10)
    (True, False)
    """
    return broken_rule(text) is None
