"""vLLM: answers of its server with `routed_experts`, or offline outputs saved as `.npz`.

Server answers (`.json`, or one per line in `.jsonl`) hold the routing of each choice as a base64 `.npy` of shape
[R, L, K]; ask for `return_token_ids` to have the tokens too. Before 0.26 the prompt's part was a field of its own. The
last sampled token has no row, and `routed_experts_prompt_start` leaves out the first ones. An `.npz` holds, for each
output N, `N/routed_experts`, and `N/prompt_token_ids` and `N/token_ids` where they are known. Logical ids, no weights;
the order within a row means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from moewh.ingest.traces.arrays import as_array, decode_npy, open_npz
from moewh.ingest.traces.check import as_ids
from moewh.ingest.traces.documents import answer_of, read_documents
from moewh.ingest.traces.trace import Array, Sequence, TraceFile, TraceModel, answer_id, each, served_by, start_of

_PARTS = ("routed_experts", "prompt_token_ids", "token_ids")
"""The arrays of each output in an `.npz`."""


def _read(file: TraceFile, _: TraceModel) -> Iterator[Sequence]:
    if file.path.suffix.lower() == ".npz":
        yield from _outputs(file)
        return
    for where, document in read_documents(file, lists=("choices",)):
        answer = answer_of(document, where, file)
        choices = answer.get("choices")
        if not isinstance(choices, list | Iterator):
            raise file.error(f"{where} has no list of choices.")
        number = -1
        for number, choice in enumerate(choices):
            if not isinstance(choice, dict):
                raise file.error(f"{where}, choice {number}: is not a JSON object.")
            one = _choice(f"{where}, choice {number}", answer, choice, file)
            yield replace(one, served=served_by(answer), answer=answer_id(answer, number))
        if number < 0:
            raise file.error(f"{where} has no choice. Leave it out.")


def _choice(where: str, answer: dict[str, Any], choice: dict[str, Any], file: TraceFile) -> Sequence:
    rows_RLK = _routing(choice.get("routed_experts"), where, file)
    before = _either("prompt_routed_experts", choice, answer)
    if before is not None:
        rows_RLK = _joined(_routing(before, where, file), rows_RLK, where, file)
    prompt_ids = _either("prompt_token_ids", choice, answer)
    given = {"prompt_token_ids": prompt_ids, "token_ids": choice.get("token_ids")}
    _require_both(given, where, file)
    ids = None if prompt_ids is None else (as_ids(prompt_ids, where), as_ids(choice["token_ids"], where))
    about = {"finish_reason": choice.get("finish_reason"), "id": answer.get("id")}
    metadata = {key: value for key, value in about.items() if value is not None}
    return _sequence(where, rows_RLK, ids, file, metadata)


def _either(name: str, choice: dict[str, Any], answer: dict[str, Any]) -> Any:
    """Return a field of a choice, else of its answer; null, which the server writes for what it has not, is none."""
    found = choice.get(name)
    return answer.get(name) if found is None else found


def _require_both(given: dict[str, Any], where: str, file: TraceFile) -> None:
    """Raise the file's error if only one part of the token ids is known: the other would be left out silently."""
    known = [name for name, ids in given.items() if ids is not None]
    if len(known) == 1:
        (missing,) = given.keys() - known
        raise file.error(f"{where} has {known[0]} and no {missing}. Ask for return_token_ids, and save both.")


def _routing(value: Any, where: str, file: TraceFile) -> Array:
    if value is None:
        raise file.error(f"{where} has no routed_experts. Start vLLM with --enable-return-routed-experts.")
    return (
        decode_npy(value, where, file.most_values)
        if isinstance(value, str)
        else as_array(value, where, file.most_values, 3)
    )


def _joined(before: Array, after: Array, where: str, file: TraceFile) -> Array:
    if before.shape[1:] != after.shape[1:]:
        raise file.error(f"{where}: the prompt's routing has shape {before.shape}, that of its answer {after.shape}.")
    return np.concatenate([before, after])


def _outputs(file: TraceFile) -> Iterator[Sequence]:
    with open_npz(file) as arrays:
        numbers = {name.partition("/")[0] for name in arrays if name.endswith("/routed_experts")}
        if not numbers:
            raise file.error("has no array called N/routed_experts.")
        for name in arrays:
            number, _, part = name.partition("/")
            if number not in numbers or part not in _PARTS:
                raise file.error(f"has an array {name!r}. Known: {', '.join(f'N/{part}' for part in _PARTS)}.")
        for number in sorted(numbers, key=lambda name: (len(name), name)):
            names = (f"{number}/prompt_token_ids", f"{number}/token_ids")
            where = f"{file.name}, output {number}"
            _require_both({name: True if name in arrays else None for name in names}, where, file)
            known = names[0] in arrays
            ids = (as_ids(arrays[names[0]], where), as_ids(arrays[names[1]], where)) if known else None
            rows_RLK = as_array(arrays[f"{number}/routed_experts"], where, file.most_values, 3)
            yield _sequence(where, rows_RLK, ids, file, None)


def _sequence(
    where: str, rows_RLK: Array, ids: tuple[Array, Array] | None, file: TraceFile, metadata: dict[str, Any] | None
) -> Sequence:
    """Place the rows of one output: they end before its last token."""
    if ids is None:
        return Sequence(where, rows_RLK, source=file.path.name, metadata=metadata)
    prompt, generated = ids
    tokens = len(prompt) + len(generated)
    # a list of rows for each part had one for the last token, too
    start = 0 if len(rows_RLK) == tokens else start_of(len(rows_RLK), tokens, where, len(prompt))
    return Sequence(
        where,
        rows_RLK,
        first=start,
        vocab_ids_T=np.concatenate([prompt, generated]),
        generated_from=len(prompt),
        source=file.path.name,
        metadata=metadata,
    )


FORMAT = each(_read)
