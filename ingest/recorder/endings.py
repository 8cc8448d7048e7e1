"""Where sequences end in `generate`: the decisions of its stopping criteria in, the padding that follows out.

`generate` feeds padding to a sequence that ended while others of its batch continue. Any criterion may end one (an end
token, a stop string, the user's own), so ids alone do not show it. Shapes: B sequences, S positions of a pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteriaList

from moewh.ingest.recorder.one_thread import OneThread


class Endings:
    """The sequences of one call of `generate`, with the position at which each ended."""

    def __init__(self) -> None:
        self._end_B: torch.Tensor | None = None
        """Column of the last token, or `_never`."""
        self._columns = 0
        """Tokens of each sequence so far."""

    def note(self, columns: int, done_B: torch.Tensor) -> None:
        """Take the decisions of a step, in which every sequence has so many tokens."""
        never_B = torch.full_like(done_B, torch.iinfo(torch.int64).max, dtype=torch.int64)
        before_B = never_B if self._end_B is None or len(self._end_B) != len(done_B) else self._end_B
        self._end_B = torch.minimum(before_B, torch.where(done_B, columns - 1, never_B))
        self._columns = columns

    def after_end(self, ids_BS: torch.Tensor, *, continues: bool) -> torch.Tensor | None:
        """Return how far each token that a pass is given lies behind its sequence's end: 0 for the end token itself.

        The pass continues a cache, or is given whole sequences; None for any other, as one that a logits processor
        makes, and before the first decision. Does not wait for the device.
        """
        B, S = ids_BS.shape
        if self._end_B is None or len(self._end_B) != B or not (continues or self._columns == S):
            return None
        columns_S = torch.arange(self._columns - S, self._columns, device=self._end_B.device)
        return columns_S - self._end_B[:, None]


class _Noted(StoppingCriteriaList):
    """Stopping criteria whose decisions are noted."""

    def __init__(self, criteria: StoppingCriteriaList, endings: Endings) -> None:
        super().__init__(criteria)
        self._endings = endings

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done_B: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        self._endings.note(input_ids.shape[1], done_B)
        return done_B


class GenerateObserver:
    """Observes the calls of a model's `generate` between `attach` and `detach`."""

    def __init__(self, model: Any, thread: OneThread) -> None:
        self._model, self._thread = model, thread
        self._replaced: dict[str, Any] = {}
        """The model's own attributes, where these are not methods of its class."""
        self.endings: Endings | None = None
        """Those of the call in progress; None outside of one."""

    def attach(self) -> None:
        """Replace `generate` on the model; a model that cannot generate is left as it is."""
        if not hasattr(self._model, "generate"):
            return
        generate, prepare = self._model.generate, self._model._get_stopping_criteria

        @functools.wraps(generate)
        def noted_generate(*args: Any, **kwargs: Any) -> Any:
            with self._thread.call(), self._call():
                return generate(*args, **kwargs)

        @functools.wraps(prepare)
        def noted_criteria(*args: Any, **kwargs: Any) -> StoppingCriteriaList:
            criteria: StoppingCriteriaList = prepare(*args, **kwargs)
            pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)  # transformers' own condition
            return _Noted(criteria, self.endings) if pads and self.endings is not None else criteria

        for name, noted in (("generate", noted_generate), ("_get_stopping_criteria", noted_criteria)):
            if name in vars(self._model):
                self._replaced[name] = vars(self._model)[name]
            setattr(self._model, name, noted)

    def detach(self) -> None:
        """Give the model its own methods back."""
        if hasattr(self._model, "generate"):
            for name in ("generate", "_get_stopping_criteria"):
                vars(self._model).pop(name, None)
            vars(self._model).update(self._replaced)

    @contextmanager
    def _call(self) -> Iterator[None]:
        outer, self.endings = self.endings, Endings()
        try:
            yield
        finally:
            self.endings = outer
