"""The report in a browser: figures show the queries' numbers for any selection, and axe finds nothing serious."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moewh.plots.texts import visible
from moewh.warehouse.files.layout import Layout
from tests.support import synthetic
from tests.support.browser import browser_page
from tests.support.hostile import HOSTILE
from tests.support.report_pages import MAPS, Row, asked, close, write_report
from tests.support.synthetic import (
    Prompt,
    Run,
    Token,
    checkpoint_of,
    empty_warehouse,
    random_run,
    random_warehouse,
    write_run,
)

DRAW_ALL = "dispatchEvent(new Event('beforeprint'))"
SHOWN = """() => Object.fromEntries([...document.querySelectorAll("section")].map((section) => {
    const plot = section.querySelector(".js-plotly-plot"), code = section.querySelector("figcaption code");
    const shown = plot && !plot.hidden && plot.data.map((trace) => ({
        name: trace.name, x: Array.from(trace.x), y: Array.from(trace.y),
        z: trace.z && Array.from(trace.z, (row) => Array.from(row)) }));
    const measure = section.querySelector(".local select");
    const text = measure && measure.selectedOptions[0].text;
    return [section.id.replace("figure-", ""), { shown, command: code && code.textContent, measure: text }];
}))"""
"""Every section's figure in Plotly's form, its command, and the selected measure."""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser_page() as opened:
        yield opened


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return random_warehouse(tmp_path_factory.mktemp("shown") / "wh")[0]


@pytest.fixture(scope="module")
def written(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report(layout, output)
    return output


def open_report(page: Any, output: Path) -> None:
    page.goto(output.as_uri())
    page.locator("html[data-ready='true']").wait_for(state="attached")


def same(name: str, told: dict[str, Any], rows: list[Row]) -> None:
    """Compare a section's content with its query's rows."""
    for trace in told["shown"]:
        if name in MAPS:
            y, x = MAPS[name]
            places = {(str(row[y]), str(row[x])): row[told["measure"]] for row in rows}
            cells = {
                (down, along): value
                for down, line in zip(trace["y"], trace["z"], strict=True)
                for along, value in zip(trace["x"], line, strict=True)
            }
            assert all(close(cells[place], value) for place, value in places.items())
            assert all(math.isnan(cells[place]) or not cells[place] for place in cells.keys() - places.keys())
        elif not trace["name"].startswith(("layer", "random")):
            values = {str(row["layer"]): row[trace["name"]] for row in rows}
            assert list(trace["x"]) == sorted(values, key=int)
            assert all(close(y, values[x]) for x, y in zip(trace["x"], trace["y"], strict=True))


@pytest.mark.parametrize(
    "selection", [("step-30", "code", 0), ("007", "(none)", 2), ("mixed", "prose", 1)], ids=lambda chosen: chosen[0]
)
def test_figures_show_what_is_selected(
    selection: tuple[str, str, int], page: Any, written: Path, layout: Layout
) -> None:
    run, domain, steps = selection
    open_report(page, written)
    page.locator("#run").select_option(run)
    page.locator("#domain").select_option(domain)
    page.locator("#layer").focus()
    for _ in range(steps):
        page.keyboard.press("ArrowRight")
    for number in range(2):  # the first measure of each, then the second
        page.evaluate(DRAW_ALL)
        shown = page.evaluate(SHOWN)
        seen = set()
        for name, told in shown.items():
            if not told["shown"]:
                continue
            rows = asked(layout, told["command"])
            if name in ("domains", "specialization", "repetition"):
                rows = [row for row in rows if row["domain"] == (None if domain == "(none)" else domain)]
            assert rows
            same(name, told, rows)
            seen.add(name)
        unseen = {"transitions"} if steps == 2 else set()
        unseen |= set() if run == "mixed" else {"saliency"}  # of the three, this run has expert outputs
        assert {*MAPS, "balance", "repetition", "information"} - seen == unseen
        if not number:
            for name in {*MAPS, "balance"} - unseen:
                page.locator(f"#figure-{name} .local select").select_option(index=1)
    layers = {row["layer"] for row in asked(layout, shown["co_routing"]["command"])}
    assert layers == {sorted(synthetic_layers(layout, run))[steps]}
    assert page.problems == []


def synthetic_layers(layout: Layout, run: str) -> set[int]:
    """The MoE layers of a run."""
    return {row["layer"] for row in asked(layout, f"moewh query -c \"from layers where run_id = '{run}'\"")}


def test_hostile_texts_stay_text(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "WORDS", HOSTILE)
    layout = empty_warehouse(tmp_path / "wh")
    told = [Token(number, {0: [(number % 3, 0.5)]}) for number in range(len(HOSTILE))]
    prompts = [Prompt(told * 5, domain) for domain in HOSTILE]
    facts = {"model": HOSTILE[1], "revision": HOSTILE[7]}
    write_run(layout, Run("hostile", {0: (4, 1)}, [prompts], fields=facts))
    write_report(layout, tmp_path / "report.html", "--prompts", "3")
    open_report(page, tmp_path / "report.html")
    shown = page.locator("#domain option").all_text_contents()
    assert shown == [visible(domain) for domain in sorted(HOSTILE, key=str.encode)]
    for number in range(len(HOSTILE)):
        page.locator("#domain").select_option(index=number)
        page.evaluate(DRAW_ALL)
        domain = visible(sorted(HOSTILE, key=str.encode)[number])
        assert domain in page.locator("#figure-domains .plot").get_attribute("aria-label")
    tokens = page.locator("#figure-top_tokens tbody th bdi").all_text_contents()
    assert tokens and {*tokens} <= {visible(text) for text in HOSTILE}
    assert visible(HOSTILE[1]) in page.locator("#runs").text_content()
    assert page.title() == "Routing report"
    assert page.locator("main img, main script, main b").count() == 0
    assert page.problems == []


def test_the_table_has_every_checkpoint_of_a_step(page: Any, tmp_path: Path) -> None:
    """Two checkpoints of one training step are two rows; the line for chance adds none."""
    layout = empty_warehouse(tmp_path / "wh")
    last = random_run("last", 1, {0: (6, 2)})
    steps = {"one": 10, "other": 10, "last": 30}
    made = [checkpoint_of(last, run_id, step, step + seed, 0.5) for seed, (run_id, step) in enumerate(steps.items())]
    for run in made:
        write_run(layout, replace(run, fields={**run.fields, "series": "s", "tokens_key": "t"}))
    write_report(layout, tmp_path / "report.html")
    open_report(page, tmp_path / "report.html")
    page.evaluate(DRAW_ALL)
    for name in ("balance_over_training", "saturation"):
        page.locator(f"#figure-{name} details").evaluate("found => found.open = true")
        lines = page.locator(f"#figure-{name} tbody tr")
        lines.first.wait_for()
        shown = [line.split() for line in lines.all_inner_texts()]
        (trace, *_) = page.evaluate(SHOWN)[name]["shown"]
        assert [int(step) for step, *_ in shown] == trace["x"]
        assert [float(value) for _, value, *_ in shown] == pytest.approx(trace["y"], rel=1e-3)
        assert [step for step, *_ in shown].count("10") == 2
        assert len({value for _, value, *_ in shown}) == 3


def test_no_serious_finding_of_axe(page: Any, written: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    open_report(page, written)
    page.evaluate(DRAW_ALL)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    page.locator("#figure-co_routing details table").wait_for()
    found = Axe().run(page).response["violations"]
    serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
    assert serious == []


def test_page_fits_a_phone_and_paper(page: Any, written: Path) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    open_report(page, written)
    page.evaluate(DRAW_ALL)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.set_viewport_size({"width": 700, "height": 640})
    page.wait_for_timeout(1000)
    heights = """() => [...document.querySelectorAll(".js-plotly-plot")].map((plot) =>
        [plot.offsetHeight, plot.querySelector(".main-svg").getBoundingClientRect().height])"""
    assert all(abs(box - drawn) <= 1 for box, drawn in page.evaluate(heights)), "a figure covers what is below"
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden() and page.locator("#figure-geometry h2").is_visible()
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 900, "height": 700})


def test_a_browser_that_is_too_old_gets_a_message(page: Any, written: Path) -> None:
    context = page.context.browser.new_context()
    old = context.new_page()
    old.add_init_script("delete globalThis.DecompressionStream")
    old.goto(written.as_uri())
    old.locator("#failure").wait_for(state="visible")
    assert "a browser of 2023 or newer" in old.locator("#failure").text_content()
    assert old.locator("#runs td").count() > 10, "the runs are shown"
    context.close()
