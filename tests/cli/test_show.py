"""The token view: as data, and as `moewh show` prints it. Expected values come from the runs' descriptions."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import moewh
from moewh.cli.main import main
from moewh.plots.texts import script_json, visible
from moewh.plots.tokens import prompts_data
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from tests.support import synthetic
from tests.support.hostile import ARABIC, HEBREW, HOSTILE
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, random_warehouse, word, write_run

_COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, dict[str, Run]]:
    layout, runs = random_warehouse(tmp_path_factory.mktemp("show") / "wh")
    return layout, {run.run_id: run for run in runs}


def show(layout: Layout, *arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["show", *arguments], env={"MOEWH_WAREHOUSE": str(layout.root), **environment})


def shown(layout: Layout, *arguments: str, **environment: str) -> str:
    result = show(layout, *arguments, **environment)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def prompts_of(run: Run) -> list[Prompt]:
    return [prompt for segment in run.segments for prompt in segment]


def expected_text(token: Token) -> str:
    """Computed independently: the three marks that the synthetic words need."""
    return word(token.vocab_id).replace("\n", "⏎") or f"#{token.vocab_id}"


@pytest.mark.parametrize("run_id", ["007", "mixed", "wide.v-1", "step-20"])
def test_data_is_what_was_chosen(run_id: str, random: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = random
    prompts = prompts_of(runs[run_id])
    wanted = [len(prompts) - 1, 0, 2]  # of both segments, in no order
    with moewh.open(layout.root) as wh:
        data = prompts_data(wh, run_id, wanted)
    assert json.loads(script_json(data)) == data
    assert [(known["layer"], known["experts"], known["top_k"]) for known in data["layers"]] == [
        (layer, *shape) for layer, shape in runs[run_id].layers.items()
    ]
    for number, told in zip(wanted, data["prompts"], strict=True):
        tokens = prompts[number].tokens
        assert (told["prompt"], told["domain"], told["status"]) == (number, prompts[number].domain, "ok")
        assert told["texts"] == [expected_text(token) for token in tokens]
        assert told["kinds"] == [token.kind for token in tokens]
        assert told["positions"] == list(range(len(tokens)))
        for layer in runs[run_id].layers:
            route = told["routes"][str(layer)]
            assert route["ranked"]
            assert route["experts"] == [token.experts(layer) or None for token in tokens]
            for token, weights in zip(tokens, route["weights"], strict=True):
                real = [weight for _, weight in token.choices.get(layer, [])]
                assert (weights or []) == pytest.approx(real, rel=1e-3)


def test_table_is_what_was_chosen(random: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = random
    tokens = prompts_of(runs["mixed"])[3].tokens
    title, empty, header, *lines = shown(layout, "--run", "mixed", "--prompt", "3", "--layer", "3").splitlines()
    assert (title, empty) == (f"run mixed, prompt 3 ({prompts_of(runs['mixed'])[3].domain}), layer 3", "")
    if prompts_of(runs["mixed"])[3].domain is None:
        assert "(" not in title
    assert header.split() == ["token", "expert", "weight", "runners-up"]
    assert len(lines) == len(tokens)
    for line, token in zip(lines, tokens, strict=True):
        text, _, rest = line.partition("  ")
        assert text == expected_text(token).replace(" ", "␣")
        experts = [int(number) for number in re.findall(r"(?<![\d.])\d+(?![\d.])", re.sub(r"\([^)]*\)", "", rest))]
        assert experts[:1] == token.experts(3)[:1]
        named = [int(number) for number in re.findall(r"(\d+) \(", rest)]
        assert named == token.experts(3)[1:]
        assert ("-" in rest) == (not token.experts(3))


def test_colours_name_every_expert(random: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = random
    prompt = prompts_of(runs["wide.v-1"])[1]
    coloured = shown(layout, "--run", "wide.v-1", "--prompt", "1", "--layer", "1", **_COLOURS)
    assert len(set(_STYLE.findall(coloured))) > 3
    _, text, legend = _STYLE.sub("", coloured).split("\n\n")
    small = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    firsts = [token.experts(1)[:1] for token in prompt.tokens]
    parts = [
        expected_text(token) + "".join(str(n).translate(small) for n in first)
        for token, first in zip(prompt.tokens, firsts, strict=True)
    ]
    assert re.sub(r"\s", "", text) == re.sub(r"\s", "", "".join(parts))
    counts = Counter(number for first in firsts for number in first)
    for tokens, share, expert in re.findall(r"(\d+) tokens? +(\d+)%   expert (\d+)", legend):
        assert int(tokens) == counts.pop(int(expert))
        assert int(share) == pytest.approx(100 * int(tokens) / sum(map(len, firsts)), abs=0.51)
    others = re.search(r"(\d+) tokens? .*others: ([\d, ]+)", legend)
    assert ({int(n) for n in others[2].split(",")} if others else set()) == set(counts)
    assert (int(others[1]) if others else 0) == counts.total()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colours_it_is_the_table(environment: dict[str, str], random: tuple[Layout, dict[str, Run]]) -> None:
    plain = shown(random[0], "--run", "007", "--prompt", "0")
    assert shown(random[0], "--run", "007", "--prompt", "0", **(_COLOURS | environment)) == plain
    assert "\x1b" not in plain


def test_a_terminal_without_a_width_shows_everything(random: tuple[Layout, dict[str, Run]]) -> None:
    layout, _ = random
    arguments = ("--prompt", "1", "--run", "007")
    wide = shown(layout, *arguments, FORCE_COLOR="1", COLUMNS="80")
    assert shown(layout, *arguments, FORCE_COLOR="1", COLUMNS="0") == wide
    assert "expert" in wide


def hostile_warehouse(root: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """One prompt of hostile tokens in a hostile domain."""
    monkeypatch.setattr(synthetic, "WORDS", HOSTILE)
    layout = empty_warehouse(root)
    tokens = [Token(number, {0: [(number % 3, 0.5), (3, 0.25)]}) for number in range(len(HOSTILE))]
    write_run(layout, Run("hostile", {0: (4, 2)}, [[Prompt(tokens, "\x1b[2J\u202e</b>")]]))
    return layout


@pytest.mark.parametrize("environment", [{}, _COLOURS], ids=["table", "colours"])
def test_no_control_character_reaches_the_terminal(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = hostile_warehouse(tmp_path / "wh", monkeypatch)
    text = _STYLE.sub("", shown(layout, "--prompt", "0", **environment))
    joiners_and_isolates = "\n\u200c\u200d\u2068\u2069"
    controls = [
        c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in joiners_and_isolates
    ]
    assert controls == []
    for mark in ("␛", "␇", "⇥", "⟨U+202E⟩", "</script>", "日本", f"\u2068{HEBREW}\u2069"):
        assert mark in text
    assert text.count("\u2068") == text.count("\u2069") == sum(text.count(word) for word in (HEBREW, ARABIC))


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        (" a b", " a b"),
        ("\x00\x1f\x7f\x85", "␀␟␡⟨U+0085⟩"),
        ("a\r\nb\t", "a␍⏎b⇥"),
        ("\u200e\u2066\ufeff\u2028", "⟨U+200E⟩⟨U+2066⟩⟨U+FEFF⟩⟨U+2028⟩"),
        ("क्\u200dष 👩\u200d👧", "क्\u200dष 👩\u200d👧"),
        ("\u00a0\u3000\ufffd", "\u00a0\u3000\ufffd"),
    ],
)
def test_visible(text: str, mark: str) -> None:
    assert visible(text) == mark


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prompt", "99"], 1, ["prompt 99", "run step-30", "0 to 31"]),
        (["--prompt", "-1"], 2, ["prompt -1", "from 0"]),
        (["--prompt", str(10**30)], 2, ["prompt 1000", "from 0"]),
        (["--prompt", "0", "--layer", "1", "--run", "007"], 1, ["MoE layer 1", "run 007", "0, 2, 5"]),
        (["--prompt", "0", "--run", "o07"], 1, ["run 'o07'", "Did you mean '007'", "mixed"]),
        ([], 2, ["--prompt"]),
    ],
)
def test_what_does_not_exist_is_one_line(
    arguments: list[str], code: int, words: list[str], random: tuple[Layout, dict[str, Run]]
) -> None:
    arguments = arguments if "--run" in arguments or not arguments else [*arguments, "--run", "step-30"]
    result = show(random[0], *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert [part for part in words if part not in result.stderr] == []


def test_the_newest_run_is_shown(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    assert "no run in" in show(layout, "--prompt", "0").stderr
    for run_id in ("b", "a"):
        write_run(layout, Run(run_id, {0: (2, 1)}, [[Prompt([Token(0, {0: [(0, 1.0)]})])]]))
    with moewh.open(layout.root) as wh:
        newest = wh.sql("select run_id from runs order by created_at desc, run_id desc").fetchall()[0][0]
        assert f"run {newest}," in shown(layout, "--prompt", "0")
        assert repr(moewh.plots.tokens(wh, 0)) == f"TokenView(run {newest!r}, prompt 0, layer 0)"
        with pytest.raises(UsageError, match="no prompt is named"):
            moewh.plots.tokens(wh, [])
        with pytest.raises(MoewhError, match="no MoE layer 7"):
            moewh.plots.tokens(wh, 0, layer=7)


@pytest.mark.parametrize("entries", [True, False])
def test_an_imported_run_says_what_it_does_not_tell(entries: bool, tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    run = Run("told", {0: (9, 2)}, [[Prompt([Token(0, {0: [(8, 0.5), (2, 0.25)]}), Token(1, {})])]])
    write_run(layout, synthetic.without_ranks(run, "told", entries=entries))
    for environment in ({}, _COLOURS):
        _, *notes, _, header, first, second = shown(layout, "--prompt", "0", **environment).splitlines()
        assert [note.split()[0] for note in notes] == ([] if entries else ["Some"]) + ["Which", "Weights"]
        assert [line.split() for line in (header, first, second)] == [
            ["token", "experts"],
            ["the" if entries else "·", "2", "8"],
            ["quick" if entries else "·", "-"],
        ]


def test_ranks_without_weights(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, Run("ids", {0: (9, 2)}, [[Prompt([Token(0, {0: [(8, None), (2, None)]})])]]))
    assert shown(layout, "--prompt", "0").splitlines()[1:] == [
        "Weights are unknown.",
        "",
        "token  expert  runners-up",
        "the    8       2",
    ]


def test_two_hundred_experts(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    tokens = [Token(n % 3, {0: [(n, 1.0)]}) for n in range(200)]
    write_run(layout, Run("wide", {0: (200, 1)}, [[Prompt([*tokens, *tokens[150:]])]]))
    text = _STYLE.sub("", shown(layout, "--prompt", "0", **_COLOURS))
    assert re.findall(r"(\d+) tokens +\d+%   expert (\d+)", text) == [("2", str(n)) for n in range(150, 158)]
    assert re.search(r"234 tokens .* others: 158, ", text), text
    assert "the₁₉₈" in text
