"""Chats as text: the same as apply_chat_template with the same arguments, on whatever day the run continues."""

from __future__ import annotations

import json
import multiprocessing
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from moewh.cli.main import main
from moewh.ingest.options import IngestOptions
from moewh.ingest.processes import Process
from moewh.ingest.prompts import template_time
from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.chats import ChatRules, chat_arguments
from moewh.ingest.prompts.tokenise import TokenRules, tokenise
from moewh.ingest.run import Progress, Summary, ingest
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from tests.support.chat_templates import (
    CHATML,
    DATED,
    KINDS,
    LISTS_ONLY,
    STRINGS_ONLY,
    THINKING,
    TIMED,
    TOOLS,
    set_clocks,
)
from tests.support.models import byte_tokenizer, save_model
from tests.support.opened import viewed

FIRST, LATER = datetime(2026, 3, 1, 23, 59, 58), datetime(2027, 11, 30, 4, 5, 6)
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}],
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
DOCUMENT = {"title": "T", "text": "body"}


def texts(template: Any, *payloads: Any, **rules: Any) -> list[str]:
    """Return the texts of chats from tokenise."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    rows = [{"text": json.dumps(payload), "form": "messages", "source": "s"} for payload in payloads]
    table = pa.Table.from_pylist(rows, schema=CANONICAL)
    segment = tokenise(table, 3, tokenizer, TokenRules(4096, "error", True, ChatRules(**rules)))
    return [text for text in segment.text_P if text is not None]


def applied(template: Any, messages: Any, **arguments: Any) -> str:
    """Return transformers' own text of a chat."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_what_apply_chat_template_gives(
    kind: str, generation_prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clocks(monkeypatch, FIRST)
    for arguments in ({}, {"enable_thinking": False, "effort": 3}, {"date_string": "long ago"}):
        for extra in ({}, {"tools": [TOOL]}, {"documents": [DOCUMENT]}, {"tools": [TOOL], "documents": [DOCUMENT]}):
            given = [{"messages": chat, **extra} for chat in CHATS] if extra else CHATS
            expected = [
                applied(KINDS[kind], chat, add_generation_prompt=generation_prompt, **arguments, **extra)
                for chat in CHATS
            ]
            assert texts(KINDS[kind], *given, arguments=arguments, generation_prompt=generation_prompt) == expected


def test_tools_and_documents_may_be_json_text() -> None:
    expected = applied(TOOLS, CHATS[0], tools=[TOOL], documents=[DOCUMENT])
    assert "add" in expected and "body" in expected
    for tools in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]):
        for documents in ([DOCUMENT], json.dumps([DOCUMENT])):
            assert texts(TOOLS, {"messages": CHATS[0], "tools": tools, "documents": documents}) == [expected]
    for nothing in (None, "", "null"):
        given = {"messages": CHATS[0], "tools": nothing, "documents": nothing}
        assert texts(TOOLS, given) == [applied(TOOLS, CHATS[0])]


def test_named_templates_are_chosen_as_transformers_does() -> None:
    named = {"default": CHATML, "tool_use": TOOLS}
    with_tools = {"messages": CHATS[0], "tools": [TOOL]}
    expected = [applied(named, CHATS[0]), applied(named, CHATS[0], tools=[TOOL])]
    assert texts(named, CHATS[0], with_tools) == expected
    assert expected == [applied(CHATML, CHATS[0]), applied(TOOLS, CHATS[0], tools=[TOOL])]


def parts(*given: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(given)}]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
        [{"type": "text", "text": "one ", "image_url": None}, {"text": "two"}],
        ["one ", "two"],
        [{"type": "input_text", "text": "one two"}],
    ],
    ids=["parts", "nulls", "strings", "responses"],
)
@pytest.mark.parametrize("template", [CHATML, TOOLS, THINKING, LISTS_ONLY, STRINGS_ONLY])
def test_parts_of_text_are_joined_whatever_the_template_takes(template: str, content: Any) -> None:
    plain = TOOLS if template == LISTS_ONLY else template
    expected = applied(plain, [{"role": "user", "content": "one two"}]).strip()
    assert [text.strip() for text in texts(template, parts(*content))] == [expected]


def test_a_template_of_lists_gets_lists() -> None:
    whole = "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
    assert texts(whole, parts({"type": "text", "text": "a"}, {"type": "text", "text": "b"})) == ["(a)(b)"]
    assert texts(LISTS_ONLY, CHATS[0]) == ["[user]hi"], "a string that it would drop is made a part"
    assert texts(CHATML, [{"role": "user", "content": []}]) == [applied(CHATML, [{"role": "user", "content": ""}])]


@pytest.mark.parametrize("speakers", [("system", "human", "gpt"), ("System", "user", "assistant")])
def test_sharegpt_is_normalised(speakers: tuple[str, str, str]) -> None:
    given = [{"from": who, "value": what, "weight": None} for who, what in zip(speakers, "abc", strict=True)]
    roles = ("system", "user", "assistant")
    chat = [{"role": role, "content": what} for role, what in zip(roles, "abc", strict=True)]
    assert texts(CHATML, given) == [applied(CHATML, chat)]
    for tool in ("tool", "observation", "function"):
        assert texts(CHATML, [{"from": tool, "value": "x"}]) == [applied(CHATML, [{"role": "tool", "content": "x"}])]


REPR = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}


@pytest.mark.parametrize(
    ("template", "payload", "says"),
    [
        (CHATML, [], "not a list of at least one message"),
        (CHATML, {"tools": [TOOL]}, "not a list of at least one message"),
        (CHATML, {"messages": "hi"}, "not a list of at least one message"),
        (CHATML, ["hi"], "refuses message 0: it is a string"),
        (CHATML, [[CHATS[0][0]]], "refuses message 0: it is a list"),
        (CHATML, [None], "refuses message 0: it is null"),
        (CHATML, [{"content": "x"}], "message 0 has no role"),
        (CHATML, [{"role": None, "content": "x"}], "message 0 has no role"),
        (CHATML, [{"role": 5, "content": "x"}], "message 0 has no role"),
        (CHATML, [{"role": "user"}], "message 0 (user) has no content"),
        (CHATML, [*CHATS[0], {"role": "user", "content": None}], "message 1 (user) has no content"),
        (CHATML, [{"role": "user", "content": 5}], "content that is a number, not text"),
        (CHATML, [{"role": "user", "content": True}], "content that is a boolean, not text"),
        (CHATML, [{"role": "user", "content": {"text": "x"}}], "as Python prints it"),
        (CHATML, parts({"type": "image", "url": "x"}), "a part of type 'image'"),
        (CHATML, parts({"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}), "type 'image_url'"),
        (LISTS_ONLY, parts({"type": "input_audio", "input_audio": {}}), "type 'input_audio'"),
        (CHATML, parts({"type": "text"}), "a part of type 'text'. Only text parts are"),
        (CHATML, parts(["x"]), "a part that is a list"),
        (CHATML, [{"from": "alien", "value": "x"}], "message 0 is from 'alien'. Use "),
        (CHATML, [{"from": None, "value": "x"}], "message 0 has no role"),
        (CHATML, [{"from": "human", "value": None}], "message 0 (user) has no content"),
        (REPR, [CALL], "as Python prints it"),
        ("{{ tools }}", {"messages": CHATS[0], "tools": [TOOL]}, "as Python prints it"),
        (TOOLS, {"messages": CHATS[0], "tools": "{"}, "its tools are not valid JSON"),
        (TOOLS, {"messages": CHATS[0], "tools": TOOL}, "its tools are not a list of objects"),
        (TOOLS, {"messages": CHATS[0], "tools": ["add"]}, "its tools are not valid JSON"),
        (TOOLS, {"messages": CHATS[0], "documents": [5]}, "its documents are not a list of objects"),
        ("{{ raise_exception('roles must\nalternate') }}{{ messages }}", CHATS[0], "refuses its messages: roles must"),
        ("{{ messages[7].role.upper() }}", CHATS[0], "refuses its messages: "),
        ("{{ messages[0].content / 0 }}", CHATS[0], "refuses its messages: "),
        ("{{ 1 / 0 }}{{ messages }}", CHATS[0], "refuses its messages: division by zero"),
        ("{% if messages %}", CHATS[0], "refuses its messages: "),
        ({"other": CHATML}, CHATS[0], "refuses its messages: This model has multiple chat templates"),
        (None, CHATS[0], "is chat messages, but the tokenizer has no chat template. Give one with --chat-template"),
    ],
)
def test_what_no_template_can_render_is_refused_by_prompt(template: Any, payload: Any, says: str) -> None:
    with pytest.raises(MoewhError) as refused:
        texts(template, CHATS[0] if template == CHATML else payload, payload)
    assert says in str(refused.value)
    assert str(refused.value).startswith("prompt 4" if template == CHATML else "prompt 3")
    assert "\n" not in str(refused.value)


def test_text_that_looks_like_python_is_text() -> None:
    said = "{'name': 'add', 'arguments': {'a': 1}} [5]"
    chat = [{"role": "user", "content": said}, CALL]
    assert texts(TOOLS, chat) == [applied(TOOLS, chat)]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("false", False),
        ("3", 3),
        ("0.5", 0.5),
        ("[1, 2]", [1, 2]),
        ('{"a": null}', {"a": None}),
        ('"true"', "true"),
        ("high", "high"),
        ("26 Jul 2026", "26 Jul 2026"),
        ("007", "007"),
        ("NaN", "NaN"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_value_of_a_chat_argument(given: str, value: Any) -> None:
    found = chat_arguments((f"x={given}",))["x"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "given",
    [
        *("messages=[]", "tools=[]", "documents=[]", "add_generation_prompt=true", "continue_final_message=true"),
        *("chat_template=x", "conversation=x", "conversations=x", "tokenize=true", "strftime_now=x"),
        *("raise_exception=x", "self=x", "namespace=x", "x", "=x", "a b=c", "3=c"),
    ],
)
def test_chat_arguments_that_are_not_the_users(given: str) -> None:
    with pytest.raises(UsageError, match="--chat-argument"):
        chat_arguments((given,))


# Whole runs


def save(folder: Path, template: str | None) -> Path:
    save_model(folder, max_position_embeddings=4096, num_hidden_layers=1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def stored(warehouse: Path, run_id: str) -> list[str]:
    rows = viewed(Layout(warehouse)).execute("select text from prompts where run_id = ? order by prompt_id", [run_id])
    return [text for (text,) in rows.fetchall()]


def options_of(warehouse: Path) -> dict[str, Any]:
    rows = viewed(Layout(warehouse)).execute("select options from runs").fetchall()
    return dict(json.loads(rows[0][0]))


class Killed(BaseException):
    """Simulates a kill: nothing below it cleans up."""


def start(
    warehouse: Path,
    model: Path,
    prompts: Path,
    kill_after: int | None = None,
    process: Process | None = None,
    **more: Any,
) -> Summary:
    """Ingest in segments of one prompt; `kill_after` ends it after that many committed segments."""

    def committed(number: int, _: int) -> None:
        if kill_after is not None and number + 1 >= kill_after:
            raise Killed

    options = IngestOptions(model=str(model), prompts=(str(prompts),), segment_rows=110, **more)
    return ingest(options, Layout(warehouse), Progress(segment_done=committed), process)


@pytest.mark.parametrize("generate", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_and_goes_on_another_day_holds_one_text(
    kind: str, generate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path / "m", KINDS[kind])
    prompts = write(tmp_path / "p.jsonl", *({"messages": chat} for chat in CHATS))
    set_clocks(monkeypatch, FIRST, template_time)
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=bool(generate)) for chat in CHATS
    ]
    with pytest.raises(Killed):
        start(tmp_path / "wh", model, prompts, kill_after=1, generate=generate)
    set_clocks(monkeypatch, LATER, template_time)
    with pytest.raises(Killed):
        start(tmp_path / "wh", model, prompts, kill_after=2, generate=generate)
    summary = start(tmp_path / "wh", model, prompts, generate=generate)
    assert summary.segments > 1
    assert stored(tmp_path / "wh", summary.run_id) == expected
    assert not start(tmp_path / "wh", model, prompts, generate=generate).written, "complete"
    times = {"dated": "2026-03-01", "timed": "2026-03-01T23:59:58"}
    assert options_of(tmp_path / "wh").get("template_time") == times.get(kind)


def test_a_time_that_is_not_fixed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moewh.ingest.plan.fix_time", lambda *_: None)
    model = save(tmp_path / "m", DATED)
    prompts = write(tmp_path / "p.jsonl", *({"messages": chat} for chat in CHATS))
    set_clocks(monkeypatch, FIRST, template_time)
    with pytest.raises(Killed):
        start(tmp_path / "wh", model, prompts, kill_after=1)
    set_clocks(monkeypatch, LATER, template_time)
    run_id = start(tmp_path / "wh", model, prompts).run_id
    assert len({text.splitlines()[0] for text in stored(tmp_path / "wh", run_id)}) == 2


def test_the_rest_of_a_run_without_its_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "m", DATED)
    prompts = write(tmp_path / "p.jsonl", *({"messages": chat} for chat in CHATS))
    with monkeypatch.context() as older, pytest.raises(Killed):
        older.setattr("moewh.ingest.plan.fix_time", lambda *_: None)
        start(tmp_path / "wh", model, prompts, kill_after=1)
    with pytest.raises(MoewhError, match="begun without recording the time"):
        start(tmp_path / "wh", model, prompts)


def test_a_deleted_run_gets_a_new_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "m", DATED)
    prompts = write(tmp_path / "p.jsonl", {"messages": CHATS[0]})
    warehouse = tmp_path / "wh"
    for now, day in ((FIRST, "Today: 01 Mar 2026"), (LATER, "Today: 30 Nov 2027")):
        set_clocks(monkeypatch, now, template_time)
        assert stored(warehouse, start(warehouse, model, prompts, run_id="r").run_id)[0].startswith(day)
        deleted = CliRunner().invoke(main, ["runs", "--delete", "r", "--yes", "--warehouse", str(warehouse)])
        assert deleted.exit_code == 0, deleted.output


def test_a_run_whose_own_files_are_lost_keeps_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "m", TIMED)
    prompts = write(tmp_path / "p.jsonl", {"messages": CHATS[0]})
    set_clocks(monkeypatch, FIRST, template_time)
    run_id = start(tmp_path / "wh", model, prompts).run_id
    for file in Layout(tmp_path / "wh").run(run_id).iterdir():
        file.unlink()
    Layout(tmp_path / "wh").run(run_id).rmdir()
    set_clocks(monkeypatch, LATER, template_time)
    start(tmp_path / "wh", model, prompts)
    assert options_of(tmp_path / "wh")["template_time"] == FIRST.isoformat()


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    model = save(tmp_path / "m", DATED)
    prompts = write(tmp_path / "p.jsonl", {"messages": CHATS[0]}, {"messages": []})
    with pytest.raises(MoewhError, match="prompt 1"):
        start(tmp_path / "wh", model, prompts)
    assert not (tmp_path / "wh").exists()


def _one_of_two(rank: int, warehouse: Path, model: Path, prompts: Path, gate: Any) -> None:
    patch = pytest.MonkeyPatch()
    set_clocks(patch, (FIRST, LATER)[rank], template_time)
    gate.wait()
    start(warehouse, model, prompts, process=Process(rank, 2))


def test_processes_that_start_together_see_one_time(tmp_path: Path) -> None:
    model = save(tmp_path / "m", TIMED)
    prompts = write(tmp_path / "p.jsonl", *({"messages": chat} for chat in CHATS * 2))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that torch is imported once for both
    gate = context.Barrier(2)
    processes = [
        context.Process(target=_one_of_two, args=(rank, tmp_path / "wh", model, prompts, gate)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    rows = viewed(Layout(tmp_path / "wh")).execute("select text, runs.status from prompts, runs").fetchall()
    assert len(rows) == 6
    assert len({text.splitlines()[0] for text, _ in rows}) == 1
    assert {status for _, status in rows} == {"complete"}


def test_the_time_is_recorded_only_where_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct runs keep their identity, and runs of one day have the same tokens."""
    model = save(tmp_path / "m", DATED)
    chats = write(tmp_path / "c.jsonl", *({"messages": chat} for chat in CHATS))
    plain = write(tmp_path / "p.jsonl", {"text": "one"})
    seen = []
    for number, (prompts, arguments) in enumerate(
        [(plain, ()), (chats, ("date_string=long ago",)), (chats, ()), (chats, ())]
    ):
        set_clocks(monkeypatch, FIRST.replace(second=number), template_time)
        warehouse = tmp_path / f"wh{number}"
        start(warehouse, model, prompts, chat_arguments=arguments)
        key = viewed(Layout(warehouse)).execute("select tokens_key from runs").fetchall()
        seen.append((options_of(warehouse).get("template_time"), key))
    assert [time for time, _ in seen] == [None, None, "2026-03-01", "2026-03-01"]
    assert seen[2] == seen[3]
    assert len({str(key) for _, key in seen}) == 3


def command(warehouse: Path, model: Path, prompts: Path, *more: str) -> Result:
    arguments = ["ingest", "--model", str(model), "--prompts", str(prompts), "--warehouse", str(warehouse), *more]
    return CliRunner().invoke(main, [*arguments, "--run-id", "r"])


def test_a_template_from_a_file_and_arguments_are_part_of_the_run(tmp_path: Path) -> None:
    model = save(tmp_path / "m", None)
    prompts = write(tmp_path / "p.jsonl", *({"messages": chat} for chat in CHATS))
    (tmp_path / "t.jinja").write_text(THINKING)
    more = ["--chat-template", str(tmp_path / "t.jinja"), "--generate", "1"]
    arguments = ["--chat-argument", "enable_thinking=false", "--chat-argument", "effort=high"]
    result = command(tmp_path / "wh", model, prompts, *more, *arguments)
    assert result.exit_code == 0, result.stderr
    expected = [
        applied(THINKING, chat, add_generation_prompt=True, enable_thinking=False, effort="high") for chat in CHATS
    ]
    assert "<think></think>" in expected[0]
    assert stored(tmp_path / "wh", "r") == expected
    recorded = options_of(tmp_path / "wh")
    assert recorded["chat_arguments"] == {"enable_thinking": False, "effort": "high"}
    assert recorded["generation_prompt"] is True
    changed = command(tmp_path / "wh", model, prompts, *more, "--chat-argument", "effort=high")
    assert "chat_arguments was {'effort': 'high', 'enable_thinking': False}, now {'effort': 'high'}" in changed.stderr
    (tmp_path / "t.jinja").write_text(THINKING + "!")
    assert "tokenizer_sha256 was" in command(tmp_path / "wh", model, prompts, *more, *arguments).stderr


@pytest.mark.parametrize(
    ("template", "record", "more", "says", "code"),
    [
        (CHATML, {"messages": CHATS[0]}, ["--chat-argument", "effort=1"], "does not use effort", 2),
        (CHATML, {"messages": CHATS[0]}, ["--chat-argument", "tools=1"], "--chat-argument tools is set by moewh", 2),
        (CHATML, {"messages": CHATS[0]}, ["--chat-argument", "x"], "'x' is not name=value", 2),
        (THINKING, {"text": "x"}, ["--chat-argument", "effort=1"], "no effect: no prompt consists of chat messages", 2),
        (CHATML, {"text": "x"}, ["--chat-template", "good"], "no effect: no prompt consists of chat messages", 2),
        (CHATML, {"messages": CHATS[0]}, ["--chat-template", "none"], "none cannot be read: No such file", 2),
        (CHATML, {"messages": CHATS[0]}, ["--chat-template", "."], "cannot be read: Is a directory", 2),
        (CHATML, {"messages": CHATS[0]}, ["--chat-template", "prose"], "does not use messages", 2),
        (CHATML, {"messages": CHATS[0]}, ["--chat-template", "bytes"], "is not UTF-8", 2),
        (CHATML, {"messages": CHATS[0]}, ["--chat-template", "broken"], "the chat template is not valid Jinja", 1),
        ("{% for m in messages %}", {"messages": CHATS[0]}, [], "the chat template is not valid Jinja", 1),
    ],
)
def test_options_of_chats_that_cannot_be_meant(
    *,
    template: str,
    record: dict[str, Any],
    more: list[str],
    says: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save(tmp_path / "m", template)
    Path("good").write_text(CHATML)
    Path("prose").write_text("hello")
    Path("bytes").write_bytes(b"\xff\xfe messages")
    Path("broken").write_text("{% for m in messages %}")
    result = command(tmp_path / "wh", model, write(tmp_path / "p.jsonl", record), *more)
    assert result.exit_code == code
    line, *rest = result.stderr.splitlines()
    assert says in line
    assert not rest
    assert not (tmp_path / "wh").exists()


def test_tools_that_a_template_leaves_out_are_reported() -> None:
    warned: list[str] = []
    rows = [{"text": json.dumps({"messages": CHATS[0], "tools": [TOOL]}), "form": "messages", "source": "s"}] * 3
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    table = pa.Table.from_pylist(rows, schema=CANONICAL)
    tokenise(table, 0, tokenizer, TokenRules(99, "error", True), warn=warned.append)
    assert warned == ["prompt 0 has tools, but the chat template does not use them: they are not in its text."]
