"""Records to prompts: which columns of a record are its prompt, and what happens to the others.

In: a relation of records, as SQL, with one JSON value per relevant column, whether they come from JSON or Arrow tables.
Out: the SQL of the canonical columns (text, form, domain, source, metadata), plus the columns with which `problem_of`
describes a record that is not a prompt.

A prompt is a text, or chat messages or token ids, which are kept as JSON under `text`, and `form` states which. See
CONVENTIONS for the columns that are read by default.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MESSAGES, INPUT_IDS = "messages", "input_ids"
"""The values of `form` for a prompt that is not a text; else it is `text`."""


@dataclass(frozen=True)
class Convention:
    """A column that is read as a prompt, with the columns that belong to it."""

    head: str
    form: str = "text"
    """The form of the head: a text (or messages or ids, depending on its content), or a list of that form."""
    joined: tuple[str, ...] = ()
    """Columns whose texts are appended to the head's."""
    joint: str = ""
    """The separator between them; empty texts are left out."""
    left_out: tuple[str, ...] = ()
    """Columns that belong to the prompt by other conventions: a record that fills one is refused, not shortened."""
    named: bool = False
    """Named by --text-column: a text in a column called `messages` is a text, and no other column belongs to it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that goes into the prompt, and so not into metadata."""
        return (self.head, *self.joined)


_KWARGS = "chat_template_kwargs"
_OF_CHATS = ("system", "system_prompt", "functions", _KWARGS)
CONVENTIONS = (
    Convention("text"),
    Convention("prompt", joined=("completion",), left_out=("system", "system_prompt", _KWARGS)),
    Convention("instruction", joined=("input", "output"), joint="\n", left_out=("system", "system_prompt", "history")),
    Convention("messages", MESSAGES, left_out=_OF_CHATS),
    Convention("conversations", MESSAGES, left_out=_OF_CHATS),
    Convention("input_ids", INPUT_IDS, left_out=("position_ids",)),
)
"""The columns read without --text-column. Of those for texts, the first present is used."""
_LIST_FORMS = {convention.head: convention.form for convention in CONVENTIONS if convention.form != "text"}
_FOR_TEMPLATE = ("tools", "documents")
_MASK = "attention_mask"
TOKENIZER_COLUMNS = (*_FOR_TEMPLATE, _MASK)
"""Columns that go to the tokenizer with messages and ids, and also stay in metadata."""


def conventions(text_column: str | None) -> tuple[Convention, ...]:
    """Return the possible prompt columns: only the one given with --text-column, else every convention."""
    if text_column is None:
        return CONVENTIONS
    return (Convention(text_column, _LIST_FORMS.get(text_column.rsplit(".", 1)[-1], "text"), named=True),)


def present(read: Sequence[Convention], has: Callable[[str], bool]) -> dict[int, Convention]:
    """Return the conventions that records with only some columns can follow, by index in `read`, or else the first.

    SQL for all of them takes longer to plan than a thousand records to convert.
    """
    heads = {index: item for index, item in enumerate(read) if has(item.head)} or {0: read[0]}
    return {
        index: replace(item, joined=tuple(filter(has, item.joined)), left_out=tuple(filter(has, item.left_out)))
        for index, item in heads.items()
    }


def misnamed(columns: Collection[str], read: Sequence[Convention], domain_column: str) -> str | None:
    """Describe a column whose name differs from one that would be read only in case or surrounding spaces.

    It would silently be left out of the prompt, or leave it without a domain.
    """
    chosen = [item for item in read if item.head in columns]
    wanted = [item.head for item in read if not item.named]
    for item in chosen:
        wanted += [*item.joined, *{MESSAGES: _FOR_TEMPLATE, INPUT_IDS: (_MASK,)}.get(item.form, ())]
    for column in columns:
        plain = column.strip("\ufeff \t").lower()
        if column != plain and plain not in columns and (plain == domain_column == "domain" or plain in wanted):
            option = "--domain-column" if plain == domain_column else "--text-column"
            return f"has a column {column!r}, but no {plain!r}. Rename it, or choose a column with {option}"
    return None


def nested_path(column: str) -> list[str] | None:
    """Return the keys of a column named `a.b`; None if the name can only be that of a top-level column.

    DuckDB's JSON paths cannot quote these characters.
    """
    keys = column.split(".")
    return keys if len(keys) > 1 and all(keys) and not set(column) & set('"*\\') else None


@dataclass(frozen=True)
class RecordColumns:
    """SQL expressions for the columns of one kind of record."""

    value: Callable[[str], str]
    """JSON of a column: 'null' where it is null, NULL where it is absent."""
    text: Callable[[str], str]
    """A column's text."""
    metadata: Callable[[Convention], str]
    """JSON of all columns except those that a convention uses."""
    keys: str
    """Names of a record's columns, for messages."""
    for_tokenizer: Collection[str]
    """The columns of TOKENIZER_COLUMNS that any record has."""


def prompts_sql(records: str, read: Mapping[int, Convention], columns: RecordColumns) -> str:
    """Return the SQL that converts `records` to canonical columns, by conventions that each have an index.

    `records` also has `record_kind`, `labelled` (whether it has a domain), `domain` and `source`.
    """
    value = columns.value
    earlier = {index: [item for other, item in read.items() if other < index] for index in read}
    heads = {index: _head(item, earlier[index], value) for index, item in read.items()}
    filled = {
        index: f"(json_type(h{index}) <> 'NULL'" + ("" if item.form == "text" else _LONGER.format(f"h{index}")) + ")"
        for index, item in read.items()
    }
    choice = [f"when {test} then {index}" for index, test in filled.items()]
    choice += [f"when h{index} is not null then {index}" for index in read]
    names = ", ".join(f"case when {test} then {index} end" for index, test in filled.items())

    def by_choice(expression: Callable[[Convention], str]) -> str:
        cases = " ".join(f"when {index} then {expression(item)}" for index, item in read.items())
        return f"case choice {cases} end"

    head = f"case choice {' '.join(f'when {index} then h{index}' for index in read)} end"
    return f"""
        with records as ({records}),
        heads as (select *, {", ".join(f"{sql} as h{index}" for index, sql in heads.items())} from records),
        chosen as (select *, case {" ".join(choice)} end as choice, concat_ws(' ', {names}) as filled from heads),
        headed as (select *, {head} as head from chosen),
        formed as (select *, {_FORM.format(wants=by_choice(_wants))} as form from headed),
        checked as (select *, case when record_kind <> 'OBJECT' then 'object'
                    when choice is null then 'none'
                    when contains(filled, ' ') then 'several'
                    when form is null then 'head'
                    when form = 'text' and {by_choice(lambda item: _is_written_chat(item, columns.text))} then '{_CHAT}'
                    else coalesce({by_choice(lambda item: _joined_problem(item, value))},
                                  {by_choice(lambda item: _left_out(item, value))}) end as problem from formed)
        select problem, json_type(head) as head_kind, choice, filled, labelled, form,
               case when problem is not null then {columns.keys} end as keys,
               case form when 'text' then {by_choice(lambda item: _text(item, columns.text))}
                         when 'messages' then {by_choice(lambda item: _messages(item, value, columns.for_tokenizer))}
                         when 'input_ids' then {_input_ids(value, columns.for_tokenizer)} end as text,
               domain, source,
               {by_choice(columns.metadata)} as metadata
        from checked
    """


def problem_of(row: dict[str, Any], read: Sequence[Convention]) -> str:
    """Describe the problem of a record in which `prompts_sql` found no prompt."""
    found = [read[int(index)].head for index in (row["filled"] or "").split()]
    keys = ", ".join(map(repr, row["keys"] or [])) or "no keys"
    if row["problem"] == "object":
        return 'is not a JSON object. Give each prompt as one, such as {"text": …}'
    if row["problem"] == "none":
        for item in read:
            if item.head in (row["keys"] or []):
                return f"has {item.head!r} that are not a list of {item.form}"
        others = (
            "" if read[0].named else ", nor messages or input_ids, nor another column that `moewh ingest --help` names"
        )
        message = {"role", "content"} <= {*(row["keys"] or [])}
        hint = "A chat is one record, {'messages': […]}" if message else "Name the column with --text-column"
        return f"has no {read[0].head!r}{others}; it has {keys}. {hint}"
    if row["problem"] == "several":
        return f"has both {found[0]!r} and {found[1]!r}. Choose one with --text-column"
    convention = read[row["choice"]]
    if row["problem"] == "head":
        kind = str(row["head_kind"]).lower()
        wanted = "is not a string" if convention.form == "text" else f"are not a list of {convention.form}"
        return f"has {'a ' if convention.form == 'text' else ''}{convention.head!r} that {wanted} ({kind})"
    return _partial_prompt(row["problem"], convention)


def _partial_prompt(problem: str, convention: Convention) -> str:
    """Describe a record that would become a prompt only in part, or a chat that would become one as plain text."""
    if problem == _CHAT:
        return (
            f"has chat messages in {convention.head!r}, written as text. Call the column messages and write them as "
            f"JSON, or record the text as it is with --text-column {convention.head}"
        )
    if problem.startswith(_LEFT_OUT):
        name = problem.removeprefix(_LEFT_OUT)
        hint = _HINTS.get(name, f"Put it into {convention.head!r}")
        others = "remove the column" if convention.joined else f"leave it out with --text-column {convention.head}"
        return f"has {name!r}, which would be left out of the prompt. {hint}, or {others}"
    return f"has a {problem!r} that does not go on after its {convention.head!r}. Name one with --text-column"


_CHAT = "chat"
_LEFT_OUT = "left out: "
_HINTS = {
    _KWARGS: "Give it with --chat-argument",
    "functions": "Call it tools",
    "position_ids": "Give each packed sequence a record of its own",
}
_WRITTEN_CHAT = r"""\s*\[\s*\{\s*[''"](role|from)[''"]\s*:[\s\S]*"""
_LONGER = " and json_array_length({0}) > 0"
_FORM = """
    case when json_type(head) in ('VARCHAR', 'NULL') then 'text'
         when json_type(head) <> 'ARRAY' then null
         when {wants} = 'input_ids' then 'input_ids'
         when {wants} = 'messages' and json_array_length(head) = 0 then 'messages'
         when json_type(head, '/0') = 'OBJECT' then 'messages'
         when {wants} = 'text' and json_type(head, '/0') in ('UBIGINT', 'BIGINT') then 'input_ids' end
"""


def _wants(convention: Convention) -> str:
    return f"'{convention.form}'"


def _head(convention: Convention, before: Sequence[Convention], value: Callable[[str], str]) -> str:
    """Return SQL for the JSON of a convention's own column where it applies, else NULL."""
    own = value(convention.head)
    if convention.form == "text":
        earlier = [value(other.head) for other in before if other.form == "text"]
        return f"case when {' and '.join([f'{other} is null' for other in earlier])} then {own} end" if earlier else own
    listed = _listed(own)
    return f"coalesce({listed}, {own})" if convention.named else listed


def json_text(value: str) -> str:
    """Return SQL for a JSON value as text; in DuckDB 1.5, the operator `->>` binds less tightly than `and`."""
    return f"json_extract_string({value}, '$')"


def _listed(value: str) -> str:
    """Return SQL for a list given as JSON or as JSON text; JSON null stays, and any other value becomes NULL."""
    parsed = f"try_cast({json_text(value)} as json)"
    return (
        f"case when json_type({value}) in ('ARRAY', 'NULL') then {value} "
        f"when json_type({value}) = 'VARCHAR' and json_type({parsed}) = 'ARRAY' then json_extract({parsed}, '$') end"
    )


def _joined_problem(convention: Convention, value: Callable[[str], str]) -> str:
    """Return SQL for the name of the first joined column that does not have the head's form."""
    cases = [
        f"when json_type({value(name)}) not in ('NULL', case form when 'text' then 'VARCHAR' "
        f"when '{MESSAGES}' then 'ARRAY' else '' end) then '{name}'"
        for name in convention.joined
    ]
    return f"case {' '.join(cases)} end" if cases else "null"


def _left_out(convention: Convention, value: Callable[[str], str]) -> str:
    """Return SQL for the first column that belongs to the prompt and is not read; positions from 0 are none."""
    cases = [
        f"when json_type({value(name)}) <> 'NULL' and {value(name)}::varchar not in ('\"\"', '[]', '{{}}', "
        f"to_json(range(json_array_length({value(name)})::bigint))::varchar) then '{_LEFT_OUT}{name}'"
        for name in ([] if convention.named else convention.left_out)
    ]
    return f"case {' '.join(cases)} end" if cases else "null::varchar"


def _is_written_chat(convention: Convention, text: Callable[[str], str]) -> str:
    """Return SQL for whether a text is a list of messages as JSON or Python prints it, as CSV files have them."""
    return "false" if convention.named else f"regexp_full_match({text(convention.head)}, '{_WRITTEN_CHAT}')"


def _text(convention: Convention, text: Callable[[str], str]) -> str:
    parts = [text(name) for name in convention.columns]
    if len(parts) == 1:
        return f"coalesce({parts[0]}, '')"
    filled = [f"nullif({part}, '')" for part in parts]
    return f"concat_ws('{convention.joint}', {', '.join(filled)})"


def _messages(convention: Convention, value: Callable[[str], str], there: Collection[str]) -> str:
    """Return SQL for the JSON of a list of messages, or of an object that also holds tools or documents."""
    lists = [
        "head::json[]",
        *(f"coalesce(try_cast(nullif({value(name)}, 'null') as json[]), [])" for name in convention.joined),
    ]
    messages = f"to_json({' || '.join(lists)})::varchar" if len(lists) > 1 else "head::varchar"
    names = [name for name in _FOR_TEMPLATE if name in there]
    if not names:
        return messages
    members = " || ".join(
        f"""case when json_type({value(name)}) <> 'NULL' then ',"{name}":' || {value(name)}::varchar else '' end"""
        for name in names
    )
    any_present = " or ".join(f"json_type({value(name)}) <> 'NULL'" for name in names)
    return f"""case when {any_present} then '{{"messages":' || {messages} || {members} || '}}' else {messages} end"""


def _input_ids(value: Callable[[str], str], there: Collection[str]) -> str:
    """Return SQL for the JSON of a list of ids, or of an object with a mask too; an all-ones mask is left out."""
    if _MASK not in there:
        return "head::varchar"
    mask = f"coalesce({_listed(value(_MASK))}, {value(_MASK)})"
    masks = (
        f"json_type({mask}) <> 'NULL' and not (regexp_full_match({mask}::varchar, '\\[(1(,1)*)?\\]') "
        f"and json_array_length({mask}) = json_array_length(head))"
    )
    return (
        f"""case when {masks} then '{{"input_ids":' || head::varchar || ',"{_MASK}":' || {mask}::varchar || '}}' """
        "else head::varchar end"
    )
