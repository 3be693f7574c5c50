"""The page in a browser: Chromium, headless. Skipped where there is none."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .server_process import ServerProcess

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
if BROWSER is None:
    pytest.skip("no Chromium: apt install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

KEY = "k" * 32
OFFLINE = [
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        extra = ["--no-sandbox"] if root else []
        chromium = started.chromium.launch(executable_path=BROWSER, args=[*OFFLINE, *extra])
        yield chromium
        chromium.close()


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    """Each token takes 0.03 s, or what the test's parameter says."""
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with ServerProcess(keys=str(keys), step_s=getattr(request, "param", 0.03)) as process:
        yield process.until_ready()


@pytest.mark.parametrize(("scheme", "width", "height"), [("light", 1200, 800), ("dark", 390, 844)])
def test_a_chat(
    browser: Any, server: ServerProcess, tmp_path: Path, scheme: str, width: int, height: int
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        http_credentials={"username": "me", "password": KEY},
    )
    page, faults = context.new_page(), []
    page.on("console", lambda said: said.type == "error" and faults.append(said.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    outside: list[str] = []
    page.on("request", lambda asked: "127.0.0.1" in asked.url or outside.append(asked.url))
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect = playwright.expect
    expect(page.locator("#state")).to_have_text("ready", timeout=30_000)
    expect(page.locator("#model")).to_have_value("fake")

    page.fill("#prompt", "<b>Hello</b>")
    page.press("#prompt", "Enter")
    answer = page.locator("article.assistant").first
    expect(answer.locator("footer")).to_contain_text("tok/s", timeout=30_000)
    expect(page.locator("#send")).to_have_text("Send", timeout=30_000)
    expect(answer.locator("footer")).to_contain_text("cached")
    assert page.locator("article.user").first.inner_text() == "<b>Hello</b>"

    page.select_option("#thinking", "high")
    page.fill("#prompt", "Think about it")
    page.click("#send")
    second = page.locator("article.assistant").nth(1)
    expect(second.locator("details")).to_be_visible(timeout=30_000)
    expect(page.locator("#send")).to_have_text("Send", timeout=30_000)
    assert second.locator("details .text").text_content().startswith("hm, ")
    assert not second.locator("> .text").text_content().startswith("hm, ")
    expect(second.locator("summary")).to_contain_text("thought for")
    expect(page.locator("#running")).to_contain_text("of 4", timeout=30_000)

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shots = Path(os.environ.get("DS4_SCREENSHOTS", tmp_path))
    page.screenshot(path=shots / f"page-{scheme}-{width}.png")
    assert faults == []
    assert outside == []
    context.close()


@pytest.mark.parametrize("server", [3.0], indirect=True)  # long enough to be stopped
def test_an_answer_can_be_stopped_and_a_lost_one_says_so(
    browser: Any, server: ServerProcess
) -> None:
    context = browser.new_context(http_credentials={"username": "me", "password": KEY})
    page, expect = context.new_page(), playwright.expect
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#model")).to_have_value("fake", timeout=30_000)
    page.fill("#prompt", "go on")
    page.click("#send")
    expect(page.locator("#send")).to_have_text("Stop")
    page.click("#send")
    expect(page.locator("article.assistant footer")).to_contain_text("stopped", timeout=30_000)
    page.evaluate("document.querySelector('#model').replaceChildren(new Option('x', '\\0'))")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#prompt", "again")
    page.click("#send")
    expect(page.locator("footer.error")).to_be_visible(timeout=30_000)
    context.close()
