"""The page in a headless Chromium, and shared case 37: what a model writes is text."""

import re
import shutil
import threading

import pytest

from tests.support.server import also

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not there: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine (apt install chromium)", allow_module_level=True)

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script> ![x](http://elsewhere.example.org/x.png) </div>"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(color_scheme="light")
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda told: page.wrong.append(told.text) if told.type == "error" else None)
    page.on("dialog", lambda dialog: (page.wrong.append("a dialog"), dialog.dismiss()))
    yield page
    page.close()


def open_page(page, server):
    page.goto(server.url)
    page.wait_for_selector("#dot.ready")
    page.fill("#seed", "5")
    page.fill("#limit", "40")


def say(page, text):
    """By keyboard alone."""
    page.focus("#prompt")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def whole(page, turns=1):
    playwright.expect(page.locator(".turn")).to_have_count(turns)
    playwright.expect(page.locator(".busy")).to_have_count(0, timeout=30_000)


def test_it_chats_and_streams(toy, page):
    open_page(page, toy)
    say(page, "hello")
    whole(page)
    body = {"seed": 5, "temperature": 0, "max_tokens": 40}
    text = toy.chat("hello", **body)["choices"][0]["message"]["content"]
    assert page.text_content(".answer .text") == text
    kinds = page.eval_on_selector_all(".text .token", "all => all.map(one => one.className)")
    assert len(kinds) > 10 and {"token own", "token drafted"} <= set(kinds) <= {
        f"token {k}" for k in ("own", "drafted", "copied")
    }
    assert re.search(
        r"\d+ tokens · [\d.]+ tokens/s · accepted length [\d.]+ · \d+ drafted", page.text_content(".figures")
    )
    total, *kinds = re.search(
        r"(\d+) tokens.* (\d+) drafted, (\d+) copied, (\d+) own", page.text_content(".figures")
    ).groups()
    assert int(total) == sum(map(int, kinds))
    say(page, "and more")
    whole(page, 2)
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
    second = toy.chat([*history, {"role": "user", "content": "and more"}], **body)["choices"][0]["message"]["content"]
    assert page.text_content(".turn:nth-child(2) .text") == second
    assert page.wrong == [] and all(url.startswith(toy.url) for url in page.asked)


def test_vanilla_beside_it(toy, page):
    open_page(page, toy)
    page.focus("#compare")
    page.keyboard.press("Space")
    say(page, "hello")
    page.wait_for_selector(".verdict", timeout=60_000)
    texts = page.eval_on_selector_all(".answer .text", "all => all.map(one => one.textContent)")
    assert len(texts) == 2 and texts[0] == texts[1] and "the same" in page.text_content(".verdict")
    assert "accepted length 1.00" in page.locator(".answer").nth(1).locator(".figures").text_content()


def test_stop_and_new_chat(toy, page):
    open_page(page, toy)
    page.fill("#limit", "400")
    hold = threading.Event()
    toy.batch.before_step = lambda batch: hold.wait(0.05)
    say(page, "hello")
    page.wait_for_selector(".text .token")
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".turn")).to_contain_text("Stopped.")
    toy.idle()
    page.click("#clear")
    assert page.query_selector(".turn") is None
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_37_what_a_model_writes_is_text(toy, page):
    """The real route, but for the model's words: the stream's text is put in its place on the way."""
    import json

    tokens = [EVIL[n : n + 7] for n in range(0, len(EVIL), 7)]
    chunks = [{"choices": [{"index": 0, "delta": {"content": t}, "origins": [[t, "drafted"]]}]} for t in tokens]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda r: r.fulfill(body=stream, content_type="text/event-stream"))
    open_page(page, toy)
    say(page, EVIL)
    whole(page)
    assert page.text_content(".answer .text") == EVIL and page.text_content(".user") == EVIL
    assert page.query_selector("main img, main script, main a, .text :not(span)") is None
    assert page.wrong == [] and all(url.startswith(toy.url) for url in page.asked)


def test_an_error_when_the_server_stops(toy, page):
    with also(toy) as server:
        open_page(page, server)
        hold = threading.Event()
        toy.batch.before_step = lambda batch: hold.wait(0.05)
        page.fill("#limit", "400")
        say(page, "hello")
        page.wait_for_selector(".text .token")
    page.wait_for_selector("[role=alert]", timeout=20_000)
    assert "server" in page.text_content("[role=alert]")
    toy.batch.before_step = None
    say(page, "are you there?")
    playwright.expect(page.locator("[role=alert]")).to_have_count(2)
    page.wait_for_selector("#dot.down")


def test_a_key_is_asked_for(toy, page):
    with also(toy, keys=(b"secret",)) as server:
        page.goto(server.url)
        page.wait_for_selector("#key-row:not([hidden])")
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#dot.ready")
        page.fill("#limit", "5")
        say(page, "hello")
        whole(page)
        assert "5 tokens" in page.text_content(".figures")
