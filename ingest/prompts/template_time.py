"""The time that a chat template sees, fixed when a run first starts, for all its processes and after any kill.

It is recorded with the run. Until the run exists, a small file in `.staging/` keeps it for the command that resumes
after a kill, and for the other processes of the command.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime

from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from moewh.ingest.prompts.chats import CLOCK
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.commit import locked
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.tables import run_row

KEY = "template_time"
"""The time's key in a run's identity."""
_COLUMNS = ["identity", "options"]
"""What is read of a run that has begun."""
_OF_DAYS = set("aAbBCdDeFgGhjmuUVwWxyY%")
"""Directives of strftime that give the same result all day."""


def fix_time(layout: Layout, run_id: str, sha256: str, needed: Callable[[], bool], complete: bool) -> datetime | None:
    """Return the time that a run's template sees; None if it does not ask for the time.

    `sha256` is the run's identity without the time, `needed` finds out whether the template asks for it, and `complete`
    means that no segment is missing. Raises MoewhError for an unfinished run whose time was not recorded.
    """
    if (recorded := run_row(layout.run(run_id), _COLUMNS)) is not None:
        return _of_recorded(layout, recorded, run_id, sha256, needed, complete=complete)
    folder = layout.template_times(run_id)
    file = folder / f"{sha256[:16]}.json"
    if not file.is_file() and not needed():
        return None
    with layout.writing():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if (recorded := run_row(layout.run(run_id), _COLUMNS)) is not None:
                return _of_recorded(layout, recorded, run_id, sha256, needed, complete=complete)
            if not file.is_file():
                with layout.staged(KEY) as staged:
                    (staged / file.name).write_text(json.dumps(datetime.now().isoformat(timespec="seconds")))
                    (staged / file.name).replace(file)
            return datetime.fromisoformat(json.loads(file.read_text()))


def _of_recorded(
    layout: Layout, row: dict[str, str], run_id: str, sha256: str, needed: Callable[[], bool], *, complete: bool
) -> datetime | None:
    options = json.loads(row["options"])
    if KEY in options:
        return datetime.fromisoformat(options[KEY])
    if row["identity"] == sha256 and not complete and needed():
        raise MoewhError(
            f"run {run_id!r} was begun without recording the time that its chat template writes, so it cannot be "
            f"completed. Choose another --run-id, or delete it with `moewh runs --delete {run_id} {layout.option}`."
        )
    return None


def forget_time(layout: Layout, run_id: str) -> None:
    """Forget the time of a run that never began or was deleted, so that it gets a new one when it starts."""
    shutil.rmtree(layout.template_times(run_id), ignore_errors=True)
    layout.remove_empty()


def as_seen(now: datetime, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the time as precisely as the templates write it: to the day if they write only dates, else to the second.

    Checkpoints ingested on the same day then share their tokens.
    """
    templates = tokenizer.chat_template or {}
    texts = [templates] if isinstance(templates, str) else list(templates.values())
    return now.date().isoformat() if all(map(_writes_dates_alone, texts)) else now.isoformat()


def _writes_dates_alone(template: str) -> bool:
    tree = _compile_jinja_template(template).environment.parse(template)
    asked = [node for node in tree.find_all(nodes.Name) if node.name == CLOCK]
    tested = [node for node in tree.find_all(nodes.Test) if node.name in ("defined", "undefined")]
    known = [node.node for node in tested]
    for call in tree.find_all(nodes.Call):
        if len(call.args) == 1 and isinstance(call.args[0], nodes.Const) and _is_date(call.args[0].value):
            known.append(call.node)
    return all(any(name is node for node in known) for name in asked)


def _is_date(form: object) -> bool:
    return isinstance(form, str) and set(re.findall(r"%[-_0^#]*(.)", form)) <= _OF_DAYS
