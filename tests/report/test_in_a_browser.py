"""The page in a real browser, Chromium without a window: it runs nothing, asks for nothing, and can be read."""

import os
import shutil

import pytest
from report_files import EVIL, write_hostile_answers, write_hostile_run

from noisefit.report.__main__ import report

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-dev.txt")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHOWN = EVIL.partition("\u202e")[0]  # what follows is no text on a page, or turns it round
NARROW = dict(viewport={"width": 400, "height": 800}, is_mobile=True, has_touch=True)
WIDE = dict(viewport={"width": 1200, "height": 900})

# Of each text on the page its colour and that of the first background behind it that is not transparent.
TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.tagName == 'STYLE') continue;
    let behind = element;
    while (behind && getComputedStyle(behind).backgroundColor == 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    const style = getComputedStyle(element);
    found.push({text: walker.currentNode.data.trim().slice(0, 40), size: parseFloat(style.fontSize), color: style.color,
                background: behind ? getComputedStyle(behind).backgroundColor : 'none'});
  }
  return found;
}"""
# What sticks out of the page, but for what lies in a box that scrolls.
TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter(element =>
  !element.closest('.scroll > *') && element.getBoundingClientRect().right > innerWidth + 0.5)
  .map(element => element.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell, or any of " + ", ".join(BROWSERS))
    with playwright.sync_playwright() as driver:
        # A superuser's has no sandbox.
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"] * (os.geteuid() == 0))
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = write_hostile_run(folder / "<img src=x onerror=window.hit=3>")
    files = [write_hostile_answers(folder / name) for name in ("<b onclick=1>.jsonl", "base.jsonl")]
    report([str(run), "--answers", *map(str, files), "--show", "3", "--output", str(folder / "page")])
    return folder / "page.html"


def opened(browser, file, **how):
    """The page with all of it unfolded, and what the browser had to say of it."""
    page, said = browser.new_context(**how).new_page(), []
    page.on("console", lambda message: said.append(f"console, {message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(file.as_uri())
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    return page, said


def contrast(first, second):
    """The ratio of WCAG 2.2 of two colours as CSS says them."""

    def luminance(colour):
        channels = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("how", [NARROW, WIDE], ids=["400 pixels", "1200 pixels"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_and_asks_for_nothing(browser, page_file, how, scheme):
    page, said = opened(browser, page_file, color_scheme=scheme, **how)
    assert said == [page_file.as_uri()]  # the page itself; no word in the console
    width = how["viewport"]["width"]
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth, visualViewport.scale]") == [
        width,
        width,
        1,
    ]
    assert page.evaluate(TOO_WIDE) == []
    texts = page.evaluate(TEXTS)
    assert len(texts) > 200 and {text["background"] for text in texts} != {"none"}
    assert not [text for text in texts if contrast(text["color"], text["background"]) < 4.5 or text["size"] < 12]
    dark = contrast(page.evaluate("getComputedStyle(document.body).backgroundColor"), "rgb(255, 255, 255)") > 15
    inverted = "invert" in page.locator("img").first.evaluate("image => getComputedStyle(image).filter")
    assert dark == inverted == (scheme == "dark")
    images = page.locator("img").evaluate_all("all => all.map(image => [image.src == image.currentSrc, image.width])")
    assert [is_wide for is_wide, _ in images] == [width > 700] * 2 and all(shown > 300 for _, shown in images)
    page.context.close()


def test_names_prompts_and_answers_are_text_and_every_part_is_there(browser, page_file):
    page, said = opened(browser, page_file)
    assert page.evaluate("window.hit") is None and said == [page_file.as_uri()]
    assert page.locator("script, [onerror], [onclick], iframe, object, link").count() == 0
    assert page.locator("img").count() == 2 and all(page.locator("img").evaluate_all("all => all.map(i => !!i.alt)"))
    parts = ["curves", "runs", "settings", "layers", "samples", "answers", "confidence", "left-out"]
    assert page.locator("main > section").evaluate_all("all => all.map(part => part.id)") == parts
    links = page.locator("nav a").evaluate_all("all => all.map(link => link.getAttribute('href'))")
    assert links == [f"#{part}" for part in parts] and page.locator("h1").count() == 1
    assert page.title() == page.locator("h1").inner_text() == "Training run <img src=x onerror=window.hit=3>"
    for part in ("settings", "samples", "answers", "left-out"):
        assert SHOWN in page.locator(f"#{part}").inner_text(), part
    prompt = page.locator("#samples .card", has_text="Who?")
    assert prompt.locator("tr").evaluate_all("all => all.map(row => row.children.length)") == [4, 4, 4]
    assert "10–15" in prompt.inner_text() and "✗ wrong" in prompt.inner_text() and "✓ right" in prompt.inner_text()
    assert "<b onclick=1>.jsonl" in page.locator("#answers th").all_inner_texts()
    # What a text turns round stays within its own element: the reference's label stands on the left of it.
    label, reference = prompt.locator("p span").evaluate_all("all => all.map(one => one.getBoundingClientRect().left)")
    assert label < reference
    page.context.close()
