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
    steps = {"--resume": "25"}.get(next((word for word in words if word == "--resume"), ""), "20")
    return [sys.executable, *words[1:], *(["--train.steps", steps] if words[2] == "llm_basics.train" else [])]


def test_every_command_of_readme_runs_in_a_fresh_clone(clone):
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    options = {"cwd": clone, "env": environment, "capture_output": True, "text": True}
    commands = [each for each in map(runnable, documents.commands(documents.README.read_text())) if each]
    assert len(commands) >= 9
    for command in commands:
        if "--mine" in command:
            (clone / "mine.py").write_text(MINE)
        if "llm_basics.lab" in command:
            with pytest.raises(subprocess.TimeoutExpired) as running:
                subprocess.run([*command, "--port", "0", "--no-browser"], timeout=60, **options)
            assert b"the lab   http://127.0.0.1:" in (running.value.stdout or b""), running.value
            continue
        done = subprocess.run(command, **options)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert len(list((clone / "runs").iterdir())) >= 3
