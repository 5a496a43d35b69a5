"""Reports in a real browser: nothing on the console, nothing from the network, the gallery sorts, the viewer draws."""

import json
import os
import re
import shutil
from functools import partial
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.report.simulated_report import quick, write_report_run
from xaiseg.report.html import pages
from xaiseg.report.html.material import read_table

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'xaiseg[browser]'")
CHROMIUM = (
    os.environ.get("CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: none is on the PATH, and CHROMIUM does not name one"),
    pytest.mark.slow,  # WebGL in software
]
# In software, so that it works on a machine without a display; --no-sandbox for containers that run as root.
ARGUMENTS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
PATIENCE = 240_000  # ms; a busy machine draws slowly
report = partial(pages.report, say=lambda _: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        quick(patch, figures=True)
        run = write_report_run(tmp_path_factory.mktemp("run"), patients=3)
        report(run)
    return run


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """`visit(path, width=…)` opens a page; at the end nothing was said on its console and nothing asked of the network."""
    opened, said, asked = [], [], []

    def go(path, width=1280, height=900, **options):
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri(), timeout=PATIENCE)
        opened.append(page)
        return page

    yield go
    for page in opened:
        page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def shown(page):
    return page.evaluate("[...document.querySelectorAll('.card:not([hidden]) .name')].map((a) => a.textContent)")


def test_the_gallery_sorts_and_filters(run, visit):
    page = visit(run / "report.html")
    rows = read_table(run / "lesions.tsv")
    assert len(shown(page)) == len(rows) == 12
    for option, column, sign in (
        ("peak, FLAIR: highest first", "smoothgrad_FLAIR_peak", -1),
        ("peak, T1w: lowest first", "smoothgrad_T1w_peak", 1),
        ("volume: largest first", "volume_mm3", -1),
    ):
        page.select_option("#sort", label=option)
        order = shown(page)
        values = {f"{r['case']} · {r['lesion']:.0f}": r[column] for r in rows}
        assert [values[name] for name in order] == sorted(values.values(), reverse=sign < 0)
        assert set(order) == set(values)
    page.select_option("#sort", label="case and number")
    assert shown(page) == [f"{r['case']} · {r['lesion']:.0f}" for r in rows]
    page.select_option("#group", "FP")
    assert len(shown(page)) == sum(r["group"] == "FP" for r in rows)
    page.fill("#text", "SUB-02")
    assert len(shown(page)) == sum(r["group"] == "FP" and r["case"] == "sub-02" for r in rows)
    assert page.inner_text("#count") == f"{len(shown(page))} of 12 lesions shown"


def test_pictures_are_decoded_and_lead_to_their_lesion(run, visit):
    page = visit(run / "report.html")
    page.locator(".card").first.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.card img').naturalWidth > 100")
    page.locator(".card .name").first.click()
    page.wait_for_url(re.compile(r"sub-\d+\.html#"))
    assert page.evaluate("document.querySelector(':target').className") == "lesion"


@pytest.mark.parametrize("name", ["report.html", "sub-00.html"])
def test_a_phone_shows_all_without_scrolling_sideways(run, visit, name):
    page = visit(run / name, width=375, height=800)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    # letters of figures stay at least 9 pixels high
    heights = page.evaluate(
        "[...document.querySelectorAll('.charts svg text')].map((t) => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement"
        ".getBoundingClientRect().width / t.ownerSVGElement.viewBox.baseVal.width)"
    )
    assert (name == "sub-00.html") == (not heights)
    assert min(heights, default=9) >= 9


def test_print_leaves_controls_out(run, visit):
    page = visit(run / "report.html")
    page.emulate_media(media="print")
    for selector in (".contents", ".controls", "button"):
        assert not page.locator(selector).first.is_visible()
    assert page.locator("#methods-text").is_visible()


def test_the_page_itself_forbids_the_network(run, browser):
    page = browser.new_page()
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto((run / "report.html").as_uri())
    assert page.evaluate("fetch('https://example.org').then(() => 'loaded', () => 'refused')") == "refused"
    assert "Content Security Policy" in " ".join(refused)
    page.close()


def test_500_lesions(tmp_path, visit):
    with pytest.MonkeyPatch.context() as patch:
        quick(patch, figures=True)
        run = write_report_run(tmp_path, patients=84, each=3)
        report(run, viewer=False)
    page = visit(run / "report.html")
    assert len(shown(page)) == 504
    assert (run / "report.html").stat().st_size < 8e6
    assert page.evaluate("document.querySelectorAll('*').length") < 14_000
    entry = json.loads(page.evaluate("JSON.stringify(performance.getEntriesByType('navigation')[0])"))
    assert entry["loadEventEnd"] < 30_000  # 3 s on a quiet machine


def canvas(page):
    """The pixels of the viewer, once it has drawn."""
    page.wait_for_selector("#stage[data-state=ready], #stage[data-state=failed]", timeout=PATIENCE)
    assert page.get_attribute("#stage", "data-state") == "ready", page.inner_text("#where")
    page.wait_for_timeout(300)
    return np.asarray(Image.open(BytesIO(page.locator("#canvas").screenshot(timeout=PATIENCE))).convert("RGB"), int)


def test_the_viewer_draws_what_is_chosen(run, visit):
    page = visit(run / "sub-00.html", width=560, height=700)
    assert page.get_attribute("#stage", "data-state") == "closed"
    page.click("#open")
    first = canvas(page)
    assert first.std() > 10
    # saliency in red, the lesion's cross in green
    red = (first[..., 0] > 120) & (first[..., 0] > 1.6 * first[..., 2])
    assert red.sum() > 20
    where = page.inner_text("#where")
    assert "saliency" in where
    page.click("#next")
    second = canvas(page)
    assert (first != second).any()
    assert page.inner_text("#where") != where
    page.select_option("#channel", label="T1w")
    third = canvas(page)
    assert (second != third).any()
    page.select_option("#map", label="T1w")
    fourth = canvas(page)
    page.locator("#threshold").fill("90")
    fifth = canvas(page)
    assert (fourth != fifth).any()
    page.uncheck("#outline")
    assert (canvas(page) != fifth).any()
    page.select_option("#planes", label="3-D")
    assert canvas(page).std() > 5


def test_a_lesion_is_shown_by_its_button_and_by_the_keyboard(run, visit):
    page = visit(run / "sub-01.html", width=560, height=700)
    button = page.locator("[data-show='0/2']")
    button.focus()
    page.keyboard.press("Enter")
    assert canvas(page).std() > 10
    assert page.locator("#lesion").input_value() == "2"
    scans = json.loads(page.locator("#scans").text_content())
    wanted = [round(x) for x in scans[0]["lesions"][2]["centre"]]
    found = [int(x) for x in re.findall(r"-?\d+", page.inner_text("#where"))[:3]]
    assert found == pytest.approx(wanted, abs=1)


def test_without_webgl_the_pictures_are_still_there(run, browser):
    page = browser.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto((run / "sub-00.html").as_uri())
    page.click("#open")
    page.wait_for_selector("#where:has-text('WebGL 2')")
    assert page.locator(".lesion img").count() == 4
    page.close()
