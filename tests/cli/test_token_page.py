"""The token view in a browser: its content, with mouse and keyboard, and that hostile texts stay text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moewh
from moewh.plots.texts import visible
from moewh.plots.tokens import TokenView, palette
from tests.support import synthetic
from tests.support.browser import browser_page
from tests.support.hostile import HOSTILE
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, random_warehouse, without_ranks, write_run


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser_page() as opened:
        yield opened


def open_view(page: Any, view: TokenView, folder: Path) -> None:
    (folder / "view.html").write_text(view.page(), encoding="utf-8")
    page.goto((folder / "view.html").as_uri())


def test_hostile_texts_stay_text(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "WORDS", HOSTILE)
    layout = empty_warehouse(tmp_path / "wh")
    tokens = [Token(number, {0: [(number % 3, 0.5)]}) for number in range(len(HOSTILE))]
    write_run(layout, Run("hostile", {0: (4, 1)}, [[Prompt(tokens, "</script><img src=x onerror=alert(1)>")]]))
    with moewh.open(layout.root) as wh:
        view = moewh.plots.tokens(wh, 0)
    open_view(page, view, tmp_path)
    assert page.title() == "Token view"
    assert page.locator(".moewh-text .moewh-word").all_text_contents() == [visible(text) for text in HOSTILE]
    assert "</script><img" in page.locator("h3").text_content()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    isolated = "els => els.map(el => getComputedStyle(el).unicodeBidi)"
    assert set(page.locator(".moewh-word").evaluate_all(isolated)) == {"isolate"}
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.evaluate(wide), "a long token widens the page"
    assert page.problems == []


def test_mouse_and_keyboard_show_the_experts(page: Any, tmp_path: Path) -> None:
    layout, runs = random_warehouse(tmp_path / "wh")
    run = next(run for run in runs if run.run_id == "mixed")
    tokens = run.segments[0][1].tokens
    with moewh.open(layout.root) as wh:
        view = moewh.plots.tokens(wh, [1, 5], layer=3, run="mixed")
    open_view(page, view, tmp_path)
    assert page.locator("section").count() == 2
    assert page.locator("h2").text_content() == "Run mixed"
    section = page.locator("section").first
    labels = section.locator(".moewh-text sub").all_text_contents()
    assert labels == [str(token.experts(3)[0]) if token.experts(3) else "-" for token in tokens]
    buttons, detail = section.locator(".moewh-text button"), section.locator(".moewh-detail")

    def shown(number: int) -> bool:
        chosen = tokens[number].choices.get(3)
        words = [f"expert {expert} ({weight:.4g})" for expert, weight in chosen] if chosen else ["no expert"]
        text = detail.text_content()
        return f"position {number}, " in text and all(word in text for word in words)

    buttons.nth(4).hover()
    assert shown(4)
    page.locator("select").focus()
    page.keyboard.press("Tab")
    assert shown(0)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert shown(2)
    page.keyboard.press("End")
    assert shown(len(tokens) - 1)
    page.keyboard.press("Tab")  # one stop per prompt
    assert page.evaluate("document.activeElement.closest('section') === document.querySelectorAll('section')[1]")
    page.locator("select").select_option("4")
    labels = section.locator(".moewh-text sub").all_text_contents()
    assert labels == [str(token.experts(4)[0]) if token.experts(4) else "-" for token in tokens]
    assert page.problems == []


def test_only_the_most_used_of_many_experts_have_colours(page: Any, tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    tokens = [Token(n % 3, {0: [(n, 1.0)]}) for n in range(200)]
    run = Run("wide", {0: (200, 1)}, [[Prompt([*tokens, *tokens[150:]])]])
    write_run(layout, run)
    pairs = [Token(1, {0: [(n, 0.5), (n + 1, 0.5)]}) for n in range(9)]
    write_run(layout, without_ranks(Run("told", {0: (200, 2)}, [[Prompt(pairs)]]), "told"))
    with moewh.open(layout.root) as wh:
        views = [moewh.plots.tokens(wh, 0, run=run_id) for run_id in ("wide", "told")]
    open_view(page, views[0], tmp_path)
    look = "els => els.map(el => [getComputedStyle(el).backgroundColor, getComputedStyle(el).borderBottom].join())"
    looks = page.locator(".moewh-text button").evaluate_all(look)
    assert len(set(looks[150:158])) == 8
    assert set(looks[:150] + looks[158:200]) == {looks[0]}
    assert looks[0] not in looks[150:158]
    assert page.locator(".moewh-legend li").all_text_contents() == [
        *(f"expert {n} 2 tokens, 1%" for n in range(150, 158)),
        "192 other experts 234 tokens, 94%",
    ]
    open_view(page, views[1], tmp_path)
    assert page.locator(".moewh-text sub").all_text_contents() == [f"{n} {n + 1}" for n in range(9)]
    assert len(set(page.locator(".moewh-text button").evaluate_all(look))) == 1
    page.locator(".moewh-text button").first.click()
    assert "in no known order" in page.locator(".moewh-detail").text_content()
    assert page.locator(".moewh-note").count() == 2


def test_a_notebook_shows_it_in_a_frame(page: Any, tmp_path: Path) -> None:
    layout, _ = random_warehouse(tmp_path / "wh")
    with moewh.open(layout.root) as wh:
        view = moewh.plots.tokens(wh, 0, run="007")
    assert view._mime_() == ("text/html", view._repr_html_())
    page.set_content(view._repr_html_())
    tokens = page.frame_locator("iframe").locator(".moewh-text button")
    tokens.first.wait_for()
    assert tokens.count() == len(view.data["prompts"][0]["texts"])
    assert page.problems == []


def test_black_is_readable_on_every_colour() -> None:
    """Return WCAG's contrast of black text, which must be at least 4.5."""

    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    assert len(set(palette())) == 8
    assert all((luminance(colour) + 0.05) / 0.05 >= 4.5 for colour in palette())
    style = (Path(moewh.plots.__file__).parent / "tokens.css").read_text()
    assert len(set(re.findall(r"c\d \{ [^}]*\}", style))) == 8
