"""Chat templates of the kinds that models ship: ChatML, with tools, with thinking, and dated."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers.utils import chat_template_utils

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% if documents %}# Documents\n{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
    "{% if effort is defined %} effort {{ effort }}{% endif %}"
)
DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TIMED = DATED.replace("%d %b %Y", "%Y-%m-%d %H:%M:%S")
LISTS_ONLY = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
STRINGS_ONLY = "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"

KINDS = {"chatml": CHATML, "tools": TOOLS, "thinking": THINKING, "dated": DATED, "timed": TIMED}


def set_clocks(monkeypatch: pytest.MonkeyPatch, now: datetime, *modules: Any) -> None:
    """Let transformers' templates, and the modules named, see this time for now."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            del tz
            return now

    for module in (chat_template_utils, *modules):
        monkeypatch.setattr(module, "datetime", Clock)
