"""Fixtures of the tests in a browser: a trained run, a server of the lab over it, chromium and its pages."""

import lab_server
import pytest

from llm_basics.lab import catalog

DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    """Chromium. The module's, since the loop of Playwright forbids others: asyncio.run."""
    from playwright import sync_api

    path = lab_server.find_browser()
    if path is None:
        pytest.skip(f"needs one of {', '.join(lab_server.BROWSERS)}, e.g. apt-get install chromium")
    sync_api.expect.set_options(timeout=1000 * lab_server.SECONDS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def trained(browser, tmp_path_factory):
    """The folder of a run with three checkpoints."""
    folder = tmp_path_factory.mktemp("lab") / "runs" / "shakespeare"
    folder.parent.mkdir()
    lab_server.train_run(folder)
    lab_server.copy_run(folder, "wide", lr=3e-3)
    return folder


@pytest.fixture(scope="module")
def id(trained):
    return catalog.id_of(trained)


@pytest.fixture(scope="module")
def server(trained):
    server = lab_server.Server(trained.parent)
    yield server
    server.close()


@pytest.fixture
def open_page(browser, server):
    """Opens pages, which must have no fault at the end of the test."""
    pages = []

    def open_page(hash="#/runs", server=server, **options):
        context = browser.new_context(reduced_motion="reduce", **{"viewport": DESKTOP, **options})
        context.set_default_timeout(1000 * lab_server.SECONDS)
        page = context.new_page()
        page.watch = lab_server.Watch(page, server.base)
        pages.append(page)
        page.goto(server.url)
        lab_server.go(page, hash)
        return page

    yield open_page
    for page in pages:
        page.context.close()
        assert page.watch.faults == []
        assert page.watch.paths
