"""The page of `serve` in a real browser."""

import re
import shutil

import pytest
from serving import Gate, chat_run, serving, until

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

from trainer.commands.serve import ServeConfig  # noqa: E402
from trainer.commands.serve.launch import open_models  # noqa: E402

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def models(finished, tmp_path_factory):
    chat = chat_run(tmp_path_factory.mktemp("conversations"))
    return open_models(ServeConfig(runs=[str(finished), f"{finished}@8", str(chat)], device="cpu"))


@pytest.fixture(scope="module")
def address(models):
    with serving(models) as found:
        yield found


@pytest.fixture
def page(browser, address):
    """A page that has loaded, of which nothing complains, and which asks nobody but its server."""
    context = browser.new_context()
    found, complaints, asked = context.new_page(), [], []
    found.on("console", lambda message: complaints.append(message.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda request: asked.append(request.url))
    found.refusals = 0  # that the test expects
    found.set_default_timeout(20_000)
    found.goto(address)
    found.wait_for_selector("#go:enabled")
    yield found
    refused = [line for line in complaints if "status of 400" in line]  # the browser's own line
    assert (
        complaints == refused
        and len(refused) == found.refusals
        and asked
        and all(url.startswith((address, "data:")) for url in asked)
    )
    context.close()


def generate(page, prompt, **settings):
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
    page.fill("#prompt", prompt)
    page.click("#go")


def test_two_runs_side_by_side_and_what_a_token_shows(page, models):
    assert page.inner_text("#about") == "run (step 12), run@8 (step 8), chat (step 2)"
    generate(page, "the cat", max_tokens=30, seed=1, temperature=0.8, top_k=40)
    page.wait_for_selector("#go:enabled")
    panes = page.query_selector_all(".pane")
    assert [pane.query_selector("h2").inner_text() for pane in panes] == ["run", "run@8"]
    for pane in panes:
        assert re.match(
            r"30 tokens · \d+ tokens/s · perplexity [\d.]+ · max tokens$", pane.query_selector(".stats").inner_text()
        )
        assert pane.query_selector(".prompt").inner_text() == "the cat"
        assert len(pane.query_selector_all(".t")) == 30
        colours = {
            token.evaluate("token => getComputedStyle(token).backgroundColor")
            for token in pane.query_selector_all(".t")
        }
        assert len(colours) > 5, "by their probability"
    assert page.is_hidden("#tip")
    page.hover(".t >> nth=3")
    page.wait_for_selector("#tip")
    rows = page.query_selector_all("#tip tr")
    shares = [float(row.query_selector("td:last-child").inner_text().strip("<% ")) for row in rows]
    assert len(rows) in (8, 9) and shares[:8] == sorted(shares[:8], reverse=True)
    [chosen] = page.query_selector_all("#tip .chosen td:last-child")
    assert page.inner_text("#tip p >> nth=0") == f"probability {chosen.inner_text()}"
    page.mouse.move(5, 5)
    page.wait_for_selector("#tip", state="hidden")
    page.focus(".tokens >> nth=1")
    for key in ("ArrowRight", "ArrowRight", "End", "ArrowLeft"):
        page.keyboard.press(key)
    assert (
        page.evaluate(
            "[...document.querySelectorAll('.tokens')[1].querySelectorAll('.t')].indexOf(document.activeElement)"
        )
        == 28
    )
    assert page.is_visible("#tip")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")


def test_stop_and_live_tokens(page, models):
    gate = Gate(models["run"])
    page.select_option("#model-1", "")
    assert len(page.query_selector_all(".pane")) == 1
    generate(page, "the cat", max_tokens=200)
    gate.permits.release(12)  # the check of the cache, the prompt, some tokens
    page.wait_for_selector(".t >> nth=2")
    assert page.is_disabled("#go") and len(page.query_selector_all(".t")) < 12
    page.click("#halt")
    page.wait_for_selector("#go:enabled")
    [job] = models["run"]._jobs
    until(job.cancelled)
    gate.remove()
    until(lambda: not models["run"]._jobs)
    assert page.inner_text(".stats").endswith("stopped") and gate.passes < 16 and page.is_hidden(".error")


def test_a_chat_goes_on(page, models):
    page.select_option("#model-0", "chat")
    assert page.is_hidden("#mode"), "one of the two has no template"
    page.select_option("#model-1", "chat")
    page.check("input[value=chat]")
    for message in ("red", "blue"):
        generate(page, message, max_tokens=5, temperature=0, stop="zz\nyy")
        page.wait_for_selector("#go:enabled")
        assert page.input_value("#prompt") == ""
    said = page.query_selector_all(".pane >> nth=0 >> .said")
    assert [element.inner_text() for element in said] == ["red", "blue"]
    [first, second] = (pane.inner_text() for pane in page.query_selector_all(".tokens"))
    assert first == second, "the same run, and nothing drawn at random"
    page.click("#clear")
    assert page.query_selector_all(".t, .said") == []


def test_a_refusal_is_shown(page, models):
    generate(page, "a", max_tokens=5000)
    page.refusals = 2
    page.wait_for_selector("#go:enabled")
    assert "limit of this server (4,096)" in page.inner_text(".pane >> nth=0 >> .error")


def test_characters_that_cannot_be_seen(page):
    """Bytes of a character until it is whole, control characters, and what would turn the text around."""
    shown = page.evaluate(
        r"""() => {
            const pane = panes[0];
            Object.assign(pane, {count: 0, sum: 0, bytes: []});
            for (const spelled of ['a', '\n', '\u0007', '\u202e', 'bytes:\\xe2', 'bytes:\\x82', 'bytes:\\xac', 'bytes:\\xff', '<b>'])
                pane.add({spelled, p: 0.5, others: []});
            return [...pane.place.querySelectorAll('.t')].map(token => token.textContent);
        }"""
    )
    assert shown == ["a", "↵\n", "␇", "‹U+202E›", "‹E2›", "‹82›", "€", "‹FF›", "<b>"]


def test_the_key_is_asked_for_and_a_phone_needs_no_sideways_scrolling(browser, models):
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark")
    page = context.new_page()
    with serving(models, api_key="sesame") as address:
        page.goto(address)
        page.wait_for_selector("#key")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#failure:visible")
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#go:enabled")
        assert page.is_hidden("#key") and page.is_hidden("#failure")
        page.evaluate("$('max_tokens').value = 20")  # a phone begins with the settings closed
        generate(page, "the cat " * 9 + "x" * 200)
        page.wait_for_selector("#go:enabled")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    context.close()
