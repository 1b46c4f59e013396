"""The site's pages, and the notebooks with their scripts. Alone: `uv run pytest tests/test_docs_site.py`."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import documents
import pytest
import yaml

NOTEBOOKS = sorted((documents.ROOT / "docs" / "notebooks").glob("*.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder with the Markdown pages of the site."""
    build = runpy.run_path(str(documents.ROOT / "docs" / "build.py"))
    folder = tmp_path_factory.mktemp("site")
    # the functions read the folder from their module's names
    build["write_pages"].__globals__["PAGES"] = folder
    build["write_pages"]()
    return folder


def test_the_navigation_has_every_page(site):
    settings = yaml.safe_load((documents.ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w/]+\.md", json.dumps(settings["nav"]))
    assert sorted(listed) == sorted(path.relative_to(site).as_posix() for path in site.rglob("*.md"))


def test_lists_of_the_worklog_stand_apart(site):
    text = (site / "worklog.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\*\*Objective:\*\*\n\n\*   ", text, re.M)) > 40
    assert not re.findall(r"^\*\*.+:\*\*\n[*1]", text, re.M)
    # nor does an item follow code without an empty line
    assert len(re.findall(r"^    ```\n\n\*   ", text, re.M)) > 40
    assert not re.findall(r"^ +```\n\*   ", text, re.M)


def test_links_of_the_site_stay_in_it(site):
    n_links = 0
    for page in site.rglob("*.md"):
        for link in documents.links(page):
            target = documents.target(page, link)
            assert target.exists() and target.is_relative_to(site), f"{page.name}: {link}"
            anchor = link.partition("#")[2] if target.suffix == ".md" else ""
            assert not anchor or anchor in documents.anchors(target), f"{page.name}: {link}"
            n_links += 1
    assert n_links > 60


def test_the_site_chooses_pictures_by_its_color_scheme(site):
    for name in ("overview", "concepts"):
        text = (site / f"{name}.md").read_text(encoding="utf-8")
        assert "<picture>" not in text
        assert text.count(".png#only-light)") == text.count("-dark.png#only-dark)") > 0


def test_figures_of_the_concepts_are_light_and_dark_and_small():
    sizes = {path.name: path.stat().st_size for path in (documents.ROOT / "docs/concepts").glob("*.png")}
    light = {name for name in sizes if not name.endswith("-dark.png")}
    assert {name.replace(".png", "-dark.png") for name in light} == sizes.keys() - light
    assert max(sizes.values()) < 60_000
    pages = sorted((documents.ROOT / "docs").glob("concepts*.md"))
    shown = {Path(link).name for page in pages for link in documents.links(page) if link.endswith(".png")}
    assert shown == set(sizes)


def test_the_reference_has_signatures_and_examples(site):
    page = (site / "reference" / "core.md").read_text(encoding="utf-8")
    assert "\nsilu(x: Float[Tensor, '...']) -> Float[Tensor, '...']\n" in page
    assert "### RMSNorm" in page and "```pycon\n>>> silu(" in page


def cells(script: str) -> list[tuple[str, str]]:
    """Kind and source of each cell of a script in the percent format.

    >>> cells("# %% [markdown]\\n# a\\n\\n# %%\\nb\\n")
    [('markdown', 'a'), ('code', 'b')]
    """
    found = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        text = re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE) if kind == "markdown" else body.strip()
        found.append((kind, text))
    return found


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_script(script):
    notebook = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert found == cells(script.read_text(encoding="utf-8")), "uvx jupytext --sync docs/notebooks/*.py"
    assert not any(cell.get("outputs") for cell in notebook["cells"])


def test_the_first_model_is_short():
    script = (documents.ROOT / "docs" / "notebooks" / "first_model.py").read_text(encoding="utf-8")
    code = "\n".join(text for kind, text in cells(script) if kind == "code")
    assert len([line for line in code.splitlines() if line.strip()]) < 40


@pytest.mark.slow
@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_script_of_a_notebook_runs(script: Path, tmp_path):
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(documents.ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
