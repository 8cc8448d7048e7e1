"""A real evaluation harness (lm-eval, if installed), recorded with two lines of a user's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moewh
from tests.support.models import byte_tokenizer, tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

QUESTIONS: list[dict[str, Any]] = [
    {"question": "the cat sat on the", "choices": ["mat", "dogs"], "answer": 0},
    {"question": "3 + 4 =", "choices": ["seven", "8"], "answer": 0},
    {"question": "so it", "choices": ["go", "goes"], "answer": 1},
]
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
""",
    "words": """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["zzzz"], max_gen_toks: 4, do_sample: false}
""",
}


def evaluated(folder: Path, task: str, warehouse: Path, *, record: bool) -> dict[str, Any]:
    """The results of one local task; its passes recorded, or not."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny_model("olmoe", max_position_embeddings=512), byte_tokenizer()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=128)

    def evaluate() -> Any:
        return lm_eval.simple_evaluate(lm, tasks=[task], task_manager=TaskManager(include_path=str(folder)))

    if record:
        with moewh.record(model, tokenizer, warehouse=warehouse, run_id=task, pad_token_id=0):
            found = evaluate()
    else:
        found = evaluate()
    return dict(found["results"][task])


@pytest.mark.parametrize("task", TASKS)
def test_a_harness_is_recorded_with_two_lines(task: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / f"{task}.yaml").write_text(TASKS[task].replace("DATA", str(data)))
    plain = evaluated(tmp_path, task, tmp_path / "wh", record=False)
    assert evaluated(tmp_path, task, tmp_path / "wh", record=True) == plain

    opened = moewh.open(tmp_path / "wh")
    assert opened.sql("select status from runs").fetchall() == [("complete",)]
    texts = {text.removeprefix("<s>") for (text,) in opened.sql("select text from prompts").fetchall()}
    if task == "choices":  # the last token of a choice is never fed
        assert texts == {f"{row['question']} {choice}"[:-1] for row in QUESTIONS for choice in row["choices"]}
    else:
        assert texts == {row["question"] for row in QUESTIONS}
        said = "select prompt_id, count(*) from tokens where kind = 'generated' group by all"
        assert {count for _, count in opened.sql(said).fetchall()} == {3}
    assert opened.verify() == []
