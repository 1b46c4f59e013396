"""The wheel: the course without a clone. Alone: `uv run pytest tests/test_wheel.py`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import llm_basics

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


def test_a_wheel_has_what_programs_read(installed):
    package = installed / "llm_basics"
    for pattern in ("configs/*.yaml", "configs/sweeps/*.yaml", "learn/lessons/*.yaml", "learn/contract.yaml"):
        wanted = {path.name for path in (REPOSITORY / "llm_basics").glob(pattern)}
        assert wanted and {path.name for path in package.glob(pattern)} == wanted
    page = {path.name for path in (REPOSITORY / "llm_basics" / "lab" / "static").rglob("*.*")}
    assert page and {path.name for path in (package / "lab" / "static").rglob("*.*")} == page
    assert (package / "py.typed").exists() and (package / "analysis" / "normal_loss.json").exists()


def test_metadata_of_a_wheel_agrees_with_the_repository(installed):
    (folder,) = installed.glob("*.dist-info")
    found = message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    versions = {found["Version"], project["version"], llm_basics.__version__}
    versions |= set(re.findall(r"^version: (\S+)$", citation, re.M))
    assert len(versions) == 1, versions
    assert f"## {found['Version']}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert found["License-Expression"] == "MIT" and "# llm_basics" in found.get_payload()
    assert "Programming Language :: Python :: 3.11" in found.get_all("Classifier")
    entries = (folder / "entry_points.txt").read_text(encoding="utf-8")
    assert "llm-basics = llm_basics.__main__:main" in entries
    assert (folder / "licenses" / "LICENSE").exists()


@pytest.mark.slow
def test_the_console_script_of_a_built_package_runs(tmp_path):
    if (uv := os.environ.get("UV") or shutil.which("uv")) is None:
        pytest.skip("building needs uv on PATH")
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([uv, "build", "--offline", "--out-dir", str(tmp_path), str(REPOSITORY)], **run)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "llm_basics/core/model.py", "tests/adapters.py"} <= names
    assert not [name for name in names if name.startswith(("runs/", "data/", ".venv/"))]
    site = tmp_path / "site"
    options = ["--no-deps", "--offline", "--python", sys.executable, "--target", str(site)]
    subprocess.run([uv, "pip", "install", *options, str(wheel)], **run)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([str(site / "bin" / "llm-basics"), "--help"], env=environment, cwd=tmp_path, **run)
    assert done.stdout.startswith("usage: llm-basics COMMAND")
    text = str(REPOSITORY / "README.md")
    train = [
        str(site / "bin" / "llm-basics"),
        "train",
        "--data",
        text,
        "--tokenizer",
        "bytes",
        "--fast",
        "off",
    ]
    options = ["--train.steps", "3", "--run_dir", "run"]
    subprocess.run([*train, *options], env=environment, cwd=tmp_path, **run)
    assert list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))


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
