"""The wheel: the course without a clone. Alone: `uv run pytest tests/test_wheel.py`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# as of 2026-11-30 configs and lessons need 80 kB
MOST_DATA_BYTES = 300_000


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel of this package, without dependencies."""
    if (uv := os.environ.get("UV") or shutil.which("uv")) is None:
        pytest.skip("building the wheel needs uv on PATH")
    folder = tmp_path_factory.mktemp("wheel")
    # hatchling is in uv's cache wherever `uv sync` has installed this package
    options = ["--wheel", "--offline", "--python", sys.executable, "--out-dir", str(folder)]
    built = subprocess.run([uv, "build", *options, str(REPOSITORY)], capture_output=True, text=True)
    if "network was disabled" in built.stderr:
        pytest.skip("building the wheel needs hatchling in uv's cache")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_the_package_the_adapters_and_little_data(installed):
    adapters = (installed / "llm_basics" / "learn" / "adapters.py").read_bytes()
    assert adapters == (REPOSITORY / "tests" / "adapters.py").read_bytes()
    assert [path.name for path in installed.iterdir() if path.suffix != ".dist-info"] == ["llm_basics"]
    sources = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "llm_basics").rglob("*.py")}
    files = {path.relative_to(installed): path for path in (installed / "llm_basics").rglob("*.*")}
    assert {path for path in files if path.suffix == ".py"} == {
        *sources,
        Path("llm_basics/learn/adapters.py"),
    }
    assert sum(path.stat().st_size for path in files.values() if path.suffix != ".py") < MOST_DATA_BYTES


PROGRAM = """
import sys, llm_basics
from llm_basics.learn import __main__ as learn
print(llm_basics.__file__)
for arguments in (["show", "silu"], ["check"], ["mistakes", "silu"], ["dojo"]):
    print(arguments, learn.main(arguments), flush=True)
"""


def test_the_course_runs_without_a_clone(installed, tmp_path):
    (tmp_path / "mine.py").write_text("import torch\ndef silu(x):\n    return torch.sigmoid(x)\n")
    # in one process, since importing torch takes most of the time
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(installed / "llm_basics" / "__init__.py")
    assert "uv run pytest" not in done.stdout and "['show', 'silu'] 0" in lines
    assert "  mistake: SIGMOID ALONE" in lines and "['check'] 1" in lines
    assert "| silu | 13 | 13 | 13 |" in lines and "['mistakes', 'silu'] 0" in lines
    assert "Which mistake is it?" in lines and "['dojo'] 0" in lines
