"""Exact-line deduplication of files."""

import collections
import pathlib
import tempfile

from llm_basics.learn import probes

step = probes.Step("exact_lines")


def deduplicated(a, contents, folder="out"):
    """Name and content of each file written, then those of the inputs."""
    with tempfile.TemporaryDirectory() as top:
        source, out = pathlib.Path(top, "in"), pathlib.Path(top, folder)
        source.mkdir()
        if folder == "out":
            out.mkdir()
        for name, text in contents.items():
            (source / name).write_bytes(text.encode())
        a.run_exact_line_deduplication([source / name for name in contents], out)
        return [
            f"{path.name}: {path.read_bytes().decode()!r}"
            for each in (out, source)
            for path in sorted(each.iterdir())
        ]


def lines(about, contents, right, folder="out", **ground):
    texts = [f"{name}: {text!r}" for name, text in sorted(right.items())]
    texts += [f"{name}: {text!r}" for name, text in sorted(contents.items())]
    ground = ground or {"contract": "exact_lines"}
    step.value(about, lambda a: deduplicated(a, contents, folder), texts, axes="file", **ground)


lines(
    "a line of two files",
    {"a.txt": "menu\nfirst\n", "b.txt": "second\nmenu\n"},
    {"a.txt": "first\n", "b.txt": "second\n"},
)
lines("a line twice in one file", {"a.txt": "x\ny\nx\nz\n"}, {"a.txt": "y\nz\n"})
lines(
    "no duplicates, in their order",
    {"b.txt": "c\nb\n", "a.txt": "d\na\n"},
    {"b.txt": "c\nb\n", "a.txt": "d\na\n"},
)
lines(
    "three copies",
    {"a.txt": "x\na\n", "b.txt": "x\nb\n", "c.txt": "x\nc\n"},
    {"a.txt": "a\n", "b.txt": "b\n", "c.txt": "c\n"},
)
MORE = "the assignment's files have none of these; those of a crawl do"
lines(
    "a file of duplicates alone",
    {"a.txt": "x\n", "b.txt": "x\ny\n"},
    {"a.txt": "", "b.txt": "y\n"},
    beyond=MORE,
)
lines("an indented line", {"a.txt": "x\n  x\n"}, {"a.txt": "x\n  x\n"}, beyond=MORE)
lines("capital letters", {"a.txt": "x\nX\n"}, {"a.txt": "x\nX\n"}, beyond=MORE)
lines("a last line without its line feed", {"a.txt": "x\ny\nx"}, {"a.txt": "y\n"}, beyond=MORE)
lines("blank lines", {"a.txt": "x\n\ny\n\nz\n"}, {"a.txt": "x\ny\nz\n"}, beyond=MORE)
lines("line separators of Unicode", {"a.txt": "x\u2028y\nx\n"}, {"a.txt": "x\u2028y\nx\n"}, beyond=MORE)
lines(
    "a separator inside two lines",
    {"a.txt": "x\u2028y\nx\u2028z\n"},
    {"a.txt": "x\u2028y\nx\u2028z\n"},
    beyond=MORE,
)
lines("line ends of Windows", {"a.txt": "x\r\ny\r\nx\r\n"}, {"a.txt": "y\r\n"}, beyond=MORE)
lines("a folder that does not exist yet", {"a.txt": "x\n"}, {"a.txt": "x\n"}, folder="new/out", beyond=MORE)


def mistake(name, text, count=None, kept=None, write=None):
    """A version that counts, chooses or writes lines in another way."""

    def split(path):
        return path.read_bytes().decode().split("\n")

    def key(line):
        return line.rstrip("\r\n")

    def wrong(input_files, output_directory):
        paths = [pathlib.Path(path) for path in input_files]
        out = pathlib.Path(output_directory)
        if name != "folder must exist":
            out.mkdir(parents=True, exist_ok=True)
        texts = {}
        for path in paths:
            parts = split(path)
            texts[path] = [part + "\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
        key_of = count or key
        counts = collections.Counter(key_of(line) for each in texts.values() for line in each)
        seen = set()
        for path, each in texts.items():
            chosen = kept(each, counts, seen) if kept else [x for x in each if counts[key_of(x)] == 1]
            (write or (lambda out, path, chosen: (out / path.name).write_bytes("".join(chosen).encode())))(
                out, path, chosen
            )

    wrong.__name__, wrong.__doc__ = name, text
    step.mistake("deduplication.exact_line_deduplication", source="written for this catalogue")(wrong)


def first_ones(lines, counts, seen):
    chosen = []
    for line in lines:
        if line.rstrip("\r\n") not in seen:
            chosen.append(line)
        seen.add(line.rstrip("\r\n"))
    return chosen


def of_one_file(lines, counts, seen):
    own = collections.Counter(line.rstrip("\r\n") for line in lines)
    return [line for line in lines if own[line.rstrip("\r\n")] == 1]


def neighbors(lines, counts, seen):
    return [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]


def unless_empty(out, path, chosen):
    if chosen:
        (out / path.name).write_bytes("".join(chosen).encode())


def over_the_input(out, path, chosen):
    for target in (out / path.name, path):
        target.write_bytes("".join(chosen).encode())


def by_number(out, path, chosen):
    (out / f"{len(list(out.iterdir()))}.txt").write_bytes("".join(chosen).encode())


def unix(out, path, chosen):
    (out / path.name).write_bytes("".join(chosen).replace("\r\n", "\n").encode())


def joined(out, path, chosen):
    (out / path.name).write_bytes("".join(line.rstrip("\r\n") for line in chosen).encode())


def one_more_feed(out, path, chosen):
    (out / path.name).write_bytes("".join(f"{line}\n" for line in chosen).encode())


def pieces(lines, counts, seen):
    """Split at every separator of str.splitlines, each part with its end."""
    parts = [part for line in lines for part in line.splitlines(keepends=True)]
    own = collections.Counter(part.rstrip("\r\n\u2028") for part in parts)
    return [x for x in parts if own[x.rstrip("\r\n\u2028")] == 1 and counts[x.rstrip("\r\n")] < 2]


mistake(
    "first copy kept",
    "The first copy of a line stays. A line that occurs on several pages is a menu or a footer: "
    "all of its copies go, so only lines that occur once are kept.",
    kept=first_ones,
)
mistake(
    "each file by itself",
    "Lines are counted in each file alone. Menus and footers occur once on a page and on "
    "many pages: count over all files, then write.",
    kept=of_one_file,
)
mistake(
    "neighbors alone",
    "Only a line that is equal to the one before it is dropped, as the program uniq does. "
    "Copies are far apart and in other files: count with a dictionary.",
    kept=neighbors,
)
mistake(
    "spaces ignored",
    "Lines are stripped before they are compared, so an indented line is a copy of the one that "
    "is not. The comparison is exact; only the line end does not count.",
    count=str.strip,
)
mistake(
    "capitals ignored",
    "Lines are compared in lower case. Exact duplicates are equal character by character; "
    "almost equal texts are MinHash's subject.",
    count=lambda line: line.rstrip("\r\n").lower(),
)
mistake(
    "line feed compared",
    "The line feed is part of the line, so the last line of a file that ends without one "
    "equals no other. Remove it before hashing.",
    count=lambda line: line,
)
mistake(
    "blank lines kept",
    "Blank lines stay, however often they occur. The assignment makes no exception: a blank line is a line.",
    kept=lambda lines, counts, seen: [x for x in lines if not x.strip() or counts[x.rstrip("\r\n")] == 1],
)
mistake(
    "sorted lines",
    "The lines are written in sorted order, as a set or a sort leaves them. A text is read in its "
    "order: go through the file a second time.",
    kept=lambda lines, counts, seen: sorted(x for x in lines if counts[x.rstrip("\r\n")] == 1),
)
mistake(
    "every separator a line end",
    "str.splitlines also cuts at U+2028 and other characters. The lines of a file "
    "end with a line feed: iterate over the file, or split at it.",
    kept=pieces,
)
mistake(
    "empty files left out",
    "A file with no lines left is not written. Each input has one output of its name, "
    "which may be empty: else files are missing later.",
    write=unless_empty,
)
mistake(
    "input overwritten",
    "The input files are written as well. The raw data is the only copy of what was "
    "crawled: write to the output directory alone.",
    write=over_the_input,
)
mistake(
    "names by number",
    "The outputs are numbered instead of named as the inputs, so they cannot be assigned "
    "to their inputs. Use the name of the input.",
    write=by_number,
)
mistake(
    "windows line ends lost",
    "Line ends of Windows are written as line feeds, as text mode does. Lines that stay "
    'must not change: open with newline="".',
    write=unix,
)
mistake(
    "line feeds lost",
    "The lines are joined without their line feeds, and the text becomes one line. Keep the "
    "end of each line for writing.",
    write=joined,
)
mistake(
    "one more line feed",
    "A line feed is added to lines that have one already, so every other line is blank. "
    "print adds one, write does not.",
    write=one_more_feed,
)
mistake(
    "folder must exist",
    "The output directory is not created, and the program fails where it does not exist yet. "
    "Create it with its parents.",
)
