"""`moewh.TrainerCallback` in a real Trainer: runs of one series, and training that is not affected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import moewh
from moewh.warehouse.errors import MoewhError, UsageError
from tests.support.models import byte_tokenizer, tiny_model

PROMPTS = [
    {"text": "the cat sat on the mat", "domain": "prose"},
    "3 + 4 = 7",
    {"text": "so it goes", "domain": "prose"},
]
STEPS = 5


def train(
    folder: Path, *callbacks: Any, seed: int = 1, **arguments: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a tiny OLMoE with dropout; return the loss of each step and the final weights."""
    model = tiny_model("olmoe", attention_dropout=0.3, num_hidden_layers=2)
    rows = [byte_tokenizer()(f"{number} and {number * number}")["input_ids"][:6] for number in range(100, 140)]
    data = [{"input_ids": ids, "labels": ids} for ids in rows]
    settings = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        seed=seed,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, settings, train_dataset=data, processing_class=byte_tokenizer(), callbacks=list(callbacks))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_training_goes_on_bitwise_and_the_runs_are_a_series(tmp_path: Path) -> None:
    plain = train(tmp_path)
    assert len(set(plain[0])) == STEPS
    assert train(tmp_path, seed=2)[0] != plain[0], "dropout and the order of rows depend on the random state"
    callback = moewh.TrainerCallback(PROMPTS, every=2, warehouse=tmp_path / "wh", run_id="trained")
    recorded = train(tmp_path, callback)
    assert recorded[0] == plain[0]
    assert all(torch.equal(tensor, plain[1][name]) for name, tensor in recorded[1].items())

    warehouse = moewh.open(tmp_path / "wh")
    runs = warehouse.sql("select run_id, series, train_step, status, prompts from runs order by train_step").fetchall()
    assert runs == [(f"trained-step{step}", "trained", step, "complete", 3) for step in (0, 2, 4, 5)]
    found = warehouse.query("router_saturation").fetchall()
    assert {row[0] for row in found} == {run for run, *_ in runs}
    weights = warehouse.sql("select count(distinct options::json ->> 'weights_sha256') from runs").fetchall()
    assert weights == [(4,)]

    # The rows of the last step are those of the trained model, ingested by itself.
    model = tiny_model("olmoe", attention_dropout=0.3, num_hidden_layers=2)
    model.load_state_dict(recorded[1])
    moewh.ingest(model, PROMPTS, tmp_path / "wh", "after", tokenizer=byte_tokenizer())
    rows = "select token_id, layer, rank, expert, weight from routing where run_id = $run order by all"
    assert warehouse.sql(rows, run="after").fetchall() == warehouse.sql(rows, run="trained-step5").fetchall() != []

    again = moewh.TrainerCallback(PROMPTS, every=2, warehouse=tmp_path / "wh", run_id="trained")
    with pytest.raises(
        MoewhError, match=r"run trained-step2 is in .* already, and this training is at step 0\. Choose"
    ):
        train(tmp_path, again)


def test_what_fails_later_is_warned_of_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(tmp_path, bf16=True)
    callback = moewh.TrainerCallback(PROMPTS, every=3, warehouse=tmp_path / "wh")

    def full(*_: Any, **__: Any) -> None:
        raise MoewhError("the disk is full")

    monkeypatch.setattr("moewh.ingest.run.write_segment", full)
    with pytest.raises(MoewhError, match="the disk is full"):
        train(tmp_path, callback, bf16=True)
    monkeypatch.undo()

    class Full(type(callback)):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **given: Any) -> None:
            super().on_train_begin(*arguments, **given)
            monkeypatch.setattr("moewh.ingest.run.write_segment", full)

    with pytest.warns(UserWarning, match="moewh did not record step 3: the disk is full"):
        losses, _ = train(tmp_path, Full(PROMPTS, every=3, warehouse=tmp_path / "wh"), bf16=True)
    assert losses == plain[0]
    assert moewh.open(tmp_path / "wh").sql("select run_id, status from runs order by all").fetchall()[0] == (
        "out-step0",
        "complete",
    )


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for every in (0, 2.5, "2", True):
        with pytest.raises(UsageError, match=f"every is {every!r}. Give a whole number"):
            moewh.TrainerCallback(PROMPTS, every=every)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="dtype is for a model loaded from files"):
        moewh.TrainerCallback(PROMPTS, every=1, dtype="float32")
    with pytest.raises(MoewhError, match="records: record 1 has no 'text'"):
        train(tmp_path, moewh.TrainerCallback([{"txt": "a"}], every=1, warehouse=tmp_path / "wh"))
