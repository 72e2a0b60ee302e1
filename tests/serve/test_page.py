"""The page in a browser that reaches nothing but its server: on a phone and on a screen, with texts that mean harm."""

import json
import re
import shutil
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'embedsmith[serve]'")

import uvicorn

from embedsmith.serve.app import http_app
from embedsmith.serve.explorer import Explorer
from embedsmith.serve.listener import bind
from tests.serve.explored import HOSTILE, run_folder, service

pytestmark = pytest.mark.slow
KEY = "a-key-of-sixteen-signs"
MOVE = "(node, weight) => { node.value = weight; node.dispatchEvent(new Event('input')) }"


def until(true):
    """Waits for what happens outside of the page."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The addresses of a server without keys and of one with a key, and the file of marks."""
    folder = tmp_path_factory.mktemp("page")
    file, made = folder / "feedback.jsonl", service(folder)
    explorer = Explorer(run_folder(folder), file)
    running, addresses = [], []
    for keys in ((), (KEY,)):
        listener = bind("127.0.0.1", 0)
        addresses.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(http_app(made, keys, explorer), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread, listener))
    yield (*addresses, file)
    for server, thread, listener in running:
        server.should_exit = True
        thread.join()
        listener.close()
    made.close()


@pytest.fixture
def page_of(chromium):
    """Opens a page whose problems are gathered; what goes elsewhere is blocked and is a problem."""
    contexts, problems = [], []

    def made(address, *, width=1440, scheme="light", locale="en-US"):
        view = {"width": width, "height": 800}
        context = chromium.new_context(viewport=view, color_scheme=scheme, locale=locale, reduced_motion="reduce")
        contexts.append(context)

        def only_here(route):
            if route.request.url.startswith(f"{address}/"):
                route.continue_()
            else:
                problems.append(route.request.url)
                route.abort()

        context.route("**/*", only_here)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        return page

    made.problems = problems
    yield made
    for context in contexts:
        context.close()


def fits(page):
    wide = """[...document.querySelectorAll('main *, header *')].filter(node => node.checkVisibility()
        && node.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        && !node.closest('.hidden, .chip, svg')).map(node => node.className || node.tagName)"""
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(wide) == []


def named(page):
    """Every control in sight has a name."""
    nameless = """[...document.querySelectorAll('button, input, select, a, canvas')].filter(node =>
        node.checkVisibility() && !(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length))
        .map(node => node.outerHTML)"""
    assert page.evaluate(nameless) == []


def ask(page, question):
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    page.locator(".hit").first.wait_for()


@pytest.mark.parametrize(("width", "scheme", "locale"), [(360, "dark", "zh-CN"), (1440, "light", "en-US")])
def test_the_page_searches_compares_marks_draws_and_reports(site, page_of, width, scheme, locale):
    address, _, file = site
    file.unlink(missing_ok=True)
    page = page_of(address, width=width, scheme=scheme, locale=locale)
    chinese = locale == "zh-CN"
    assert page.locator("html").get_attribute("lang") == ("zh-CN" if chinese else "en")
    page.get_by_text("30 篇文档" if chinese else "30 documents").wait_for()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 300) == (scheme == "dark")
    fits(page)
    ask(page, "the cat")
    page.locator(".token").first.wait_for()
    assert page.locator(".hit").count() == 10
    fits(page)
    named(page)

    first = page.locator(".hit").first
    text = first.locator(".text").evaluate("node => node.textContent")
    page.locator("#question").press("Tab")
    first.focus()
    page.keyboard.press("+")
    page.locator(".toast.shown").wait_for()
    assert first.locator(".thumb").first.get_attribute("aria-pressed") == "true"
    page.keyboard.press("ArrowDown")
    page.locator(".hit").nth(1).locator(".thumb").nth(1).click()
    until(lambda: file.exists() and '"neg": ["' in file.read_text(encoding="utf-8"))
    (record,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert (record["query"], record["pos"], len(record["neg"])) == ("the cat", [text], 1)

    page.get_by_role("switch").first.check()
    if width < 860:
        page.locator("#side-tabs button").nth(1).click()
    page.locator("[data-side=B] .moved:visible").first.wait_for()
    fits(page)
    named(page)

    page.locator("nav a").nth(1).click()
    page.locator("#atlas canvas").wait_for()
    page.locator("#map-find").fill("mat tree")
    page.locator("#map-status", has_text=re.compile("[1-9]")).wait_for()
    page.locator("#atlas canvas").focus()
    page.keyboard.press("ArrowDown")
    page.locator("#panel .near").first.wait_for()
    assert "mat tree" in page.locator("#panel .text").inner_text()
    page.locator("#panel .near").first.click()
    fits(page)
    named(page)

    page.locator("nav a").nth(2).click()
    pairs = page.locator(".moved-items").first
    pairs.locator("li").first.wait_for()
    assert pairs.locator("li").count() == 5
    page.get_by_role("button", name="8").click()
    assert pairs.locator("li").count() == 8
    worse = page.locator(".moved-items").nth(1).locator("li").first
    assert worse.locator(".item-text").inner_text() == HOSTILE[0]
    worse.locator("summary").click()
    assert ("第 1 位" if chinese else "rank 1") in worse.locator(".why").first.inner_text()
    fits(page)
    named(page)
    worse.locator("button").click()
    page.locator(".hit:visible").first.wait_for()
    assert page.locator("#question").input_value() == HOSTILE[0]
    assert page_of.problems == []


def test_texts_of_documents_are_texts(site, page_of):
    """Each hostile one is on the page letter by letter, and none of them became an element or ran."""
    page = page_of(site[0])
    before = page.title()
    ask(page, "cat <img src=x onerror=document.title='owned'>")
    for _ in range(2):
        page.locator(".more-hits:visible").click()
    shown = page.locator(".hit .text").evaluate_all("nodes => nodes.map(node => node.textContent)")
    assert set(HOSTILE) <= set(shown)
    assert page.locator(".hit").count() == 30
    page.locator("nav a").nth(1).click()
    page.locator("#atlas canvas").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft") * 4:
        page.keyboard.press(key)
    page.locator("nav a").nth(2).click()
    page.locator(".moved-items").first.wait_for()
    assert "[object" not in page.locator("#report").inner_text()
    for summary in page.locator("summary").all():
        if summary.is_visible():
            summary.click()
    for part in ("#sides", "#atlas", "#report"):
        assert page.locator(f"{part} :is(img, script, style, b, [onload], [onerror])").count() == 0
    assert "owned" not in page.title()
    assert before != "owned"
    run = "try { document.body.innerHTML = '<b>x</b>'; 'ran' } catch (error) { error.name }"
    assert page.evaluate(run) == "TypeError", "the browser itself makes no markup of a text"
    page_of.problems[:] = [each for each in page_of.problems if "TrustedHTML" not in each]
    assert page_of.problems == []


def test_a_weight_that_moves_orders_the_hits_at_once(site, page_of):
    page = page_of(site[0])
    ask(page, "old red tree")
    page.locator(".token").first.wait_for()
    scores = """nodes => nodes.map(node => [...node.querySelectorAll('.head-row')].map(row =>
        [row.dataset.head, parseFloat(row.querySelector('.value').textContent) || 0]))"""
    asked = []
    page.on(
        "request", lambda request: asked.append(request.post_data_json) if request.url.endswith("/search") else None
    )
    for head, weight in (("dense", "0"), ("multivector", "0"), ("sparse", "2")):
        page.locator(f"input[data-head={head}]").evaluate(MOVE, weight)
    assert asked == [], "nothing was asked of the server yet"
    sparse = [dict(row)["sparse"] for row in page.locator(".hit").evaluate_all(scores)]
    assert sparse == sorted(sparse, reverse=True)
    assert sparse[0] > sparse[-1]
    page.wait_for_timeout(100)
    until(lambda: (page.wait_for_timeout(50), asked)[1])
    assert asked[0]["weights"] == pytest.approx({"dense": 0, "sparse": 2, "multivector": 0}, abs=1e-6)
    page.locator("input[data-head=sparse]").evaluate(
        "node => { node.value = 0; node.dispatchEvent(new Event('input')) }"
    )
    page.get_by_text("One weight must be above zero.").wait_for()
    page.get_by_role("button", name="Reset").click()
    assert page.locator("input[data-head=sparse]").input_value() == "0.3"
    assert page_of.problems == []


def test_a_server_with_keys_is_asked_with_the_key_that_is_typed(site, page_of):
    page = page_of(site[1])
    page.locator("#key-input").fill(KEY)
    page.locator("#key-input").press("Enter")
    page.get_by_text("30 documents").wait_for()
    ask(page, "the cat")
    page.reload()
    page.get_by_text("30 documents").wait_for()
    page_of.problems[:] = [each for each in page_of.problems if "401" not in each]
    assert page_of.problems == []
    assert KEY not in page.content()


def test_language_and_colours_are_chosen_and_kept(site, page_of):
    page = page_of(site[0])
    ask(page, "the cat")
    page.locator("#language").click()
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("#ask-form button").inner_text() == "搜索"
    assert page.locator(".hit").count() == 10
    for theme in ("light", "dark"):
        page.locator("#theme").click()
        assert page.locator("html").get_attribute("data-theme") == theme
    page.reload()
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert page_of.problems == []
