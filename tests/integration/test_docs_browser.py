"""The page of the API, as a browser shows it: drawn whole, without errors, asking nobody else, and good for trying things."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.integration.api_world import World, running_store
from tests.integration.browser import Browser, chromium_or_skip

pytestmark = pytest.mark.integration

FUNCTIONS = "#operations-functions-list_functions"
DRAWN = "document.querySelectorAll('.opblock').length"


@pytest.fixture(scope="module")
def store_server():
    chromium_or_skip()
    with running_store() as server:
        yield server


async def in_browser(world: World, visit) -> None:
    """Run `visit` with a browser, in a thread: the server runs in this loop."""

    def run() -> None:
        with Browser() as browser:
            browser.open(f"{world.base_url}/docs")
            browser.wait_for(DRAWN)
            visit(browser)

    await asyncio.to_thread(run)


async def test_every_listed_operation_is_drawn_and_nobody_else_is_asked(world: World, tmp_path: Path):
    document = (await world.client("nobody").get("/openapi.json")).json()
    listed = {
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method in methods
        if method in {"get", "post", "delete"}
    }

    def visit(browser: Browser) -> None:
        drawn = browser.evaluate(
            "[...document.querySelectorAll('.opblock')].map(block => [block.querySelector('.opblock-summary-method').innerText,"
            " block.querySelector('.opblock-summary-path').dataset.path])"
        )
        assert {(method, path) for method, path in drawn} == listed
        assert browser.evaluate("document.querySelector('.info .title').innerText").startswith("Rocyard")
        browser.screenshot(tmp_path / "docs.png")
        assert (tmp_path / "docs.png").stat().st_size > 20_000, "an empty page"
        assert browser.errors() == []
        assert {urlsplit(url).netloc for url in browser.requests} == {urlsplit(world.base_url).netloc}

    await in_browser(world, visit)


async def test_an_operation_can_be_tried_with_a_key_and_not_without(world: World):
    def answer(browser: Browser) -> tuple[str, str]:
        live = f'document.querySelector("{FUNCTIONS} .live-responses-table .response .response-col'
        browser.click(f"{FUNCTIONS} .btn.execute")
        status = browser.wait_for(f'{live}_status")?.innerText')
        body = browser.wait_for(f'{live}_description")?.innerText')
        return str(status).split()[0], str(body)

    def visit(browser: Browser) -> None:
        browser.click(".opblock:has([data-path='/v1/functions']) .opblock-summary-control")
        browser.wait_for(f'document.querySelector("{FUNCTIONS} .btn.execute")')
        # The page reads an operation some 50 ms after it was opened; until then its button would find none.
        browser.wait_for("!!ui.specSelectors.specResolvedSubtree(['paths', '/v1/functions', 'get'])")
        assert answer(browser)[0] == "401"
        browser.click(f"{FUNCTIONS} .btn-clear")
        browser.click(".btn.authorize")
        browser.fill(".modal-ux input[type=text], .modal-ux input[type=password]", world.keys["reader"])
        browser.click(".modal-ux .btn.authorize")
        browser.wait_for("document.querySelector('.modal-ux h6')?.innerText.includes('Authorized')")
        browser.click(".modal-ux .btn-done")
        status, body = answer(browser)
        assert status == "200"
        assert '"echo"' in body
        assert world.keys["reader"] not in browser.evaluate("JSON.stringify({...localStorage, ...sessionStorage})")

    await in_browser(world, visit)
