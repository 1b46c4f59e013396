"""README's commands, run one after the other in a fresh clone.

uv run pytest -m slow tests/test_docs_replay.py
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import documents
import pytest

pytestmark = pytest.mark.slow

# what a learner would have written after `learn start`
MINE = "def silu(x):\n    return x * x.sigmoid()\n"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone of the last commit, and a text."""
    if shutil.which("git") is None or not (documents.ROOT / ".git").exists():
        pytest.skip("needs git and its history")
    folder = tmp_path_factory.mktemp("replay") / "llm_basics"
    subprocess.run(["git", "clone", "-q", str(documents.ROOT), str(folder)], check=True)
    (folder / "book.txt").write_text("Call me Ishmael. Some years ago, never mind how long.\n" * 2000)
    return folder


def runnable(words: Sequence[str]) -> list[str] | None:
    """A command of README in this environment, short: few training steps, few tests. None: not one to run."""
    words = list(words[4:] if words[2:3] == ["--extra"] else words[2:])
    if words[:1] == ["llm-basics"]:
        return [sys.executable, "-m", "llm_basics", *words[1:]]
    if words[:1] == ["pytest"] and len(words) > 1:
        adapters = [word.replace("path/to/", "") for word in words]
        return [sys.executable, "-m", *adapters, "-k", "silu"]
    if words[:2] != ["python", "-m"]:
        return None
    steps = "25" if "--resume" in words else "20"
    return [sys.executable, *words[1:], *(["--train.steps", steps] if words[2] == "llm_basics.train" else [])]


def address_of(command: Sequence[str], cwd: Path, env: dict[str, str], **_: bool) -> str:
    """The first line of a server, which is then ended."""
    serve = [*command, "--port", "0", "--no-browser"]
    with subprocess.Popen(serve, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        server.terminate()
    return line


def test_every_command_of_readme_runs_in_a_fresh_clone(clone):
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    options = {"cwd": clone, "env": environment, "capture_output": True, "text": True}
    commands = [each for each in map(runnable, documents.commands(documents.README.read_text())) if each]
    assert len(commands) >= 9
    for command in commands:
        if "--mine" in command:
            (clone / "mine.py").write_text(MINE)
        if "llm_basics.lab" in command:
            assert address_of(command, **options).startswith("the lab   http://127.0.0.1:")
            continue
        done = subprocess.run(command, **options)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert len(list((clone / "runs").iterdir())) >= 3
