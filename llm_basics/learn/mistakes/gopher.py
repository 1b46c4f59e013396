"""Quality rules of Gopher."""

import types

from llm_basics.learn import probes
from llm_basics.quality import gopher

step = probes.Step("gopher")
# the right functions, also where one of them is replaced
right = types.SimpleNamespace(**vars(gopher))
GOOD = "Seven words that make a good line\n" * 10


def passes(about, cases, **ground):
    ground = ground or {"contract": "gopher"}
    step.value(
        about,
        lambda a: [str(bool(a.run_gopher_quality_filter(text))) for text in cases],
        list(map(str, cases.values())),
        axes="text",
        **ground,
    )


passes("running text", {GOOD: True})
passes("eleven words", {"The string you are reading is a short snippet of text.": False})
passes("120,000 words", {"word and more " * 40_000: False})
passes("words of one and two letters", {"a be in " * 60: False})
passes("words of 15 letters", {"extraordinarily " * 60: False})
passes("four of ten lines end with an ellipsis", {GOOD + "Seven words of a line to read...\n" * 7: False})
passes(
    "two of five words have a letter",
    {"words here 123 456 789 " * 30: False, "word 1234 5678 901 234 567 890 " * 30: False},
)
EXACT = "the assignment's tests stay far from the bounds, which belong to the allowed range in Gopher's rules"
passes("49 and 50 words", {"four " * 49: False, "four " * 50: True}, beyond=EXACT)
passes("100,000 words and one more", {"four " * 100_000: True, "four " * 100_001: False}, beyond=EXACT)
passes("words of 3 letters, and of 10", {"one " * 60: True, "manuscript " * 60: True}, beyond=EXACT)
passes("30% of lines", {GOOD[:238] + "Seven words of a line to read...\n" * 3: True}, beyond=EXACT)
passes("80% of words", {"four good words here 1234 " * 20: True}, beyond=EXACT)
passes(
    "Cyrillic",
    {"\u0445\u043e\u0440\u043e\u0448\u0438\u0435 \u0441\u043b\u043e\u0432\u0430 " * 30: True},
    beyond="a letter of any alphabet is a letter; a rule for a to z drops all other languages",
)
step.value(
    "the mean length of words, and of none",
    lambda a: [float(a.run_mean_word_length(words)) for words in (["a", "a", "bcdefgh"], ["no,", "yes"], [])],
    [3.0, 3.0, 0.0],
    axes="list",
)
LINES = {
    "Read more...\n\n\nThe end.": 0.5,
    "One...  \nTwo\nThree\nFour": 0.25,
    "One\u2026\nTwo": 0.5,
    "Well... yes\nNo": 0.0,
    "": 0.0,
    "One..\nTwo...": 0.5,
}
step.value(
    "the fraction of lines with an ellipsis",
    lambda a: [float(a.run_ellipsis_fraction(text)) for text in LINES],
    list(LINES.values()),
    axes="text",
)
WORDS = ((["b2b", "42", "--", "yes"], 0.5), (["yes,", "(no)", "1"], 2 / 3), (["\u044f", "1"], 0.5), ([], 0.0))
step.value(
    "the fraction of words with a letter",
    lambda a: [float(a.run_alphabetic_fraction(list(words))) for words, _ in WORDS],
    [fraction for _, fraction in WORDS],
    axes="list",
)


def rules(text, length=None):
    """The statistics of the rules."""
    words = text.split()
    mean = right.mean_word_length(words) if length is None else length
    dots, letters = right.ellipsis_fraction(text), right.alphabetic_fraction(words)
    return len(words), mean, dots, letters


def judged(n, mean, dots, letters):
    return [50 <= n, n <= 100_000, 3 <= mean, mean <= 10, dots <= 0.3, letters >= 0.8]


def mistake(piece, wrong, name, text):
    wrong.__name__, wrong.__doc__ = name, text
    step.mistake(f"gopher.{piece}", source="written for this catalogue")(wrong)


def filtered(number, rule, name, text):
    """The filter with the rule of this number replaced."""

    def wrong(text):
        found = rules(text)
        passed = judged(*found)
        passed[number] = rule(*found)
        return all(passed)

    mistake("gopher_quality_filter", wrong, name, text)


filtered(
    0,
    lambda n, *_: n > 50,
    "fifty is too few",
    "A text of exactly 50 words is dropped. The rule drops fewer than 50: the bounds themselves are allowed.",
)
filtered(
    0,
    lambda n, *_: True,
    "no least number of words",
    "Texts of a few words pass. Fragments such as menus and "
    "captions are the most frequent rubbish: require 50 words.",
)
filtered(
    1,
    lambda n, *_: True,
    "no largest number of words",
    "Texts of more than 100,000 words pass. They are "
    "mostly lists and dumps of data: the rule has an upper bound, too.",
)
filtered(
    1,
    lambda n, *_: n < 100_000,
    "hundred thousand is too many",
    "A text of exactly 100,000 words is dropped. "
    "The rule drops more than that: the bounds themselves are allowed.",
)
filtered(
    2,
    lambda n, mean, *_: mean > 3,
    "three letters are too short",
    "A mean of exactly 3 characters is dropped. The mean must be in the range from 3 to 10 with both ends.",
)
filtered(
    2,
    lambda n, mean, *_: True,
    "no shortest word",
    "Texts whose words have one and two characters pass. A "
    "mean below 3 is that of tables and of broken extraction.",
)
filtered(
    3,
    lambda n, mean, *_: mean < 10,
    "ten letters are too long",
    "A mean of exactly 10 characters is dropped. The mean must be in the range from 3 to 10 with both ends.",
)
filtered(
    3,
    lambda n, mean, *_: True,
    "no longest word",
    "Texts whose words have 15 characters on average pass. A "
    "mean above 10 is that of addresses and of program code without spaces.",
)
filtered(
    4,
    lambda n, mean, dots, _: dots < 0.3,
    "thirty percent is too much",
    "Exactly 30% of lines with an ellipsis is dropped. The rule drops more than 30%.",
)
filtered(
    4,
    lambda n, mean, dots, _: True,
    "ellipsis ignored",
    "Pages of teasers pass, whose lines end with an ellipsis. Drop a text if more than 30% of its lines do.",
)
filtered(
    5,
    lambda n, mean, dots, letters: letters > 0.8,
    "eighty percent is too little",
    "Exactly 80% of words with a letter is dropped. The rule requires 80% or more.",
)
filtered(
    5,
    lambda n, mean, dots, letters: True,
    "letters ignored",
    "Tables of numbers pass, where most words have no letter. Require a letter in 80% of the words.",
)
filtered(
    5,
    lambda n, mean, dots, letters: letters >= 0.2,
    "fraction of the others",
    "80% is compared with the "
    "fraction of words without letters, so a text passes with only 20% of real words.",
)
mistake(
    "gopher_quality_filter",
    lambda text: not all(judged(*rules(text))),
    "answer inverted",
    "True is returned for texts to be dropped. The filter returns True for texts to be kept.",
)
mistake(
    "gopher_quality_filter",
    lambda text: any(judged(*rules(text))),
    "one rule is enough",
    "A text passes if one of the rules holds. It must pass all of them: use and between them, not or.",
)
mistake(
    "mean_word_length",
    lambda words: len(" ".join(words)) / len(words) if words else 0.0,
    "spaces counted",
    "The spaces between the words are counted as characters of words. Add the lengths of the words alone.",
)
mistake(
    "mean_word_length",
    lambda words: sum(map(len, words)) / len(words),
    "mean of nothing",
    "An empty text divides by zero, and one blank page stops the whole run. Its mean is 0, which is "
    "too short.",
)
mistake(
    "mean_word_length",
    lambda words: sorted(map(len, words))[len(words) // 2] if words else 0.0,
    "median instead of mean",
    "The median of the lengths is taken. Gopher's rule is about the mean, which long "
    "rows of characters raise.",
)
mistake(
    "ellipsis_fraction",
    lambda text: (
        sum(line.rstrip().endswith(gopher.ELLIPSES) for line in text.splitlines())
        / max(1, len(text.splitlines()))
    ),
    "blank lines counted",
    "Blank lines count as lines without an ellipsis, so "
    "a page with space between its teasers passes. Leave them out.",
)
mistake(
    "ellipsis_fraction",
    lambda text: right.ellipsis_fraction(text.replace("\u2026", "-")),
    "three dots alone",
    "Only three dots are found. Many pages write the single character U+2026 instead; look for both.",
)
mistake(
    "ellipsis_fraction",
    lambda text: right.ellipsis_fraction(text.replace(" \n", "-\n")),
    "spaces at the end",
    "A line whose ellipsis is followed by spaces does not count. Strip the line before looking at its end.",
)
mistake(
    "ellipsis_fraction",
    lambda text: (
        sum("..." in line or "\u2026" in line for line in text.split("\n") if line.strip())
        / max(1, sum(bool(line.strip()) for line in text.split("\n")))
    ),
    "ellipsis anywhere",
    "A line with an ellipsis in its middle counts. The rule is about lines that end with one, "
    "cut-off teasers.",
)
mistake(
    "ellipsis_fraction",
    lambda text: (
        right.ellipsis_fraction(text) * max(1, sum(bool(line.strip()) for line in text.splitlines()))
    ),
    "number of lines",
    "The number of lines is returned instead of their fraction. Divide by all lines that are not blank.",
)
mistake(
    "ellipsis_fraction",
    lambda text: right.ellipsis_fraction(text.replace("..", "...").replace("....", "...")),
    "two dots",
    "Two dots at the end of a line count as an ellipsis, so typing errors do. It has three.",
)
mistake(
    "alphabetic_fraction",
    lambda words: sum(map(str.isalpha, words)) / len(words) if words else 0.0,
    "letters alone",
    "Only words of nothing but letters count, so a comma or a bracket at a word spoils it. One "
    "letter in the word is enough.",
)
mistake(
    "alphabetic_fraction",
    lambda words: (
        sum(any(c.isalpha() and c.isascii() for c in word) for word in words) / len(words) if words else 0.0
    ),
    "latin letters alone",
    "Only a to z are letters here, which drops every text "
    "in Cyrillic, Greek or Chinese. str.isalpha supports all alphabets.",
)
mistake(
    "alphabetic_fraction",
    lambda words: sum(any(map(str.isalnum, word)) for word in words) / len(words) if words else 0.0,
    "digits counted",
    "Digits count as letters, so tables of numbers pass. Use isalpha, not isalnum.",
)
mistake(
    "alphabetic_fraction",
    lambda words: sum(any(map(str.isalpha, word)) for word in words) / len(words),
    "fraction of nothing",
    "An empty text divides by zero, and one blank page stops the whole run. Its fraction is 0.",
)
