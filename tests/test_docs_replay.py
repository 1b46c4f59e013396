"""The commands of README and of all pages in docs/, run one after the other in a fresh clone, shortened.

uv run pytest -m slow tests/test_docs_replay.py                  all pages
uv run pytest -m slow tests/test_docs_replay.py -k training      one page
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import documents
import pytest

pytestmark = pytest.mark.slow

DOCS = documents.ROOT / "docs"
EXPERIMENTS = DOCS / "experiments.md"
PAGES = [documents.README, *(page for page in sorted(DOCS.glob("*.md")) if page != EXPERIMENTS)]

# what cannot run here: an expression that its commands match, and the reason
NOT_RUN = {
    r"\bsrun\b": "needs SLURM",
    r"--nnodes 2": "needs two machines",
    r"prepare tinystories": "needs the network",
    r"--data data/tinystories": "needs the result of the command before, which needs the network",
    r"tokenizer compare my_tokenizer gpt2": "needs the network",
    r"llm_basics\.lm_harness": "needs the packages of the extra eval, which are not installed",
    r"^llm-basics \w+$": "the name of a program in a sentence",
}

BATCHES = "--train.eval_every 10 --train.eval_batches 2 --train.sample_tokens 10 --train.batch_size 8"
SHAPE = "--model.d_model 32 --model.n_layers 2 --model.n_heads 2 --model.context_length 64"

# options that shorten a command: those of the first expression that it matches
SHORTER = {
    r"--help": "",
    r"llm_basics\.lab": "--port 0 --no-browser",
    r"llm_basics\.train .*--replay": "",
    r"llm_basics\.train .*--resume": "--train.steps 30",
    r"llm_basics\.train .*--init_from": f"--train.steps 20 {BATCHES}",
    r"llm_basics\.train .*gpt2-small": f"--tokenizer bytes --train.steps 5 {BATCHES} {SHAPE}"
    " --train.grad_accumulation_steps 1",
    r"llm_basics\.train": f"--train.steps 20 {BATCHES} {SHAPE}",
    r"llm_basics\.sft .*--resume": "--train.steps 30",
    r"llm_basics\.sft": f"--train.steps 20 {BATCHES}",
    r"llm_basics\.distill": f"--train.steps 20 {BATCHES} {SHAPE}",
    r"llm_basics\.rl": f"--train.steps 2 {BATCHES} --rl.group_size 4 --rl.max_new_tokens 8",
    r"llm_basics\.dpo .*--data": f"--train.steps 5 {BATCHES}",
    r"llm_basics\.dpo": f"--train.steps 5 {BATCHES} --dpo.prompts 40 --dpo.max_new_tokens 8",
    r"llm_basics\.(generate|chat)": "--max_new_tokens 10",
    r"llm_basics\.evaluate .*--answers": "--max_new_tokens 3 --best_of 2 --majority 2",
    r"llm_basics\.evaluate (runs/base|.*--stride)": "--data more.txt",
    r"llm_basics\.probe": "--steps 20",
    r"llm_basics\.learn race": "--steps 10 --data book.txt",
    r"llm_basics\.learn mistakes$": "silu",
    r"normal_loss\.py": "--seeds 1 --steps 20",
    r"quantization\.py": "--tokens 2000 --new-tokens 10 --rounds 1",
    r"^pytest tests/test_steps\.py": "-k silu",
    # these tests are run by the suite; here that the command selects some
    r"^pytest": "--collect-only",
}

# a finished piece, as a learner would have written it after `learn start`
MINE = r"printf 'def silu(x):\n    return x * x.sigmoid()\n' > mine.py"
EXPORTED = "rm -rf path/to/gpt2 runs/gpt2; uv run python -m llm_basics.export runs/NAME --out path/to/gpt2"
SPLIT = "uv run python -m llm_basics.checkpoint split runs/NAME/checkpoints/step_00000500.safetensors"
# a run that trains for some seconds, from the moment it takes commands
TRAINS = f"""AS_IT_IS=1 uv run python -m llm_basics.train --run_dir runs/steered --train.steps 1000 {SHAPE} &
until [ -s runs/steered/metrics.jsonl ]; do sleep 0.1; done"""

# one submission of each kind
SUBMIT = "rm -rf submissions; mkdir -p reports submissions"
PROJECT = f"{SUBMIT}/ada; ln -s ../../tests submissions/ada/tests"
FILE = f"{SUBMIT}; {MINE.replace('mine.py', 'submissions/ada.py')}"

SHORT_SWEEP = "sed -i 's/steps: 300/steps: 10/; s/lr: .*/lr: [1e-3]/' llm_basics/configs/sweeps/lr.yaml"

# the runs of `clone`
START = ["train --run_dir runs/a-first --train.seed 1", "train --run_dir runs/a-second"]
START += ["sft --init_from runs/a-first --run_dir runs/a-chat"]

# what a command needs beside the inputs of `clone`: an expression that it matches, and lines of shell
BEFORE = {
    r"learn start": "rm -f mine.py",
    r"\bnewest\b": "rm -rf runs/gpt2",  # an imported model has no metrics and no text
    r"--mine mine\.py|learn check": MINE,
    r"learn check attention": "uv run python -m llm_basics.learn start attention",
    r"in submissions/\*;": PROJECT,
    r"in submissions/\*\.py": FILE,
    r"import_model": EXPORTED,
    r"checkpoint merge": SPLIT,
    r"llm_basics\.steer": TRAINS,
    r"llm_basics\.sweep": SHORT_SWEEP,
}

# programs that do not end by themselves, and what they print before they are stopped
ENDLESS = {r"llm_basics\.lab": "the lab   http://127.0.0.1:", r"check --watch": "waiting for mine.py"}

# where exit status 1 is a verdict: on a model that these short runs have not made a good one, on a stub
VERDICTS = r"llm_basics\.(learn read|learn check attention|probe)"

# runs that the pages call by these names are the newest, or the second newest, of those here
PLACES = {"NAME": 0, "CHAT": 0, "A": 0, "B": 1, "one": 0, "two": 1, "LARGE": 1}


# --------------------------------------------------------------------------------------------------
# Commands


def commands(page: Path) -> list[tuple[int, str]]:
    """The line number and text of each command or loop that starts our programs, without its comment."""
    found, is_shell, whole = [], False, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_shell = line.strip() == "```sh"
        elif is_shell:
            whole += line
            if line.endswith("\\"):
                whole = whole[:-1]
                continue
            if whole.startswith("for ") and line != "done":
                whole += "\n"
                continue
            command, whole = re.sub(r"\s+# .*", "", whole), ""
            found += [(number, command)] if re.search(r"\buv run |\bllm-basics ", command) else []
        else:
            codes = re.findall(r"`([^`]+)`", line)
            found += [(number, code) for code in codes if re.match(r"uv run [^`]|llm-basics [a-z]", code)]
    return found


def reason(command: str) -> str | None:
    """Why a command is not run here; None: it is."""
    return next((why for expression, why in NOT_RUN.items() if re.search(expression, command)), None)


def shim() -> str:
    """A program for the place of uv: starts in this environment what follows `uv run`, shortened."""
    start = '#!/bin/bash\nshift\n[ "$1" = --extra ] && shift 2\n[ -n "$AS_IT_IS" ] && exec "$@"\n'
    cases = (f'grep -qP -- \'{each}\' <<< "$*" && exec "$@" {more}\n' for each, more in SHORTER.items())
    return start + "".join(cases) + 'exec "$@"\n'


def newest(clone: Path, name: str) -> str:
    """The newest run that fits the name of a page: a chat model for CHAT, else one that continues text."""
    runs = sorted(clone.glob("runs/*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    specials = {path: (path.parent / "tokenizer" / "special_tokens.json").read_text() for path in runs}
    fitting = [path.parent for path in runs if ("user" in specials[path]) == (name == "CHAT")]
    return str(fitting[PLACES[name]].relative_to(clone))


def concrete(clone: Path, command: str) -> str:
    """A command with runs and checkpoints of the clone in place of a page's placeholders."""
    names = rf"(?<!run_dir )\bruns/({'|'.join(PLACES)})\b"
    made = re.search(r"--run_dir (runs/\S+)", command)
    command = re.sub(names, lambda found: made[1] if made else newest(clone, found[1]), command)
    for run in re.findall(r"(runs/\S+)/checkpoints", command):
        steps = sorted(clone.glob(f"{run}/checkpoints/step_*.safetensors"))
        command = command.replace("step_00000500", steps[-1].stem)
    return command


# --------------------------------------------------------------------------------------------------
# The clone


def environment(clone: Path) -> dict[str, str]:
    """Variables that find the shim, this environment's programs, and the clone's package; no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    path = f"{clone.parent / 'bin'}:{Path(sys.executable).parent}:{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(clone), "WANDB_MODE": "offline", "COLUMNS": "100"}


def run(clone: Path, command: str) -> tuple[int, str]:
    """Run a line of shell; returns its exit status and its output."""
    needed = [lines for expression, lines in BEFORE.items() if re.search(expression, command)]
    options = {"cwd": clone, "env": environment(clone), "stdin": subprocess.DEVNULL, "text": True}
    for expression, line in ENDLESS.items():
        if re.search(expression, command):
            return stopped_after("\n".join([*needed, f"exec {command}"]), line, options)
    script = concrete(clone, "\n".join([*needed, command, "status=$?; wait; exit $status"]))
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], **options, **both)
    return done.returncode, f"{script}\n{done.stdout}"


def stopped_after(script: str, line: str, options: dict) -> tuple[int, str]:
    """Run a program until it prints a line with a beginning; returns 0 if it does, and its output."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(["bash", "-c", script], **options, **both) as program:
        output = ""
        for printed in program.stdout or ():
            output += printed
            if printed.startswith(line):
                program.terminate()
                return 0, output
    return 1, output


def write_inputs(clone: Path) -> None:
    """The files that the pages leave to the reader."""
    pages = [page.read_text(encoding="utf-8").replace("<|endoftext|>", "") for page in documents.pages()]
    (clone / "book.txt").write_text("\n".join(pages), encoding="utf-8")
    (clone / "more.txt").write_text(documents.README.read_text(encoding="utf-8") * 2, encoding="utf-8")
    (clone / "prompts.txt").write_text("def \nclass \n")
    records = {
        "pages.jsonl": [{"text": text, "body": text} for text in pages],
        "answers.jsonl": [{"prompt": f"What is {n}?", "completion": f"{n}."} for n in range(40)],
        "pairs.jsonl": [{"prompt": f"What is {n}?", "chosen": f"{n}.", "rejected": "no"} for n in range(40)],
        "questions.jsonl": [{"prompt": "1 + 1 is", "choices": ["1", "2"], "answer": 1}] * 10,
    }
    for name, rows in records.items():
        (clone / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in ("pages.jsonl.gz", "dump.gz"):
        (clone / name).write_bytes(gzip.compress((clone / "pages.jsonl").read_bytes()))
    for name, page, kind in (("mine.yaml", "training", "yaml"), ("my_reward.py", "post_training", "python")):
        fences = documents.split_code((DOCS / f"{page}.md").read_text(encoding="utf-8"))[1]
        (clone / name).write_text(next(code for found, code in fences if found == kind))
    (clone / "path" / "to").mkdir(parents=True)
    (clone / "path" / "to" / "tests").symlink_to(clone / "tests")
    (clone / "path" / "to" / "my_adapters").symlink_to(clone / "my_adapters")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone of the last commit, with the reader's files, two small runs, and one of a chat model."""
    if shutil.which("git") is None or not (documents.ROOT / ".git").exists():
        pytest.skip("needs git and its history")
    folder = tmp_path_factory.mktemp("replay") / "llm_basics"
    subprocess.run(["git", "clone", "-q", str(documents.ROOT), str(folder)], check=True)
    (folder.parent / "bin").mkdir()
    (folder.parent / "bin" / "uv").write_text(shim())
    (folder.parent / "bin" / "uv").chmod(0o755)
    write_inputs(folder)
    for command in START:
        status, output = run(folder, f"uv run python -m llm_basics.{command}")
        assert status == 0, output
    return folder


done: set[str] = set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page, clone, capsys):
    start = time.monotonic()
    # a command that an earlier page has, too, has been run
    todo = [each for each in commands(page) if reason(each[1]) is None and each[1] not in done]
    failures = []
    for number, command in todo:
        status, output = run(clone, command)
        done.add(command)
        is_verdict = status == 1 and re.search(VERDICTS, command) and "Traceback" not in output
        if status != 0 and not is_verdict:
            failures.append(f"{page.name}:{number}: {command}\nexit status {status}\n{output}")
    with capsys.disabled():
        print(f"\n{page.name}: {len(todo)} commands in {time.monotonic() - start:.0f} s")
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("expression", NOT_RUN)
def test_what_is_not_run_is_still_on_a_page(expression):
    assert any(re.search(expression, command) for page in PAGES for _, command in commands(page))
