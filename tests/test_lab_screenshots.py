"""Pictures of the lab for its documentation, skipped by default:

LAB_SCREENSHOTS=docs/lab LAB_RUNS=/path/of/runs LAB_RUN=NAME uv run pytest tests/test_lab_screenshots.py

LAB_RUNS is a folder of runs, LAB_RUN the name of the one to show. Without them: a run of these tests.
LAB_CHAT and LAB_RL are runs there of sft and rl, LAB_MINE is a learner's file.
"""

import io
import os
from pathlib import Path

import lab_server
import pytest

pytest.importorskip("playwright", reason="needs playwright (uv sync)")
pytest.importorskip("fastapi", reason="needs uv sync --extra lab")

from PIL import Image
from playwright import sync_api

from llm_basics.lab import catalog

pytest_plugins = ["lab_fixtures"]

FOLDER = os.environ.get("LAB_SCREENSHOTS")
pytestmark = pytest.mark.skipif(not FOLDER, reason="writes pictures, to the folder LAB_SCREENSHOTS")

MAX_BYTES = 150_000
SIZES = {"desktop": {"width": 1280, "height": 960}, "phone": {"width": 390, "height": 844}}
SHOWN = [(view, "desktop") for view in lab_server.VIEWS] + [
    (view, "phone") for view in ("runs", "run", "play")
]


# parts of views: view, variable with the name of the run, section
PARTS = {
    "chat": ("play", "LAB_CHAT", ".lane"),
    "checkpoints": ("run", "LAB_RUN", ".checkpoints"),
    "rollouts": ("run", "LAB_RL", ".rollouts"),
}


@pytest.fixture(scope="module")
def shown(trained):
    """A server over the runs to show, and the id of one."""
    runs = Path(os.environ["LAB_RUNS"]).resolve() if "LAB_RUNS" in os.environ else trained.parent
    mine = ["--mine", os.environ["LAB_MINE"]] if "LAB_MINE" in os.environ else []
    server = lab_server.Server(runs, *mine)
    yield server, catalog.id_of(runs / os.environ.get("LAB_RUN", trained.name))
    server.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("view", "size"), SHOWN)
def test_screenshot(open_page, shown, view, size, scheme):
    server, id = shown
    page = open_page(f"#/{view}/{id}", server=server, viewport=SIZES[size], color_scheme=scheme)
    if view == "play":
        tokens = page.locator(".tokens .token")
        page.get_by_role("button", name="Generate").click()
        sync_api.expect(page.get_by_role("button", name="Generate")).to_be_visible()
        tokens.nth(30).hover()
        sync_api.expect(page.locator(".popover")).to_be_visible()
    if view == "config":
        sync_api.expect(page.get_by_text("computing on tensors")).to_have_count(0)
    save(page, f"{view}{'-phone' * (size == 'phone')}{'-dark' * (scheme == 'dark')}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("part", PARTS)
def test_screenshot_of_a_part(open_page, shown, part, scheme):
    view, variable, section = PARTS[part]
    if variable not in os.environ:
        pytest.skip(f"needs a run in {variable}")
    id = catalog.id_of(Path(os.environ["LAB_RUNS"]).resolve() / os.environ[variable])
    page = open_page(f"#/{view}/{id}", server=shown[0], viewport=SIZES["desktop"], color_scheme=scheme)
    if part == "chat":
        page.get_by_role("textbox", name="Message").fill("Define start of tail that returns test.")
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".turn.assistant .token").last).to_be_visible()
        sync_api.expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.locator(".turn.assistant .token").nth(2).hover()
        sync_api.expect(page.locator(".popover")).to_be_visible()
    else:
        page.locator(section).wait_for()
        page.locator(section).evaluate("element => element.scrollIntoView({ block: 'center' })")
    save(page, f"{part}{'-dark' * (scheme == 'dark')}.png")


def save(page, name):
    page.wait_for_timeout(500)
    path = Path(FOLDER) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # 256 colors are a third of the bytes
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES
