"""The page in a real browser: Debian's chromium, driven by playwright."""

import csv
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.analysis.run import Run, load_run, write_derived
from qwen3bench.compare import main
from qwen3bench.reporting.pages import write_report
from qwen3bench.reporting.units import ratio, seconds, significant, size

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM} (apt-get install chromium)"),
]
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
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
    return [rows.nth(i).locator("th").first.inner_text() for i in range(rows.count())]


def latencies(page: Any) -> list[str]:
    rows = page.locator("table.sortable").first.locator("tbody tr")
    return [rows.nth(i).locator("td").first.inner_text() for i in range(rows.count())]


def unfold(page: Any) -> None:
    page.get_by_role("link", name="All cells").click()
    page.locator("#cells[open]").wait_for()


def test_a_heading_sorts_its_table_both_ways_and_keeps_missing_values_last(page: Any) -> None:
    unfold(page)
    heading = page.locator("table.sortable").first.locator("thead th").nth(1)
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
    unfold(page)
    everything = cells(page)
    page.locator("input.filter").first.fill("flash MASK")
    assert sorted(cells(page)) == sorted(cell for cell in everything if "flash" in cell and "mask" in cell)
    page.locator("input.filter").first.fill("")
    assert len(cells(page)) == len(everything) == 8


def test_a_table_of_few_rows_has_no_filter(page: Any) -> None:
    filtered = page.locator("input.filter + .scroll table tbody")
    assert filtered.count() >= 1
    assert all(filtered.nth(i).locator("tr").count() >= 8 for i in range(filtered.count()))


@pytest.fixture(scope="module")
def measured(written: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of cells.csv by workload and cell."""
    write_derived(load_run(written))
    with (written / "cells.csv").open(encoding="utf-8") as file:
        return {(row["workload"], row["cell"]): row for row in csv.DictReader(file)}


def formatted(row: dict[str, str]) -> dict[str, str]:
    """What the page is to show of a row of cells.csv."""
    number = {key: float(text) if text else float("nan") for key, text in row.items() if key in NUMBERS}
    bounds = (number["speedup"], number["speedup_lo"], number["speedup_hi"])
    shown = {
        "latency": seconds(number["latency_s"]) if row["latency_s"] else "",
        "speed-up": ratio(*bounds),
        "tokens/s": significant(number["tokens_per_s"]) if row["tokens_per_s"] else "",
        "peak memory": size(number["peak_allocated_bytes"]) if row["peak_allocated_bytes"] else "",
        "parameters": size(number["parameter_bytes"]),
        "status": "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}",
    }
    return {name: " ".join(text.split()) for name, text in shown.items() if text}


NUMBERS = (
    *("latency_s", "speedup", "speedup_lo", "speedup_hi", "tokens_per_s"),
    *("peak_allocated_bytes", "parameter_bytes"),
)


def shown(page: Any) -> dict[str, str]:
    """The facts beside the toggles."""
    facts = page.locator("#toggles dl > div")
    pairs = [facts.nth(i) for i in range(facts.count())]
    return {pair.locator("dt").inner_text(): " ".join(pair.locator("dd").inner_text().split()) for pair in pairs}


def toggle(page: Any, on: dict[str, bool]) -> None:
    for name, wanted in on.items():
        page.locator("#toggles").get_by_label(name, exact=True).set_checked(wanted)


SWITCHES = ("flash", "tie", "mask")


def test_every_combination_shows_the_row_of_cells_csv(page: Any, measured: Any) -> None:
    for place, workload in enumerate(("prefill", "decode")):
        page.get_by_label("Condition", exact=True).select_option(index=place)
        for levels in product((False, True), repeat=3):
            on = dict(zip(SWITCHES, levels, strict=True))
            toggle(page, on)
            cell = "+".join(name for name in SWITCHES if on[name]) or "baseline"
            assert page.locator("#combination").inner_text() == cell
            assert shown(page) == formatted(measured[workload, cell]), (workload, cell)
    assert page.troubles == []


def test_each_toggle_says_what_flipping_it_would_change_from_here(page: Any, measured: Any) -> None:
    page.get_by_label("Condition", exact=True).select_option(index=1)
    for levels in product((False, True), repeat=3):
        on = dict(zip(SWITCHES, levels, strict=True))
        toggle(page, on)
        here = measured["decode", "+".join(name for name in SWITCHES if on[name]) or "baseline"]
        for name in SWITCHES:
            flipped = on | {name: not on[name]}
            there = measured["decode", "+".join(other for other in SWITCHES if flipped[other]) or "baseline"]
            said = page.locator(f"#flip-{name}").inner_text()
            assert said.startswith("turn off: " if on[name] else "turn on: ")
            gain = float(said.partition(": ")[2].partition("×")[0])
            assert gain == pytest.approx(float(there["speedup"]) / float(here["speedup"]), rel=0.002)
            assert ("MiB" in said) == (there["peak_allocated_bytes"] != here["peak_allocated_bytes"])


def test_another_condition_begins_with_what_is_recommended_there(page: Any) -> None:
    first = page.locator("#combination").inner_text()
    toggle(page, dict.fromkeys(SWITCHES, False))
    page.get_by_label("Condition", exact=True).select_option(index=1)
    chips = page.locator("article").nth(1).locator(".chip")
    recommended = "+".join(chips.nth(i).inner_text() for i in range(chips.count()))
    assert page.locator("#combination").inner_text() == recommended
    page.get_by_label("Condition", exact=True).select_option(index=0)
    assert page.locator("#combination").inner_text() == first


def test_the_first_combination_is_the_recommended_one(page: Any) -> None:
    chips = page.locator("article").first.locator(".chip")
    recommended = "+".join(chips.nth(i).inner_text() for i in range(chips.count()))
    assert recommended
    assert page.locator("#combination").inner_text() == recommended


def test_the_keyboard_alone_toggles_and_is_announced(page: Any) -> None:
    first = page.locator("#toggles").get_by_label("flash", exact=True)
    before, name = first.is_checked(), page.locator("#combination").inner_text()
    first.focus()
    page.keyboard.press("Space")
    assert first.is_checked() != before
    assert page.locator("#combination").inner_text() != name
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") == "tie"
    assert page.locator("#toggles [aria-live=polite] #combination").count() == 1
    described = first.get_attribute("aria-describedby")
    assert page.locator(f"#{described}").inner_text().startswith("turn")


def test_a_command_is_copied_or_marked(page: Any) -> None:
    box = page.locator("pre.copy").first
    box.locator("button").click()
    page.wait_for_function("['copied', 'marked'].includes(document.querySelector('pre.copy button').textContent)")
    assert page.evaluate("getSelection().toString()").strip() == box.locator("code").inner_text().strip()


def test_pictures_have_alternative_texts(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
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
    assert not page.locator("pre.copy button").first.is_visible()


def test_with_a_script_the_toggles_stand_in_for_the_table(page: Any) -> None:
    assert page.locator("#toggles").is_visible()
    assert not page.locator("#measured").is_visible()


def test_it_reads_without_script(browser: Any, written: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto((written / "report.html").as_uri())
    tables = opened.locator("#measured table")
    assert tables.count() == 2
    assert all(tables.nth(i).is_visible() and tables.nth(i).locator("tbody tr").count() == 8 for i in range(2))
    assert not opened.locator("#toggles").is_visible()
    assert opened.locator("button").count() == opened.locator("input").count() == 0
    context.close()


@pytest.mark.parametrize("width", [360, 400, 1200])
def test_the_page_does_not_scroll_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_print_holds_the_folded_tables_and_loses_no_column(page: Any) -> None:
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 with chromium's margins
    page.emulate_media(media="print")
    effects = page.locator("details table").first
    assert not page.locator("details").first.get_attribute("open")
    assert effects.bounding_box()["height"] > 50
    widths = page.locator("table").evaluate_all("tables => tables.map((table) => table.offsetWidth)")
    assert max(widths) <= 1.05 * 718  # chromium makes that little smaller by itself


def test_a_phone_shows_figures_at_a_size_that_can_be_read(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.locator("figure svg").first.bounding_box()["width"] >= 500  # scrolled within the figure
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_comparison_fits_a_phone_and_breaks_no_number(browser: Any, written: Path, tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    again = shutil.copytree(written, tmp_path / "again")
    assert main([str(written), str(again), "--html", str(page)]) == 0
    row = f"<table><tr><td>prompt_tokens<td><span>2048</span><td>{'a' * 64}</table>"
    row += f"<p>{'flash+' * 12}norm</p>"
    text = page.read_text("utf-8").replace("<h1>", f"{row}<h1>{'results/reference/' * 3}")
    page.write_text(text, "utf-8")
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    opened.goto(page.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.locator("span").evaluate("number => number.getClientRects().length") == 1
    opened.close()


def test_a_predicted_step_of_what_changes_nothing_that_runs_says_so(browser: Any, screened_run: Run) -> None:
    run = replace(screened_run)
    vars(run)["idle"] = {("prefill", "graph"): {"tie": 3, "flash": 3}}  # flash is predicted to be faster
    opened = browser.new_page()
    opened.goto(write_report(run).as_uri())
    toggle(opened, {name: name == "norm" for name in run.factors})
    said = {name: opened.locator(f"#flip-{name}").inner_text() for name in ("flash", "tie", "mlp")}
    assert said["tie"].endswith("], predicted, changes nothing")
    assert said["flash"].endswith("], predicted")
    assert said["mlp"].endswith("], predicted")
    opened.close()


def test_a_screens_toggles_mark_what_no_block_measured_as_predicted(browser: Any, screened_run: Run) -> None:
    opened = browser.new_page()
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.goto(write_report(screened_run).as_uri())
    measured = set(screened_run.cells["cell"])
    for on in (("flash", "norm"), ("flash", "mlp", "mask", "norm"), ()):
        toggle(opened, {name: name in on for name in screened_run.factors})
        cell = "+".join(on) or "baseline"
        facts = shown(opened)
        assert ("speed-up, predicted" in facts) == (cell not in measured)
        if cell == "flash+norm":
            assert cell not in measured
            assert facts["speed-up, predicted"].startswith("1.50×")
            assert facts["status"] == "not measured"
        flips = opened.locator("#toggles .flip")
        said = [flips.nth(i).inner_text() for i in range(flips.count())]
        assert len(said) == 9
        assert all("×" in text for text in said)
        guessed = [text for text in said if "predicted" in text]
        assert guessed
        assert all(re.search(r"× as fast \[\d+\.\d\d, \d+\.\d\d\], predicted$", text) for text in guessed)
    assert troubles == []
    opened.close()
