"""The lab in a real browser. Alone: uv run --extra lab pytest tests/test_lab_browser.py

Without chromium these tests are skipped. No page may have an error on its console or load from elsewhere.
"""

import re

import lab_server
import pytest

pytest.importorskip("playwright", reason="needs playwright (uv sync)")
pytest.importorskip("fastapi", reason="needs uv sync --extra lab")

from playwright import sync_api

from llm_basics.lab import catalog
from llm_basics.runs import run_dir

pytest_plugins = ["lab_fixtures"]

expect = sync_api.expect

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}
VIEWS = lab_server.VIEWS
# one by default
SOME_VIEWS = [VIEWS[0], *(pytest.param(view, marks=pytest.mark.slow) for view in VIEWS[1:])]

# a run that is started from the page: small steps, many of them
OPTIONS = """tokenizer=bytes
fast=off
model.d_model=16
model.n_layers=1
model.n_heads=2
model.context_length=32
train.batch_size=2
train.steps=50000
train.eval_batches=1
train.sample_tokens=4
train.log_every=20"""


def tile(page, name):
    """A number at the head of a run."""
    return page.locator(".tile", has_text=name).locator("b").first


def row(page, name):
    return page.locator(".row", has=page.get_by_role("link", name=name, exact=True))


def labels(tokens):
    """Tokens with their probabilities."""
    return tokens.evaluate_all("all => all.map(each => each.getAttribute('aria-label'))")


# --------------------------------------------------------------------------------------------------
# Runs


def test_a_run_is_started_watched_steered_paused_resumed_and_stopped(open_page, server):
    page = open_page()
    page.get_by_role("button", name="New run").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("combobox", name="Text").select_option("corpus.txt")
    dialog.get_by_label("Name", exact=True).fill("live")
    dialog.get_by_label("Options").fill(OPTIONS)
    dialog.get_by_role("button", name="Start").click()
    page.wait_for_url("**/#/run/*")
    expect(page.locator(".heading .chip")).to_have_text("training")
    expect(page.get_by_role("heading", name="live")).to_be_visible()

    def step():
        return int(re.sub(r"\D", "", tile(page, "step").inner_text().partition("/")[0]) or 0)

    lab_server.wait_until(lambda: step() >= 20)
    before, curve, n_requests = step(), lab_server.picture(page, ".chart canvas"), len(page.watch.paths)
    lab_server.wait_until(lambda: step() > before and lab_server.picture(page, ".chart canvas") != curve)
    # what is new arrives on the stream: nothing is read again
    assert not [path for path in page.watch.paths[n_requests:] if "/metrics" in path]

    steer = page.locator(".steer")
    steer.get_by_label("learning rate").fill("0.00125")
    steer.get_by_role("button", name="Apply").click()
    expect(steer.locator("li")).to_contain_text(["accepted"])
    expect(page.locator(".events")).to_contain_text("0.00125")
    steer.get_by_role("button", name="Save now").click()
    expect(page.locator(".checkpoints tbody tr").first).to_be_visible()
    # a run that trains keeps its checkpoints and its name
    expect(page.locator(".checkpoints").get_by_role("button", name="Delete").first).to_be_disabled()
    expect(page.get_by_role("button", name="Rename")).to_have_count(0)
    steered = [event for event in run_dir.read_events(server.runs / "live") if event["event"] == "steered"]
    assert [event["changed"] for event in steered] == [{"train.lr": [0.015, 0.00125]}, {}]

    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".heading .chip")).to_have_text("paused")
    paused = step()
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".heading .chip")).to_have_text("training")
    lab_server.wait_until(lambda: step() > paused)
    expect(page.locator(".events")).to_contain_text("resumed")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".heading .chip")).to_have_text("stopped")
    assert step() > paused
    assert not (server.runs / "live" / "lock").exists()


def test_runs_are_searched_overlaid_and_deleted(open_page, trained):
    other = lab_server.copy_run(trained, "to delete", lr=1e-2)
    page = open_page()
    row(page, "to delete").wait_for()
    n_runs = page.locator(".row .name").count()
    page.get_by_label("Search runs").fill("WIDE fin")
    expect(page.locator(".row .name a")).to_have_text(["wide"])
    page.get_by_label("Search runs").fill("")
    expect(page.locator(".row .name")).to_have_count(n_runs)

    row(page, "shakespeare").get_by_role("checkbox").check()
    empty = lab_server.wait_until(lambda: lab_server.picture(page, ".overlay canvas"))
    row(page, "wide").get_by_role("checkbox").check()
    expect(page.locator(".overlay .legend > span")).to_have_text(["shakespeare", "wide"])
    expect(page.locator(".differences tbody tr")).to_have_count(1)
    expect(page.locator(".differences tbody tr")).to_contain_text(re.compile(r"train\.lr.*0\.01.*0\.003"))
    linear = lab_server.picture(page, ".overlay canvas")
    page.locator(".overlay").get_by_role("button", name="log", exact=True).click()
    lab_server.wait_until(lambda: lab_server.picture(page, ".overlay canvas") not in (linear, empty))

    answers = ["dismiss", "accept"]
    page.on("dialog", lambda dialog: getattr(dialog, answers.pop(0))())
    page.get_by_role("button", name="Delete to delete").click()
    lab_server.wait_until(lambda: len(answers) == 1)
    assert other.is_dir()
    page.get_by_role("button", name="Delete to delete").click()
    expect(row(page, "to delete")).to_have_count(0)
    assert not other.exists() and trained.is_dir()


def test_checkpoints_are_verified_and_deleted_by_keyboard(open_page, trained):
    folder = lab_server.copy_run(trained, "checkpoints", lr=1e-2)
    damaged = folder / run_dir.CHECKPOINTS / "step_00000016.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    page = open_page(f"#/run/{catalog.id_of(folder)}")
    rows = page.locator(".checkpoints tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text(re.compile(r"24.*latest.*kB.*ago"))

    def press(action, step):
        page.get_by_role("button", name=f"{action} the checkpoint of step {step}", exact=True).press("Enter")

    for step, row, state, text in ((24, 0, "accepted", "valid"), (16, 1, "refused", "SHA-256")):
        press("Verify", step)
        expect(rows.nth(row).locator(f".answer.{state}")).to_contain_text(text)
        expect(page.get_by_role("button", name=f"Verify the checkpoint of step {step}")).to_be_focused()
    # the question has the focus; Escape and Keep answer it with no
    confirmation = page.get_by_role("group", name="confirm the deletion")
    for answer in ("Escape", "Enter"):
        press("Delete", 16)
        expect(confirmation).to_contain_text("checkpoint of step 16")
        expect(confirmation.get_by_role("button", name="Keep")).to_be_focused()
        page.keyboard.press(answer)
        expect(confirmation).to_have_count(0)
        expect(page.get_by_role("button", name="Delete the checkpoint of step 16")).to_be_focused()
    assert damaged.exists()
    for step, n_left in ((16, 2), (8, 1)):
        press("Delete", step)
        expect(confirmation).to_be_visible()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(rows).to_have_count(n_left)
    assert [path.name for path in damaged.parent.iterdir()] == ["step_00000024.safetensors"]
    # the last valid one is refused by the server
    press("Delete", 24)
    confirmation.get_by_role("button", name="Delete checkpoint").click()
    expect(page.locator("#message")).to_contain_text("last valid checkpoint")
    expect(rows).to_have_count(1)
    assert page.watch.take("409")


SLOW_PATCH = """() => {
  const send = window.fetch;
  window.fetch = async (path, options) => {
    const response = await send(path, options);
    if (options?.method === "PATCH") await new Promise((done) => setTimeout(done, 2000));
    return response;
  };
}"""


def test_a_run_is_renamed(open_page, trained):
    folder = lab_server.copy_run(trained, "old", lr=1e-2)
    page = open_page(f"#/run/{catalog.id_of(folder)}")
    title, field = page.locator(".heading h1"), page.get_by_role("textbox", name="Name of the run")
    page.get_by_role("button", name="Rename").press("Enter")
    expect(field).to_be_focused()
    page.keyboard.press("Escape")
    expect(title).to_have_text("old")
    expect(page.get_by_role("button", name="Rename")).to_be_focused()
    page.keyboard.press("Enter")
    for name, reason in (("a/b", "a name must have letters"), ("wide", "already a run wide")):
        field.fill(name)
        field.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text(reason)
        expect(field).to_have_value(name)
    # that the old name is gone arrives before the answer
    page.evaluate(SLOW_PATCH)
    field.fill("new.name")
    field.press("Enter")
    expect(title).to_have_text("new.name")
    assert page.url.endswith(catalog.id_of(folder.parent / "new.name"))
    assert not folder.exists() and (folder.parent / "new.name").is_dir()
    expect(page.locator("#message")).not_to_contain_text("deleted")
    assert page.watch.take("422|409")


def test_rollouts_are_shown_by_step_and_prompt(open_page, trained):
    folder = lab_server.copy_run(trained, "rl", lr=1e-2)
    page = open_page(f"#/run/{catalog.id_of(folder)}")
    expect(page.locator(".checkpoints tbody tr")).to_have_count(3)
    expect(page.locator(".rollouts")).to_be_hidden()
    for step in (10, 20):
        lab_server.write_rollouts(folder, step, [f"wrong {step}", f"right {step}"])
    page.reload()
    card, slider = page.locator(".rollouts"), page.get_by_role("slider", name="rollouts by step")
    responses = card.get_by_role("list", name="responses").locator("li")
    expect(responses).to_have_count(2)
    expect(responses.first).to_contain_text(re.compile(r"reward\s*1\s*advantage\s*\+0\.5\s*right 20.*exact"))
    expect(responses.last).to_contain_text(
        re.compile(r"reward\s*0\s*advantage\s*\u22120\.5\s*wrong 20.*cut off")
    )
    slider.press("Home")
    expect(responses.first).to_contain_text("right 10")
    expect(card).to_contain_text("step 10 \u00b7 1 of 2")
    card.get_by_role("combobox").select_option(index=1)
    expect(card.locator("dl.asked")).to_contain_text("prompt 1")
    # a step that is recorded while the last one is shown appears
    slider.press("End")
    expect(responses.first).to_contain_text("right 20")
    lab_server.write_rollouts(folder, 30, ["wrong 30", "right 30"])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "attempt": 1, "train_loss": 0.5, "reward": 0.5}\n')
    expect(responses.first).to_contain_text("right 30")


def test_hostile_runs_do_not_break_the_page(open_page, trained):
    lab_server.make_hostile(trained)
    page = open_page()
    page.on("dialog", lambda dialog: page.watch.faults.append(dialog.message))
    for name in lab_server.HOSTILE_NAMES:
        folder = trained.parent / name
        lab_server.go(page, "#/runs")
        link = page.locator(f".row a[href='#/run/{catalog.id_of(folder)}']")
        expect(link).to_have_text(name, use_inner_text=False)
        for view in VIEWS[1:]:
            lab_server.go(page, f"#/{view}/{catalog.id_of(folder)}")
        lab_server.go(page, f"#/run/{catalog.id_of(folder)}")
        expect(tile(page, "training loss")).to_have_text("3.25")
        expect(page.locator(".events li")).to_contain_text("<img src=x onerror=alert(1)>")
        texts = page.locator(".rollouts li p")
        expect(texts).to_have_text(["?</p><script>x</script>", "<img src=x onerror=alert(1)>"])
    assert page.locator("img, main script").count() == 0
    # a torn line is completed
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('in_loss": 2.125}\n')
    expect(tile(page, "training loss")).to_have_text("2.125")


# --------------------------------------------------------------------------------------------------
# Models


def write_text(open_page, id):
    """The playground after a text of 12 tokens: the page, its button and the tokens."""
    page = open_page(f"#/play/{id}")
    page.get_by_role("button", name="Text", exact=True).click()
    page.get_by_role("textbox", name="Prompt").fill("A king ")
    page.get_by_label("tokens", exact=True).fill("12")
    generate = page.get_by_role("button", name="Generate")
    generate.click()
    tokens = page.locator(".tokens .token")
    expect(tokens).to_have_count(12)
    expect(generate).to_be_visible()
    return page, generate, tokens


def test_text_is_generated_and_goes_on_from_an_alternative(open_page, id):
    page, generate, tokens = write_text(open_page, id)
    before = labels(tokens)
    colors = tokens.evaluate_all("all => all.map(each => getComputedStyle(each).backgroundColor)")
    assert len(set(colors)) > 3 and page.locator(".given.user").inner_text() == "A king "
    # the fourth token, by keyboard; its likeliest alternative
    tokens.nth(3).focus()
    page.keyboard.press("Enter")
    other = page.locator(".popover button:not(.chosen)").first
    expect(other).to_be_visible()
    chosen = other.locator("span").first.inner_text()
    other.click()
    expect(page.locator(".popover")).to_be_hidden()
    lab_server.wait_until(lambda: len(labels(tokens)) > 4 and labels(tokens)[3] != before[3])
    expect(generate).to_be_visible()
    after = labels(tokens)
    assert after[:3] == before[:3] and after[3].startswith(f"{chosen},") and after[3] != before[3]


def test_two_checkpoints_side_by_side(open_page, id):
    page, generate, tokens = write_text(open_page, id)
    written = tokens.all_inner_texts()
    held = []
    page.route("**/samples?limit=1", lambda route: held.append(route))
    page.get_by_role("button", name="Compare two").click()
    first, second = page.locator(".lane").all()
    # text that is generated while the second model is loading would be lost
    lab_server.wait_until(lambda: page.evaluate("1") and held)
    expect(generate).to_be_disabled()
    held.pop().continue_()
    # the same text of the same weights, another one of earlier ones
    for is_same, key in ((True, "End"), (False, "Home")):
        second.get_by_role("slider", name="checkpoint").focus()
        page.keyboard.press(key)
        generate.click()
        for lane, expected in ((first, True), (second, is_same)):
            expect(lane.locator(".token")).to_have_count(12)
            assert (lane.locator(".token").all_inner_texts() == written) == expected
        expect(generate).to_be_visible()


def test_a_chat_model_answers(open_page, id):
    page = open_page(f"#/play/{id}")
    page.get_by_label("tokens", exact=True).fill("5")
    page.get_by_role("textbox", name="Message").fill("Is it a king?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user")).to_have_text("Is it a king?")
    expect(page.locator(".turn.assistant .token").first).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_attention_and_lens_follow_the_slider_of_checkpoints(open_page, id):
    page = open_page(f"#/inside/{id}")
    slider = page.get_by_role("slider", name="checkpoint")
    expect(page.locator(".picker")).to_contain_text("step 24")
    expect(page.locator(".heads canvas")).to_have_count(2)
    last = lab_server.picture(page, ".heads canvas")
    slider.focus()
    page.keyboard.press("Home")
    expect(page.locator(".picker")).to_contain_text("step 8")
    first = lab_server.wait_until(lambda: (now := lab_server.picture(page, ".heads canvas")) != last and now)
    page.get_by_role("button", name="layer 1").click()
    lab_server.wait_until(lambda: lab_server.picture(page, ".heads canvas") not in (first, last))
    # each earlier token is colored by its weight, later ones are not
    page.locator(".attended .token").nth(2).hover()
    titles = page.locator(".attended .token").evaluate_all("all => all.map(each => each.title)")
    assert [title.startswith("weight") for title in titles[:4]] == [True, True, True, False]
    for tab, cells in (("Logit lens", ".lens td"), ("Norms", ".lens td"), ("Neighbors", ".neighbors button")):
        page.get_by_role("button", name=tab).click()
        page.locator(cells).first.wait_for()
        early = page.locator(cells).all_inner_texts()
        slider.focus()
        page.keyboard.press("End")
        lab_server.wait_until(lambda: page.locator(cells).all_inner_texts() not in ([], early))  # noqa: B023
        page.keyboard.press("Home")
        lab_server.wait_until(lambda: page.locator(cells).all_inner_texts() == early)  # noqa: B023


def test_merges_are_replayed(open_page, id):
    page = open_page(f"#/tokens/{id}")
    page.get_by_role("textbox", name="text").fill("ong ong")
    expect(page.locator(".piece")).to_have_count(2)
    expect(page.locator(".replay .word").first.locator("span")).to_have_text(["ong"])
    slider = page.get_by_role("slider", name="merge", exact=True)
    slider.focus()
    page.keyboard.press("Home")
    expect(page.locator(".replay .word").first.locator("span")).to_have_text(["o", "n", "g"])
    page.get_by_role("button", name="Replay").click()
    expect(page.locator(".replay .word").first.locator("span")).to_have_text(["ong"])


# a message of the check, wrapped for a terminal
CHECKED = """softmax: rows of scores (21 of 22 probes passed)
  at entry 0: expected 1, got <b>0</b>;
    2 of 3 wrong
  mistake: SUMMED IN HALF PRECISION
    Half-precision scores are summed, and 8
    bits are left.
  next hint: uv run python -m llm_basics.learn hint softmax --mine mine.py"""


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_last_check_is_not_wrapped_as_on_a_terminal(open_page, id, viewport):
    page = open_page(viewport=viewport)

    def checked(route):
        course = route.fetch().json()
        step = next(each for each in course["steps"] if each["name"] == "softmax")
        step |= {"status": "failed", "is_current": True, "message": CHECKED}
        route.fulfill(json=course)

    page.route("**/api/learn", checked)
    lab_server.go(page, "#/learn")
    verdict = page.locator(".verdict")
    expect(verdict.locator(".probe")).to_have_text("softmax: rows of scores (21 of 22 probes passed)")
    expect(verdict.locator(".difference")).to_have_text(
        ["at entry 0: expected 1, got <b>0</b>; 2 of 3 wrong"]
    )
    expect(verdict.locator(".mistake")).to_have_text("mistake: SUMMED IN HALF PRECISION")
    expect(verdict.locator(".named p")).to_have_text("Half-precision scores are summed, and 8 bits are left.")
    commands = verdict.locator(".command")
    expect(commands).to_have_count(2)
    expect(commands.first).to_have_text("uv run python -m llm_basics.learn hint softmax --mine mine.py")
    # on a phone it comes before the lesson
    lesson, check = page.locator(".card.lesson").bounding_box(), verdict.bounding_box()
    assert (check["y"] < lesson["y"]) == (viewport is PHONE)
    assert page.evaluate(OVERFLOWING) == []
    page.unroute_all(behavior="wait")


# --------------------------------------------------------------------------------------------------
# Everywhere


def test_dark_and_light(open_page, id):
    page = open_page(color_scheme="dark")
    light, dark = "rgb(250, 248, 244)", "rgb(23, 21, 19)"
    expect(page.locator("body")).to_have_css("background-color", dark)
    page.get_by_role("button", name="Theme").click()
    expect(page.locator("body")).to_have_css("background-color", light)
    page.reload()
    expect(page.locator("body")).to_have_css("background-color", light)
    lab_server.go(page, f"#/run/{id}")
    curve = lab_server.wait_until(lambda: lab_server.picture(page, ".chart canvas"))
    page.get_by_role("button", name="Theme").click()
    expect(page.locator("body")).to_have_css("background-color", dark)
    lab_server.wait_until(lambda: lab_server.picture(page, ".chart canvas") != curve)


# the elements that stick out of the window, in words
OVERFLOWING = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll("body *")].filter(each => each.getBoundingClientRect().right > innerWidth + 1)
    .map(each => `${each.tagName}.${each.className} ${Math.round(each.getBoundingClientRect().right)}`)"""


@pytest.mark.parametrize("view", SOME_VIEWS)
def test_a_phone_scrolls_down_only(open_page, id, view):
    page = open_page(f"#/{view}/{id}", viewport=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("innerWidth") == PHONE["width"]
    assert page.evaluate(OVERFLOWING) == []


# the number of controls, which of them has the focus (-1: none), and whether that is visible
FOCUSED = """() => {
  const kinds = "a[href], button, input, select, textarea, summary, [tabindex='0']";
  const all = [...document.querySelectorAll(kinds)].filter(each => each.checkVisibility() && !each.disabled);
  const focused = document.activeElement;
  const { outlineStyle, outlineWidth } = getComputedStyle(focused);
  const isSeen = outlineStyle !== "none" && parseFloat(outlineWidth) > 0;
  return [all.length, all.indexOf(focused), isSeen, focused.outerHTML.slice(0, 200)];
}"""


@pytest.mark.parametrize("view", SOME_VIEWS)
def test_every_control_is_reached_by_tab_with_visible_focus(open_page, id, view):
    page = open_page(f"#/{view}/{id}")
    reached = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        # more controls may appear meanwhile
        n_controls, control, is_seen, text = page.evaluate(FOCUSED)
        assert is_seen or control < 0, text
        reached.add(control)
        if reached >= set(range(n_controls)):
            break
    assert n_controls > 6 and reached >= set(range(n_controls))


def test_terms_are_explained_on_hover_and_focus(open_page, id):
    page = open_page(f"#/run/{id}")
    box = page.locator("#line")
    page.get_by_role("heading", name="gradient norm").locator(".term").hover()
    expect(box).to_contain_text("gradient")
    gradient = box.inner_text()
    page.get_by_role("heading", name="learning rate").locator(".term").focus()
    expect(box).not_to_have_text(gradient)
    expect(box).to_be_visible()
    page.keyboard.press("Tab")
    n_terms = page.locator(".term").count()
    lines = page.locator(".term").evaluate_all("all => all.map(each => each.dataset.line)")
    assert n_terms > 8 and all(10 < len(line) < 400 and "\n" not in line for line in lines)
