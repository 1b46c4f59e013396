"""Links, files, names, options and commands of the documentation. Alone: `uv run pytest tests/test_docs.py`.

The commands are parsed by the programs that they start, without running them.
"""

import itertools
import re
import shlex

import documents
import documents_commands
import pytest
import test_style

import llm_basics
from llm_basics.learn import lessons

PAGES = documents.pages()
README, WORKLOG = documents.README, documents.WORKLOG
ids = {"ids": lambda value: str(value.relative_to(documents.ROOT)) if hasattr(value, "relative_to") else None}


# --------------------------------------------------------------------------------------------------
# Links, files, names, options


@pytest.mark.parametrize("page", [*PAGES, WORKLOG], **ids)
def test_links_lead_to_files_and_headings(page):
    wrong = [link for link in documents.links(page) if not documents.leads_somewhere(page, link)]
    assert not wrong, f"{page.name} has links that lead nowhere: {wrong}"


@pytest.mark.parametrize("page", [*PAGES, WORKLOG], **ids)
def test_files_exist(page):
    wrong = [name for name in documents.file_names(page) if not documents.is_file_here(name)]
    assert not wrong, f"{page.name} names files that are not in the repository: {wrong}"


@pytest.mark.parametrize("page", [*PAGES, WORKLOG], **ids)
def test_names_exist(page):
    wrong = [name for name in documents.dotted_names(page) if not documents.is_known_name(name)]
    assert not wrong, f"{page.name} names what no module has: {wrong}"


@pytest.mark.parametrize("page", [*PAGES, WORKLOG], **ids)
def test_options_exist(page):
    known = documents_commands.options()
    wrong = [name for name in documents.option_names(page) if documents.plain_option(name) not in known]
    assert not wrong, f"{page.name} names options that no program has: {wrong}"


def test_what_is_wrong_is_found():
    assert documents.leads_somewhere(README, "docs/promises.md#exit-status")
    for link in ("docs/nothing.md", "docs/promises.md#nothing", "#nothing", "../elsewhere.md"):
        assert not documents.leads_somewhere(README, link)
    assert documents.is_file_here("core/functional.py") and not documents.is_file_here("core/functionall.py")
    assert documents.is_file_here("systems/") and not documents.is_file_here("sistems/")
    for name in ("functional.silu", "core.trainer.train_step", "trainer.Trainer.training_step", "train.lr"):
        assert documents.is_known_name(name)
    for name in ("functional.sillu", "core.train.train_step", "trainer.Trainer.train", "train.lrate"):
        assert not documents.is_known_name(name)
    assert "--train.lr" in documents_commands.options()
    assert "--train.lrate" not in documents_commands.options()


# --------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("page", PAGES, **ids)
def test_commands_are_accepted_by_their_programs(page, command_line):
    for command in documents.commands(page.read_text(encoding="utf-8")):
        documents_commands.check(command, command_line)


def test_commands_of_the_worklog_are_accepted(command_line):
    found = {tuple(command): command for command in documents.commands(WORKLOG.read_text(encoding="utf-8"))}
    # of the commands that each lesson has, those of one step
    generated = ("start", "check", "predict", "solution")
    others = {(verb, step) for verb in generated for step in lessons.ORDER if step != "linear"}
    assert others <= {command[5:] for command in found}
    by_hand = [command for key, command in found.items() if key[5:] not in others]
    assert len(by_hand) > 60
    for command in by_hand:
        documents_commands.check(command, command_line)


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    """Parses arguments by the program that they are for."""
    return documents_commands.CommandLine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("uv run python -m llm_basics.train --dta book.txt", "the closest is --data"),
        ("uv run python -m llm_basics.trian", "trian"),
        ("uv run llm-basics tokenizer trian", "did you mean train"),
        ("uv run llm-basics doctor plan --gpus few", "few"),
        ("uv run --extra labb python -m llm_basics.lab", "labb"),
        ("uv run torchrun --nproc_per_node 2 -m llm_basics.train --train.paralel ddp", "train.parallel"),
        ("uv run torchrun --nprocs 2 -m llm_basics.train", "--nprocs"),
        ("uv run pytest tests/test_modell.py", "test_modell.py"),
        ("uv run pytest tests/test_model.py::test_nothing", "test_nothing"),
        ("uv run pytest tests/test_model.py -k nothing_like_it", "nothing_like_it"),
        ("uv run pytest -m slwo", "slwo"),
        ("uv run pytest --adapter=x", "--adapter"),
        ("uv run python benchmarks/parallel.py smae", "smae"),
        ("uv run python benchmarks/paralel.py same", "paralel"),
        ("uv run pyest", "pyest"),
    ],
)
def test_a_wrong_command_is_found(command, message, command_line):
    with pytest.raises(AssertionError, match=re.escape(message)):
        documents_commands.check(shlex.split(command), command_line)


# --------------------------------------------------------------------------------------------------
# Sizes, and the worklog's template

SECTIONS = [
    "Objective:",
    "Actions & Command(s):",
    "Observations & Results:",
    "Analysis & Decisions:",
    "Artifacts:",
]


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_lists_the_wings_in_their_order():
    listed = re.findall(r"^    (\w+)(?:/|\.py) ", README.read_text(encoding="utf-8"), re.M)
    assert tuple(listed) == test_style.WINGS
    assert tuple(re.findall(r"^    (\w+) ", llm_basics.__doc__ or "", re.M)) == test_style.WINGS


def test_every_page_is_in_the_index():
    index = documents.ROOT / "docs" / "index.md"
    linked = {documents.target(index, link) for link in documents.links(index)}
    assert set((documents.ROOT / "docs").glob("*.md")) <= {*linked, index}


def test_the_plan_of_a_class_has_every_step():
    page = (documents.ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    plan = page.partition("## Ten sessions")[2].partition("\n## ")[0]
    rows = [line for line in plan.splitlines() if re.match(r"\| \d+\.", line)]
    named = [step for row in rows for step in re.findall(r"`(\w+)`", row.split("|")[2])]
    assert len(rows) == 10
    assert sorted(named) == sorted(lessons.ORDER)


def faults_of_worklog(text: str) -> list[str]:
    """Where a worklog departs from its template and its order."""
    entries = documents.worklog_entries(text)
    times = [time for time, _ in entries]
    faults = [f"{later} follows {time}" for time, later in itertools.pairwise(times) if later > time]
    for time, entry in entries:
        if re.findall(r"^\*\*(.+?)\*\*$", entry, re.M) != SECTIONS:
            faults.append(f"the sections of {time}")
        if not re.search(r"^\*   \*\*(Commits?|Command|Log)", entry, re.M):
            faults.append(f"the artifacts of {time}")
    return faults


def test_the_worklog_keeps_its_template():
    text = WORKLOG.read_text(encoding="utf-8")
    assert len(documents.worklog_entries(text)) > 30
    assert not faults_of_worklog(text)
    (newest, _), (second, _), *_ = documents.worklog_entries(text)
    assert faults_of_worklog(text.replace(f"**{newest}**", "**2000-01-01 00:00**")) == [
        f"{second} follows 2000-01-01 00:00"
    ]
    assert faults_of_worklog(text.replace("**Objective:**", "**Aim:**", 1)) == [f"the sections of {newest}"]
    assert f"the artifacts of {newest}" in faults_of_worklog(text.replace("*   **Comm", "*   Comm"))


def test_the_commits_that_the_worklog_cites_exist():
    cited = set(re.findall(r"\*\*Commit:\*\* (\w+)", WORKLOG.read_text(encoding="utf-8")))
    known = documents.commits()
    if known is None:
        pytest.skip("a clone without its whole history")
    assert len(cited) > 10
    assert not [each for each in cited if not any(commit.startswith(each) for commit in known)]
