"""The page in a real browser: Debian's chromium, driven by playwright."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.compare import main

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM} (apt-get install chromium)"),
]
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, written: Path) -> Iterator[Any]:
    """The report, opened; what went wrong and what was asked for is kept on the page object."""
    context = browser.new_context()
    opened = context.new_page()
    opened.troubles, opened.asked = [], []
    opened.on("pageerror", lambda error: opened.troubles.append(str(error)))
    opened.on("console", lambda message: opened.troubles.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto((written / "report.html").as_uri())
    yield opened
    context.close()


def test_it_opens_without_an_error_and_asks_for_nothing_else(page: Any, written: Path) -> None:
    page.emulate_media(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.troubles == []
    assert [url for url in page.asked if not url.startswith("data:")] == [(written / "report.html").as_uri()]


def cells(page: Any) -> list[str]:
    rows = page.locator("table.sortable").first.locator("tbody tr:visible")
    return [rows.nth(i).locator("td").first.inner_text() for i in range(rows.count())]


def latencies(page: Any) -> list[str]:
    rows = page.locator("table.sortable").first.locator("tbody tr")
    return [rows.nth(i).locator("td").nth(1).inner_text() for i in range(rows.count())]


def test_a_heading_sorts_its_table_both_ways_and_keeps_missing_values_last(page: Any) -> None:
    heading = page.locator("table.sortable").first.locator("th").nth(1)
    heading.locator("button").click()
    up = [float(text) for text in latencies(page) if text]
    assert up == sorted(up)
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").click()
    down = [float(text) for text in latencies(page) if text]
    assert down == sorted(up, reverse=True)
    missing = [text == "" for text in latencies(page)]
    assert missing == sorted(missing)


def test_words_filter_the_table(page: Any) -> None:
    everything = cells(page)
    page.locator("input.filter").first.fill("flash MASK")
    assert sorted(cells(page)) == sorted(cell for cell in everything if "flash" in cell and "mask" in cell)
    page.locator("input.filter").first.fill("")
    assert len(cells(page)) == len(everything) == 8


def test_pictures_have_alternative_texts(page: Any) -> None:
    pictures = page.get_by_role("img")
    assert pictures.count() >= 8
    assert all(pictures.nth(i).get_attribute("aria-label") for i in range(pictures.count()))


def ink(page: Any) -> str:
    return str(page.locator("figure svg text").first.evaluate("text => getComputedStyle(text).fill"))


def test_text_in_pictures_follows_the_theme(page: Any) -> None:
    page.emulate_media(color_scheme="light")
    assert ink(page) == "rgb(31, 31, 31)"
    page.emulate_media(color_scheme="dark")
    assert ink(page) == "rgb(230, 230, 227)"


def test_print_is_dark_on_white_whatever_the_theme(page: Any) -> None:
    page.emulate_media(color_scheme="dark", media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert ink(page) == "rgb(0, 0, 0)"
    assert not page.locator("input.filter").first.is_visible()


def test_it_reads_without_script(browser: Any, written: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto((written / "report.html").as_uri())
    assert opened.locator("table.sortable").first.locator("tbody tr").count() == 8
    assert opened.locator("input.filter").count() == 0
    context.close()


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_does_not_scroll_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_print_holds_the_folded_tables_and_loses_no_column(page: Any) -> None:
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 with chromium's margins
    page.emulate_media(media="print")
    effects = page.locator("section details table").first
    assert not page.locator("section details").first.get_attribute("open")
    assert effects.bounding_box()["height"] > 50
    widths = page.locator("table").evaluate_all("tables => tables.map((table) => table.offsetWidth)")
    assert max(widths) <= 1.05 * 718  # chromium makes that little smaller by itself


def test_a_phone_shows_figures_at_a_size_that_can_be_read(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.locator("figure svg").first.bounding_box()["width"] >= 500  # scrolled within the figure
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_comparison_fits_a_phone_and_breaks_no_number(browser: Any, written: Path, tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    assert main([str(written), str(written), "--html", str(page)]) == 0
    row = f"<table><tr><td>prompt_tokens<td><span>2048</span><td>{'a' * 64}</table>"
    text = page.read_text("utf-8").replace("<h1>", f"{row}<h1>{'results/reference/' * 3}")
    page.write_text(text, "utf-8")
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    opened.goto(page.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.locator("span").evaluate("number => number.getClientRects().length") == 1
    opened.close()
