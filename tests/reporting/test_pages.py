import html
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.analysis.run import Run
from qwen3bench.config import catalogue as optimizations
from qwen3bench.errors import UserError
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.pages import about, open_answers, page_content, write_report
from qwen3bench.reporting.templates import markdown, render

Lines = list[dict[str, Any]]


class Tags(HTMLParser):
    """Collects start tags with their attributes, and the text of the body."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "path", "use", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return (written / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return (written / "report.md").read_text("utf-8")


@pytest.mark.slow
def test_a_table_that_is_cut_in_markdown_keeps_the_baseline_and_the_recommended_cell(
    run_of: Callable[[Lines], Run], record_lines: Callable[..., Lines]
) -> None:
    run = run_of(record_lines(("flash", "tie")))
    content = page_content(run, findings(run)) | {"max_rows": 1}
    (cells,) = re.findall(r"## What if(.*?) rows; all", render("report.md.jinja", content), re.DOTALL)
    fastest, *others = re.findall(r"^\| ([\w+]+) \| [\d.]+ \|", cells, re.MULTILINE)
    assert {fastest, *others} == {fastest, "baseline", "+".join(content["cards"][0].switches)}
    assert "baseline" in others
    assert cells.endswith(f"{1 + len(others)} of 4")


@pytest.mark.parametrize(("lo", "times"), [(0.99, 0), (1.01, 1)])
def test_a_verdict_that_is_corrected_is_explained_once_beside_intervals_that_are_not(
    run_of: Callable[[Lines], Run], record_lines: Callable[..., Lines], lo: float, times: int
) -> None:
    run = run_of(record_lines(("flash", "tie")))
    effects = run.effects.copy()
    effects.loc[effects["term"] == "tie", ["estimate", "lo", "hi", "verdict"]] = [1.02, lo, 1.04, "undecided"]
    run = replace(run, effects=effects)
    content = page_content(run, findings(run))
    for name in ("report.md", "report.html"):
        assert render(f"{name}.jinja", content).count(content["words"]["holm"]) == times


def test_each_switch_is_explained_once(page: str, text: str) -> None:
    for name in ("flash", "tie", "mask"):
        what = optimizations.described(name)
        assert what
        assert page.count(f"<li><strong>{name}</strong>: {html.escape(what)}.</li>") == 1
        assert text.count(f"\n- {name}: {markdown(what)}.\n") == 1
    assert "\n- norm: " not in text


def test_a_report_is_two_pages_and_their_plots(written: Path, text: str) -> None:
    assert {path.name for path in written.iterdir()} >= {"report.md", "report.html", "plots"}
    linked = re.findall(r"\]\((plots/[^)]+)\)", text)
    assert linked
    assert {Path(link).suffix for link in linked} == {".svg"}
    for link in linked:
        assert (written / link).is_file()
    assert {path.suffix for path in (written / "plots").iterdir()} == {".svg"}
    assert not list(written.rglob(".*tmp*"))


def test_the_page_is_balanced_and_needs_nothing_from_outside(page: str) -> None:
    tags = Tags(page)
    assert not tags.open
    names = [name for name, _ in tags.tags]
    assert "img" not in names
    kinds = [attributes.get("type") for name, attributes in tags.tags if name == "script"]
    assert kinds == ["application/json", None]
    for name, attributes in tags.tags:
        for key in ("src", "href", "xlink:href"):
            if value := attributes.get(key):
                assert value.startswith(("#", "data:")), (name, value)
    assert "url(http" not in page
    assert "@import" not in page


def test_identifiers_are_unique_in_the_page(page: str) -> None:
    identifiers = [attributes["id"] for _, attributes in Tags(page).tags if "id" in attributes]
    assert len(identifiers) > 100
    assert len(identifiers) == len(set(identifiers))


def test_every_picture_has_words(page: str, text: str) -> None:
    pictures = [attributes for name, attributes in Tags(page).tags if name == "svg"]
    assert pictures
    assert all(attributes.get("aria-label") for attributes in pictures)
    assert not re.search(r"!\[\]", text)


def test_nothing_measured_becomes_markup(page: str, text: str) -> None:
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<b>left" not in page
    assert "\\<script>alert" in text
    assert "no \\| room \\<b>left\\</b> second line" in text


def test_no_ratio_is_called_faster_or_slower(page: str, text: str) -> None:
    """A reader may take "0.90× slower" for a tenth of the speed; "0.90× as fast" reads one way."""
    plain = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    losses = re.findall(r"turn (?:on|off)|0\.\d+× as fast \[", plain)
    assert losses
    for content in (plain, text):
        assert re.findall(r"\d×(?: as fast)?\W*(?:\[[^]]*\]\W*)?(?:faster|slower)\b.{,9}", content) == []
        assert re.findall(r"(?:faster|slower)\W+\d+\.\d+×", content) == []


def test_tables_of_markdown_are_rectangular(text: str) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 4
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_the_failed_cell_has_its_reason_on_both_pages(page: str, text: str) -> None:
    for content in (page, text):
        assert "What went wrong" in content
        assert "flash+tie has status oom and no speed-up" in content
        assert "room" in content


def test_command_configuration_and_method_are_told(page: str, text: str) -> None:
    for content in (page, text):
        assert "python -m qwen3bench design=full" in content
        assert "random order" in content
        assert "measure.max_seconds" in content
        assert "every main effect is as tight as asked for" in content
        assert "2025-01-02 03:04 UTC" in content


def test_each_command_of_an_answer_stands_alone_under_what_it_is_for(page: str, text: str) -> None:
    answers = text.partition("## Each switch")[0]
    copied = re.findall(r'<p class="label">([^<]+)</p>\n<pre class="copy"><code>([^<]+)</code></pre>', page)
    assert re.findall(r"^(\S.*:)\n\n    (.+)\n\n", answers, re.MULTILINE) == [
        (html.unescape(label), html.unescape(command)) for label, command in copied
    ]
    assert len(re.findall("^    ", answers, re.MULTILINE)) == len(copied) == page.count('<pre class="copy">') > 1
    assert len({label for label, _ in copied}) > 1


def test_both_pages_say_the_same_in_the_same_order(page: str, text: str) -> None:
    order = ["Which switches to turn on", "Each switch", "What if", "Do they stack?", "What went wrong", "All cells"]
    order += ["Controls", "Do the cells compute", "What really ran", "How it was measured", "Environment and conf"]
    headings = re.findall(r"<h2>([^<]+)</h2>", page)
    markdown_headings = re.findall(r"^## (.*)$|^<summary><b>(.*)</b></summary>$", text, re.MULTILINE)
    for found in (headings, [a or b for a, b in markdown_headings]):
        assert len(found) == len(order)
        assert all(heading.startswith(start) for heading, start in zip(found, order, strict=True)), found
    said = re.findall(r"^- (mask .*|tie .*|They hold .*)$", text, re.MULTILINE)
    assert len(said) == 3
    for sentence in said:
        assert html.escape(sentence.replace("\\", ""), quote=False) in html.unescape(page).replace("&", "&amp;")


def test_headings_go_down_one_level_at_a_time(page: str) -> None:
    levels = [int(name[1]) for name, _ in Tags(page).tags if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_tables_have_captions_and_scopes(page: str) -> None:
    tags = Tags(page).tags
    names = [name for name, _ in tags]
    assert names.count("table") == names.count("caption") > 5
    assert all(attributes.get("scope") in ("col", "row") for name, attributes in tags if name == "th")


def test_what_has_no_answer_ends_with_settings(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    page = write_report(run_of(record_lines(factors=("flash", "tie"), noise=0.02))).read_text("utf-8")
    (listed,) = re.findall(r'<ul class="open">.*?</ul>', page, re.DOTALL)
    items = listed.split("<li>")[1:]
    assert items
    assert all("<code>measure." in item for item in items)


@pytest.mark.slow
def test_a_small_run_has_a_small_page(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    pair = write_report(run_of(record_lines(factors=("flash",)))).read_text("utf-8")
    assert 'id="toggles"' not in pair
    assert 'id="stack"' not in pair
    assert [heading for heading in ("What if", "Do they stack?") if f"<h2>{heading}" in pair] == []


def test_the_pages_tell_with_which_options_each_cell_was_compiled(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash",), blocks=2)
    where = {"type": "compile", "workload": "prefill", "runtime": "graph", "process": 0, "seconds": 1.0}
    ours = {**where, "options": {"combo_kernels": True, "single_token": {"freezing": True}}}
    theirs = {**where, "cell": "transformers:sdpa", "options": {}}
    run = run_of([*lines, {**ours, "cell": "flash"}, {**ours, "cell": "baseline"}, theirs])
    write_report(run)
    said = (
        "Inductor's options: combo_kernels=true, for a single token freezing=true (baseline and flash); "
        "its defaults (transformers:sdpa)."
    )
    for page in ("report.html", "report.md"):
        assert said in html.unescape((run.path / page).read_text(encoding="utf-8")).replace("\\", "")


def test_a_noisy_condition_has_its_warning_in_its_card(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    path = write_report(run_of(record_lines(factors=("flash",), copy_shift=0.02)))
    page = path.read_text("utf-8")
    (card,) = re.findall(r"<article.*?</article>", page, re.DOTALL)
    assert "<strong>Warning:</strong> Noisy: two copies of the baseline" in card
    text = path.with_suffix(".md").read_text("utf-8")
    assert text.index("> **Warning:** Noisy: two copies of the baseline") < text.index("## Each switch")


def test_threads_are_told_of_a_cpu_beside_its_machine(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash",)))
    environment = {"host": "here", "torch_threads": 1, "usable_cores": 2}
    on_cpu, on_card, old = (
        dict(about(replace(run, environment=found, config={**run.config, "device": device})))
        for device, found in (("cpu", environment), ("cuda", environment), ("cpu", {"host": "here"}))
    )
    assert on_cpu["threads"] == "1 on 2 cores"
    assert "threads" not in on_card
    assert "threads" not in old


def test_a_run_with_nothing_measured_still_gives_a_page(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    path = write_report(run_of([line for line in record_lines(factors=("flash",)) if line["type"] == "run"]))
    page = path.read_text("utf-8")
    assert "has not finished" in page
    assert "No cell has a usable latency from a complete block here." in page
    assert not Tags(page).open


@pytest.mark.slow
def test_how_much_was_measured_is_told_of_what_was_ended_too(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = [line for line in record_lines(factors=("flash", "tie", "norm")) if line["type"] not in ("stop", "end")]
    run = run_of(lines)
    blocks, processes = run.samples["block"].nunique(), run.samples["process"].nunique()
    text = write_report(run).with_suffix(".md").read_text("utf-8")
    (row,) = [line for line in text.splitlines() if "the run was ended before" in line]
    assert re.match(rf"\| prefill \| graph \| {blocks} \| {processes} \| [\d.]+ \| ±[\d.]+ % \|", row)


@pytest.mark.slow
def test_writing_twice_gives_the_same_pages(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    run = run_of(record_lines(factors=("flash",)))
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


@pytest.mark.slow
def test_many_cells_are_cut_in_markdown_and_whole_in_the_page(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=tuple("abcdefg"), blocks=2, memory=False, evidence=False))
    path = write_report(replace(run, effects=run.effects.head(0)))
    assert path.read_text("utf-8").count("a+b+c+d+e+f+g</th>") >= 1
    assert "64 of 128 rows" in path.with_suffix(".md").read_text("utf-8")


def test_a_directory_that_cannot_be_written_is_a_clear_error(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash",)))
    (run.path / "report.md").mkdir()
    with pytest.raises(UserError, match=r"report\.md"):
        write_report(run)


@pytest.mark.parametrize(
    ("value", "escaped"),
    [("a|b", "a\\|b"), ("x\ny", "x y"), ("[1.0](2)", "[1.0]\\(2)"), ("*a* `b` <c>", "\\*a\\* \\`b\\` \\<c>")],
)
def test_markdown_takes_no_markup_from_values(value: str, escaped: str) -> None:
    assert markdown(value) == escaped


@pytest.mark.slow
def test_what_ran_tells_why_flash_and_mask_belong_together(written: Path, run_of: Any, record_lines: Any) -> None:
    for page in ("report.md", "report.html"):
        assert "skips the blocked half" in (written / page).read_text()
    without = write_report(run_of(record_lines(factors=("flash", "tie"))))
    assert "skips the blocked half" not in without.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("factors", [("flash", "tie"), ("flash",)])
def test_shares_and_errors_say_what_they_are_for(run_of: Any, record_lines: Any, factors: tuple[str, ...]) -> None:
    page = write_report(run_of(record_lines(factors=factors)))
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert ("splits the gain of all on into Shapley shares" in text) == (len(factors) > 1)  # has a waterfall
        assert "from the reference, the same function in float64" in text


def test_what_no_cell_tells_is_not_said_to_hold_if_the_estimates_do(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    names = ["baseline", "flash+tie"]
    lines = [line for line in record_lines(factors=("flash", "tie")) if line.get("cell") in (None, *names)]
    lines[0]["cells"] = names
    ((said, settings, _), *more) = open_answers(findings(run_of(lines)))
    assert more == []
    assert said.startswith("The measured cells do not tell what a single switch is worth. To tell: design=full")
    assert settings == ""
