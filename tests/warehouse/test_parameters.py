"""A parameter decides its type, whatever its value looks like, and a value must exist, for every query."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.warehouse.answer import existence
from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import Engine, open_engine
from moewh.warehouse.answer.existence import nearest
from moewh.warehouse.answer.jail import Limits
from moewh.warehouse.answer.parameters import KINDS, kinds_of, numeric_parameters
from moewh.warehouse.answer.query import Query, Value, bound_names, saved_names
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.trust.check import shipped_checks
from tests.support.saved_queries import EXISTING
from tests.support.synthetic import Prompt, Run, Token, random_run, random_warehouse, write_run

TEXTS = (
    *("2.10", "2.1", "1e5", "100000", "True", "true", "7318e52", "007", "7", "+5", "5", "0x10", "16", "1_000", "1000"),
    *(
        " 5",
        "nan",
        "inf",
        "null",
        "NULL",
        "2024-01-15",
        "20240115",
        "it's",
        'a"b',
        "a\\b",
        "\\",
        "é",
        "",
        "-0",
        "1.",
        "x",
    ),
    *("$run", "getvariable('run')", "--", "%", "a,b", "'"),
)
"""Texts, many of which are equal once read as numbers, booleans or dates."""
RUN_IDS = [
    text for text in TEXTS if text.replace(".", "").replace("_", "").replace("-", "").isalnum() and text[0] not in "-é"
]
SHIPPED = [*map(queries.find_query, saved_names()), *shipped_checks()]


def name_of(query: Query) -> str:
    return query.source


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return random_warehouse(tmp_path_factory.mktemp("parameters") / "wh")[0]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A run for each text that can be a run's name, and one with a domain for each text."""
    made = Layout(tmp_path_factory.mktemp("texts") / "wh")
    made.create()
    token = Token(3, {0: [(1, 0.5)]})
    for run_id in RUN_IDS:
        write_run(made, Run(run_id, {0: (2, 1)}, [[Prompt([token], run_id)]], {"series": run_id}))
    write_run(made, Run("domains", {0: (2, 1)}, [[Prompt([token], text) for text in TEXTS]]))
    return made


@pytest.fixture(scope="module")
def ask(layout: Layout) -> Iterator[Engine]:
    with open_engine("duckdb", None, layout, Limits()) as opened:
        yield opened


def rows(ask: Engine, query: Query, values: Mapping[str, Value]) -> list[tuple[Any, ...]]:
    found = ask(query, values)
    assert found is not None
    return found.execute().fetchall()


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments], env={"MOEWH_WAREHOUSE": str(layout.root)})


def answer(layout: Layout, *arguments: str) -> list[dict[str, Any]]:
    result = moewh(layout, "query", *arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    return list(json.loads(result.stdout))


def quoted(text: str) -> str:
    """Return a value in quotes, which works for any value."""
    return "'" + text.replace("'", "''") + "'"


# ------------------------------------------------------------------------------------------ text stays text


OWN = [
    "select run_id, domain from prompts where run_id = $run",
    "select run_id from routes where run_id = getvariable('run')",
    "select run_id from routes where getvariable('run') is null or run_id = getvariable('run')",
    "select run_id from routes where run_id in ($run, 'x~')",
    "select r as run_id from (select run_id as r from routes) where r = $run",
    "select run_id from routes where lower(run_id) = lower($run) and run_id = $run",
    "select run_id from routes where run_id = coalesce($run, run_id)",
    "select run_id from routes where starts_with(run_id, $run) and length(run_id) = length($run)",
]


@pytest.mark.parametrize("sql", ["domain_experts", "load_matrix", *OWN])
def test_a_run_is_its_name(sql: str, texts: Layout) -> None:
    """Plain or in quotes: each query uses one form for every other run, and the other form for the rest."""
    query = Query("-c", sql) if sql in OWN else queries.find_query(sql)
    with open_engine("duckdb", None, texts, Limits()) as ask:
        for number, run_id in enumerate(RUN_IDS):
            value = quoted(run_id) if (number + len(sql)) % 2 else run_id
            found = rows(ask, query, dict(queries.parse_parameters((f"run={value}",))))
            assert {row[0] for row in found} == {run_id}


def test_a_domain_is_its_name(texts: Layout) -> None:
    own = "select domain from domain_specialization where domain = $domain and run_id = 'domains' and tokens > 0"
    with open_engine("duckdb", None, texts, Limits()) as ask:
        for domain in TEXTS:
            values = dict(queries.parse_parameters((f"domain={quoted(domain)}",)))
            assert rows(ask, Query("-c", own), values) == [(domain,)]
            paths = rows(ask, queries.find_query("expert_paths"), {**values, "run": "domains"})
            assert [row[2] for row in paths] == [1]


@pytest.mark.parametrize("sql", ["select $x as x", "select getvariable('x') as x", "select $x || '' as x"])
def test_a_value_without_a_type_is_text(sql: str, ask: Engine) -> None:
    for text in TEXTS:
        assert rows(ask, Query("-c", sql), {"x": text}) == [(text,)]


@pytest.mark.parametrize("text", ["2.10", "True", "'007'", "it's", " 5"])
def test_the_command_takes_a_value_as_it_is(text: str, layout: Layout) -> None:
    assert answer(layout, "-c", "select $x as x", "-p", f"x={text}") == [
        {"x": text.strip("'") if text[0] == "'" else text}
    ]


NUMBERS = [
    ("select count(*) as n from experts where run_id = '007' and layer = $x", "2", 6),
    ("select count(*) as n from experts where run_id = '007' and layer = getvariable('x')", "2", 6),
    ("select count(*) as n from experts where run_id = '007' and expert > $x", "3.5", 6),
    ("select count(*) as n from experts where run_id = '007' and expert > coalesce($x, 0)", "4", 3),
    ("select count(*) as n from experts where run_id = '007' and expert between $x and 9", "1e0", 15),
    ("select count(*) as n from (select 1 from experts limit $x)", "5", 5),
    ("select $x + 1 as n", "1", 2),
    ("select 7 % getvariable('x') as n", "4", 3),
    ("select count(*) as n from range($x)", "12", 12),
    ("select round(2.345, $x)::double as n", "1", 2.3),
    ("select sum(expert) > $x as n from experts", "0.5", True),
    ("select case when $x then 1 else 2 end as n", "true", 1),
    ("select count(*) as n from runs where created_at > $x", "2025-12-31", 6),
]


@pytest.mark.parametrize(("sql", "text", "expected"), NUMBERS, ids=[sql for sql, *_ in NUMBERS])
def test_numbers_in_own_sql_work(sql: str, text: str, expected: Any, layout: Layout) -> None:
    assert answer(layout, "-c", sql, "-p", f"x={text}") == [{"n": expected}]


@pytest.mark.parametrize("number", ["2.10", "2.5", "1.9"])
def test_a_fraction_is_not_rounded_to_a_layer(number: str, layout: Layout) -> None:
    for compared in ("layer between $x and $x", "layer + 0 = $x", "layer >= $x and layer <= $x"):
        assert answer(layout, "-c", f"select * from experts where {compared}", "-p", f"x={number}") == []


def test_a_parameter_of_both_texts_and_numbers_is_text() -> None:
    assert numeric_parameters(Query("-c", "select $a from experts where layer = $a or run_id = $a"), {"a"}) == {}


@pytest.mark.parametrize("compared", ["= $x", "= getvariable('x')", ">= $x and weight <= $x", "in ($x)", "= $x::float"])
@pytest.mark.parametrize("header", ["", "-- Parameters:\n--   x (number): a weight.\n"])
def test_a_weight_as_it_is_printed_equals_the_weight(header: str, compared: str, tmp_path: Path) -> None:
    """A table prints the digits that tell a FLOAT from all others; as a DOUBLE they are another number."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    weights = [0.1, 0.3, 0.11707001179456711]
    tokens = [Token(3, {0: [(1, weight)]}) for weight in weights]
    write_run(layout, Run("one", {0: (2, 1)}, [[Prompt(tokens, "text")]]))
    (tmp_path / "mine.sql").write_text(f"{header}select count(*) as n from routing where weight {compared}\n")
    for text in ("0.1", "0.3", "0.11707001", "0.11707001179456711", "3e-1"):
        assert answer(layout, str(tmp_path / "mine.sql"), "-p", f"x={text}") == [{"n": 1}]


def test_a_number_that_no_double_holds_is_refused(layout: Layout) -> None:
    for number in ("1e400", "-1e400", "9" * 400 + ".0"):
        result = moewh(layout, "query", "-c", "select $x + 1", "-p", f"x={number}")
        assert result.exit_code == 2
        assert "the number is too large" in result.stderr


@pytest.mark.parametrize("command", [["query", "-c", "select $run"], ["query", "domain_experts"], ["check"]])
def test_a_value_that_is_not_unicode_is_one_line(command: list[str], layout: Layout) -> None:
    result = moewh(layout, *command, "-p", "run=\udcff")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "is not UTF-8 text" in result.stderr


HEADERS = [
    "-- Parameters:\n--   r (run): which.\n",
    "-- parameters:\n--   r (run): which.\n",
    "-- mine: a question.\n\n-- PARAMETERS\n--   r (run)\n",
    "\n  -- mine: a question.\n  -- Parameters (optional):\n  --   r  (run) : which.\n",
    "-- Parameters: r (run): which.\n",
    "/* mine: a question.\n   Parameters:\n     r (run): which. */\n",
    "/*\n * mine: a question.\n * Parameters:\n *   r (run): which.\n */\n\n",
    "-- mine: a question.\n/* Parameters:\n r (run): which. */\n",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_is_read_however_it_is_written(header: str, layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "mine.sql").write_text(f"{header}select $r || '' as r\n")
    assert answer(layout, str(tmp_path / "mine.sql"), "-p", "r=007") == [{"r": "007"}]
    assert "there is no run 'none'" in moewh(layout, "query", str(tmp_path / "mine.sql"), "-p", "r=none").stderr
    (tmp_path / "mine.sql").write_text(f"{header.replace('(run)', '(integer)')}select $r || '' as r\n")
    wrong = moewh(layout, "query", str(tmp_path / "mine.sql"), "-p", "r=007")
    assert "declares r (integer), which is not a kind" in wrong.stderr


def test_a_header_of_ones_own_declares_types(layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "mine.sql"
    file.write_text(
        "-- mine: a question.\n-- Parameters:\n--   like (text): a pattern.\n--   at (layer): where.\n"
        "select distinct run_id from experts where run_id like $like and layer >= $at order by run_id\n"
    )
    assert [row["run_id"] for row in answer(layout, str(file), "-p", "like=step%", "-p", "at=3")][:1] == ["step-1"]
    assert "at is a whole number" in moewh(layout, "query", str(file), "-p", "like=x", "-p", "at=x").stderr
    assert "no MoE layer 9" in moewh(layout, "query", str(file), "-p", "like=x", "-p", "at=9").stderr
    file.write_text(file.read_text().replace("(layer)", "(integer)"))
    result = moewh(layout, "query", str(file), "-p", "like=x", "-p", "at=9")
    assert "mine.sql declares at (integer), which is not a kind. Kinds: run, " in result.stderr
    assert result.exit_code == 2
    file.write_text(file.read_text().replace("  at (integer)", "  in short (see below)"))
    assert answer(layout, str(file), "-p", "like=x", "-p", "at=9") == []


# ------------------------------------------------------------------------------------------ types of shipped queries

WRONG = {
    "INTEGER": ["abc", "2.0", "2.10", "1e1", "0x10", "1_000", " 1", "1 ", "", "true", "nan", "inf", "9" * 50, "\uff11"],
    "DOUBLE": ["abc", "0x10", "1_0", " 1", "", "true", "nan", "inf", "-inf", "1e999", "1,5", "\uff11"],
    "ids": ["", "x", "3,x", "3;17", "[3]", "3,,4", ",", "1.0", "-1", "9" * 30],
}


def wrong_values(kind: str) -> list[str]:
    if KINDS[kind].ids:
        return WRONG["ids"]
    below = ["-1"] if KINDS[kind].least == 0 else []
    return [*WRONG.get(KINDS[kind].type, []), *below, *(["1.5"] if kind == "share" else [])]


@pytest.mark.parametrize("query", SHIPPED, ids=name_of)
def test_what_is_not_of_its_type_is_refused(query: Query, ask: Engine) -> None:
    values = existing(query)
    for name, kind in kinds_of(query).items():
        for text in wrong_values(kind):
            with pytest.raises(UsageError, match=f"{name} is a "):
                ask(query, {**values, name: text})


# ------------------------------------------------------------------------------------------ what does not exist

MISSING: dict[str, tuple[str, str]] = {
    "run": ("step-3", r"there is no run 'step-3'\. Did you mean 'step-30'.* Runs: 007, mixed, step-1, step-20"),
    "run of the same experts": (
        "mixed",
        r"runs step-30 and mixed do not have the same experts \(step-30 has an MoE layer 0, mixed has none\)"
        r".*: step-1, step-20\.",
    ),
    "run of the same tokens": ("mixed", r"runs step-30 and mixed do not have the same tokens.*: step-1, step-20\."),
    "complete run of the same tokens": (
        "mixed",
        r"runs step-30 and mixed do not have the same tokens.*: step-1, step-20\.",
    ),
    "placement": ("0:0:0,1:0:0", r"there is no MoE layer 1, which the placement has, in .*MoE layers: 0, 3, 4\."),
    "series": ("Trained", r"there is no series 'Trained' in any run\. Did you mean 'trained'\? Series: 'trained'\."),
    "domain": (
        "proze",
        r"there is no domain 'proze'.* Did you mean 'prose'\? Domains: 'code', 'prose'\. Some .* no domain",
    ),
    "token": (" quick", r"there is no token ' quick'.* Did you mean 'quick'"),
    "layer": ("1", r"there is no MoE layer 1 in .*MoE layers: 0, 3, 4\."),
    "expert": ("5", r"there is no expert 5 at layer 3 in .*Experts: 0 to 4\."),
    "prompt ids": ("0,99", r"there is no prompt 99 in .*Prompts: 0 to 31\."),
    "token ids": ("1,2,999", r"there is no token 999 in .*A token_id is prompt_id \* 16777216"),
}
"""Kind → a value of its type that is not in the warehouse, and the message. Layers and experts belong to a run."""


def existing(query: Query) -> dict[str, Value]:
    """A value for every parameter, as the command gives it: a text."""
    return {name: str(EXISTING[kind]) for name, kind in kinds_of(query).items()}


@pytest.mark.parametrize("query", SHIPPED, ids=name_of)
def test_what_does_not_exist_is_named_with_what_does(query: Query, ask: Engine) -> None:
    values, kinds = existing(query), kinds_of(query)
    assert kinds.keys() == query.variables
    assert bound_names(replace(query, shipped=False)) == frozenset()  # which is taken for granted of a shipped one
    if "series" in kinds.values() or "run" in kinds.values():
        rows(ask, query, values)
    for name, kind in kinds.items():
        if kind in MISSING:
            value, says = MISSING[kind]
            with pytest.raises(MoewhError, match=says) as caught:
                ask(query, {**values, name: value})
            assert caught.value.exit_code == 1


@pytest.mark.parametrize("query", [*map(queries.find_query, saved_names())], ids=name_of)
def test_what_does_not_exist_leaves_the_file_alone(query: Query, layout: Layout, tmp_path: Path) -> None:
    kinds = kinds_of(query)
    name = next(name for name, kind in kinds.items() if kind in MISSING)
    given = {**existing(query), name: MISSING[kinds[name]][0]}
    file = tmp_path / "out.csv"
    file.write_text("old")
    arguments = [part for key, value in given.items() for part in ("-p", f"{key}={value}")]
    result = moewh(layout, "query", query.source.removesuffix(".sql"), *arguments, "-o", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert file.read_text() == "old"


def test_every_kind_that_names_something_is_looked_up() -> None:
    used = {kind for query in SHIPPED for kind in kinds_of(query).values()}
    assert EXISTING.keys() == KINDS.keys()
    assert MISSING.keys() == {*existence.RUN_KINDS, *existence._FINDERS}
    assert MISSING.keys() <= used


def test_without_a_run_some_run_must_have_all_that_is_named(tmp_path: Path) -> None:
    """Each of the two exists, but in different runs: together they would give an empty result."""
    made = Layout(tmp_path / "wh")
    made.create()
    token = Token(3, {0: [(1, 0.5)]})
    write_run(made, Run("one", {0: (2, 1)}, [[Prompt([token], "a"), Prompt([token], "b")]]))
    write_run(made, Run("two", {0: (2, 1), 1: (9, 1)}, [[Prompt([token], "c")]]))
    contrast, tokens = queries.find_query("contrast_domains"), queries.find_query("expert_top_tokens")
    with open_engine("duckdb", None, made, Limits()) as ask:
        assert rows(ask, contrast, {"domain": "a", "other_domain": "b"})
        with pytest.raises(MoewhError, match=r"no domain 'c' in run one\. Domains: 'a', 'b'\."):
            ask(contrast, {"domain": "a", "other_domain": "c"})
        with pytest.raises(MoewhError, match=r"no expert 5 at layer 0 in any run\. Experts: 0, 1\."):
            ask(tokens, {"layer": "0", "expert": "5"})
        with pytest.raises(MoewhError, match=r"no MoE layer 1 in run one\. MoE layers: 0\."):
            ask(tokens, {"layer": "1", "expert": "0", "run": "one"})


@pytest.mark.parametrize(
    ("sql", "values", "said"),
    [
        ("run_id in ($a)", {"a": "mixed,007"}, "there is no run 'mixed,007'"),
        ("run_id in ($a, $b)", {"a": "mixed", "b": "none"}, "there is no run 'none'"),
        ("r.run_id IN (getvariable('a'), $b)", {"a": "none", "b": "mixed"}, "there is no run 'none'"),
        ("layer in ($a, $b)", {"a": "3", "b": "99"}, "there is no MoE layer 99"),
        ("layer in (-1, $a)", {"a": "99"}, "there is no MoE layer 99"),
        ("layer in ($a)", {"a": "0,3"}, "-p a=0,3: a is a whole number"),
        ("domain in ($a)", {"a": "cod"}, "there is no domain 'cod'"),
    ],
)
def test_what_does_not_exist_in_a_list_of_ones_own(sql: str, values: dict[str, Value], said: str, ask: Engine) -> None:
    with pytest.raises(MoewhError, match=re.escape(said)):
        ask(Query("-c", f"from routes as r where {sql}"), values)


@pytest.mark.parametrize("sql", ["layer not in ($a, $b)", "layer in ($a, $b) or position in ($a, $b)"])
def test_other_comparisons_look_nothing_up(sql: str, ask: Engine) -> None:
    assert rows(ask, Query("-c", f"from routes where {sql}"), {"a": "98", "b": "99"}) != [] or " or " in sql


PARTS = [
    ("layer = $x - 1", "4"),
    ("layer = $x + 1", "-1"),
    ("layer = $x::int - 1", "4"),
    ("t.layer = getvariable('x') % 10", "93"),
    ("1 + layer = $x", "4"),
    ("1 + t.layer = $x", "4"),
    ("$x - 1 = layer", "4"),
    ("4 - $x = layer", "-1"),
    ("1 + layer in ($x)", "4"),
    ("run_id = $x || 'xed'", "mi"),
    ("'a' || run_id = $x", "amixed"),
    ("layer || '/' || t.run_id = $x", "3/mixed"),
    ("run_id = $x[2:]", "amixed"),
]


@pytest.mark.parametrize(("sql", "text"), PARTS)
def test_a_parameter_in_an_expression_is_no_name(sql: str, text: str, ask: Engine) -> None:
    assert rows(ask, Query("-c", f"from routes as t where {sql} limit 1"), {"x": text}) != []


@pytest.mark.parametrize(
    "sql",
    ["t.layer=$x", '"t".layer = $x::int', "(layer = $x)", "not(layer = $x)", "$x = t.layer", "a or\n\tlayer  =  $x"],
)
def test_a_comparison_is_found_however_it_is_written(sql: str, ask: Engine) -> None:
    query = f"from (select *, weight > 2 as a from routes) as t where {sql}"
    with pytest.raises(MoewhError, match="there is no MoE layer 99"):
        ask(Query("-c", query), {"x": "99"})


def test_what_exists_and_does_not_match_is_an_empty_answer(ask: Engine) -> None:
    asked: dict[str, Value] = {"run": "step-30", "other_run": "step-1", "min_lift": "1e6"}
    assert rows(ask, queries.find_query("specialization_changes"), asked) == []
    assert rows(ask, queries.find_query("confidence_by_domain"), {"run": "007"}) == []


def test_long_lists_are_cut(tmp_path: Path) -> None:
    made = Layout(tmp_path / "wh")
    made.create()
    run = random_run("r", 1, {0: (2, 1)}, 2)
    for number in range(30):
        write_run(made, replace(run, run_id=f"r-{number:02}"))
    error = moewh(made, "query", "domain_experts", "-p", "run=zzz").stderr
    assert error.endswith("r-19 and 10 more.\n")


@pytest.mark.parametrize(
    ("text", "known", "expected"),
    [
        ("the", [" The", " the", "then", "x"], [" the", " The", "then"]),
        ("Ġthe", [" the"], [" the"]),
        ("▁the", ["the"], ["the"]),
        (" the", ["the", "there"], ["the", "there"]),
        ("zzz", ["the"], []),
    ],
)
def test_nearest_tokens(text: str, known: list[str], expected: list[str]) -> None:
    assert nearest(text, known)[: len(expected) or None] == expected


def test_spaces_of_a_token_are_shown_as_they_are(tmp_path: Path) -> None:
    made = Layout(tmp_path / "wh")
    made.create()
    write_run(made, Run("r", {0: (2, 1)}, [[Prompt([Token(5, {0: [(1, 0.5)]})])]]))
    error = moewh(made, "query", "token_experts", "-p", "token=   lead").stderr
    assert "there is no token '   lead' in run r. Did you mean ' lead'?" in error
