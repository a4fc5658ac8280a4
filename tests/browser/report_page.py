"""The report in headless Chromium: nothing cut off, nothing over anything else, nothing asked of the network.

Runs by `make test-browser` alone: the file's name keeps it out of `make test`, which has no browser. The browser is the
one that CHROMIUM names, one on the path, or playwright's own. With SCREENSHOTS=FOLDER the pages are kept as pictures.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from robust_peft.studies.report import write_report

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTHS = {"phone": 360, "desktop": 1280}


def made_up_studies():
    path = Path(__file__).parents[1] / "studies" / "reports" / "made_up_studies.py"
    spec = importlib.util.spec_from_file_location("made_up_studies_for_the_browser", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    made = made_up_studies()
    found = {}
    for name, study, fill in (
        ("full", made.full_study(), made.full_records),
        ("troubled", made.troubled_study(), made.troubled_records),
    ):
        folder = tmp_path_factory.mktemp(name)
        found[name] = write_report(study, fill(study, folder), folder / "report")
    return found


@pytest.fixture(scope="module", params=[(n, w) for n in ("full", "troubled") for w in WIDTHS], ids="-".join)
def page(browser, reports, request, tmp_path_factory):
    name, width = request.param
    context = browser.new_context(viewport={"width": WIDTHS[width], "height": 800}, device_scale_factor=2)
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(reports[name].as_uri())
    shots = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    page.screenshot(path=shots / f"{name}-{width}.png", full_page=True)
    for place, figure in enumerate(page.query_selector_all("figure")):
        figure.screenshot(path=shots / f"{name}-{width}-figure{place}.png")
    yield page
    context.close()


def test_it_asks_for_nothing_and_complains_of_nothing(page, reports):
    own = {path.as_uri() for path in reports.values()}
    assert page.asked and {url for url in page.asked if not url.startswith("data:")} <= own
    assert page.said == []
    assert page.evaluate("document.scripts.length") == 0


def test_the_page_itself_does_not_scroll_sideways(page):
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    boxes = page.evaluate("""[...document.querySelectorAll('body *:not(.scroll *):not(pre *):not(svg *)')]
        .map(e => [e.tagName, e.getBoundingClientRect().right]).filter(([_, right]) => right > innerWidth + 0.5)""")
    assert boxes == []


def test_figures_are_whole(page):
    """Every text lies inside its figure, and no two lie on one another."""
    figures = page.evaluate("""[...document.querySelectorAll('figure svg')].map(svg => {
        const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
        return {frame: box(svg), texts: [...svg.querySelectorAll('g[id*="text_"]')].map(box)};
    })""")
    assert len(figures) >= 2
    for figure in figures:
        left, top, right, bottom = figure["frame"]
        assert right - left > 250 and bottom - top > 200
        texts = [box for box in figure["texts"] if box[2] > box[0]]
        assert len(texts) > 8  # numbers along two axes, their names, a title
        for box in texts:
            assert box[0] >= left and box[1] >= top and box[2] <= right and box[3] <= bottom
        for i, a in enumerate(texts):
            for b in texts[:i]:
                apart = a[2] <= b[0] + 0.5 or b[2] <= a[0] + 0.5 or a[3] <= b[1] + 0.5 or b[3] <= a[1] + 0.5
                assert apart, (a, b)


def test_ids_are_unique_and_what_figures_refer_to_is_there(page):
    assert page.evaluate("""(() => {
        const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
        return ids.length === new Set(ids).size;
    })()""")
    assert page.evaluate("""[...document.querySelectorAll('svg use')].every(
        e => document.getElementById(e.href.baseVal.slice(1)) !== null)""")


def test_what_users_wrote_is_text(page):
    assert page.evaluate("document.querySelectorAll('b, i, img, script').length") == 0
