"""`moewh.record`: every pass that a user's own code makes, bit for bit, and under the right sequence."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.optim.swa_utils import AveragedModel
from transformers import TextIteratorStreamer

import moewh
from moewh.ingest.record import Identity
from moewh.ingest.recorder import open_run
from moewh.ingest.recorder import record as recorder_module
from moewh.ingest.workers import WRITERS
from moewh.ingest.write.segment import Committed, write_segment
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from tests.support.families import FAMILIES, build
from tests.support.models import byte_tokenizer, tiny_model
from tests.support.recorded import batch, expected, ids_of, model_of, record, recorded, watched

TEXTS = ("ab", "the cat sat on the mat", "x", "3 + 4 = 7; aaaa")
NAMES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")


@pytest.mark.parametrize("name", NAMES)
def test_recording_equals_ingest_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Plain calls, a right-padded batch, and generation with a cache."""
    model = model_of(name)
    given = {"warehouse": tmp_path, "tokenizer": byte_tokenizer()}
    moewh.ingest(model, TEXTS, run_id="alone", batch_tokens=1, **given)
    with record(model, tmp_path, "calls"), torch.no_grad():
        for text in TEXTS:
            model(**batch((text,)), use_cache=False)
    assert recorded(tmp_path, "calls") == recorded(tmp_path, "alone") != {}

    moewh.ingest(model, TEXTS, run_id="batched", **given)
    longest_first = tuple(sorted(TEXTS, key=len, reverse=True))
    with record(model, tmp_path, "padded"), torch.inference_mode():
        model(**batch(longest_first))
    assert recorded(tmp_path, "padded") == recorded(tmp_path, "batched")

    same_length = ("abc", "xyz", "...")
    moewh.ingest(model, same_length, run_id="said", generate=6, **given)
    with record(model, tmp_path, "generated"):
        model.generate(**batch(same_length), max_new_tokens=6, do_sample=False)
    assert recorded(tmp_path, "generated") == recorded(tmp_path, "said")
    assert moewh.open(tmp_path).verify() == []
    kinds = "select kind, count(*) from tokens where run_id = $run and kind <> 'generated' group by all order by all"
    assert moewh.open(tmp_path).sql(kinds, run="generated").fetchall() == [("prompt", 9), ("special", 3)]


def test_a_left_padded_batch_is_that_of_the_pass(tmp_path: Path) -> None:
    model = model_of("olmoe")
    inputs = batch(TEXTS, "left")
    with record(model, tmp_path, "left"), watched(model) as passes, torch.no_grad():
        model(**inputs)
    found = recorded(tmp_path, "left")
    assert [*found] == [tuple(ids_of(text)) for text in TEXTS]
    for row, rows in enumerate(found.values()):
        assert rows == expected(passes[0], inputs["attention_mask"], row)
    assert moewh.open(tmp_path).sql("select text, status from prompts order by prompt_id").fetchall() == [
        (f"<s>{text}", "ok") for text in TEXTS
    ]


def test_left_padded_generation_keeps_each_token_with_its_sequence(tmp_path: Path) -> None:
    model = model_of("olmoe")
    inputs = batch(TEXTS, "left")
    with record(model, tmp_path, "left"), watched(model) as passes:
        said = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert len(passes) == 5
    for row, (ids, rows) in enumerate(recorded(tmp_path, "left").items()):
        wanted = expected(passes[0], inputs["attention_mask"], row)
        for step, seen in enumerate(passes[1:]):
            one = expected(seen, torch.ones(len(TEXTS), 1), row)
            wanted |= {(len(ids) + step, layer): pairs for (_, layer), pairs in one.items()}
        assert rows == wanted
    tokens = "select vocab_id from tokens where prompt_id = $prompt and kind = 'generated' order by token_id"
    for row in range(len(TEXTS)):
        stored = moewh.open(tmp_path).sql(tokens, prompt=row).fetchall()
        assert [token for (token,) in stored] == said[row, inputs["input_ids"].shape[1] : -1].tolist()


def test_a_sequence_ends_with_its_end_token(tmp_path: Path) -> None:
    """The others in its batch continue; what it is fed meanwhile is not a token."""
    model = build(next(family for family in FAMILIES if family.name == "olmoe"))
    texts = ("abc", "xyz", "...")
    said = model.generate(**batch(texts), max_new_tokens=6, do_sample=False)[:, 4:]
    ends = [row for row in range(3) if said[row, 2] not in said[row, :2] and said[row, 2] not in said[1 - row // 2]]
    model.generation_config.eos_token_id = int(said[ends[0], 2])
    moewh.ingest(model, texts, tmp_path, "said", generate=6, tokenizer=byte_tokenizer())
    with record(model, tmp_path, "generated"):
        model.generate(**batch(texts), max_new_tokens=6, do_sample=False)
    assert recorded(tmp_path, "generated") == recorded(tmp_path, "said")
    lengths = {max(position for position, _ in rows) for rows in recorded(tmp_path, "said").values()}
    assert len(lengths) > 1


def test_a_loop_by_hand_equals_generate(tmp_path: Path) -> None:
    model = model_of("olmoe")
    inputs = batch(("abc", "xyz"))
    with record(model, tmp_path, "generated"):
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with record(model, tmp_path, "by-hand"), torch.no_grad():
        cache, ids, mask = None, inputs["input_ids"], inputs["attention_mask"]
        for _ in range(4 + 1):
            output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
    assert recorded(tmp_path, "by-hand") == recorded(tmp_path, "generated")


def test_two_caches_that_take_turns_stay_apart(tmp_path: Path) -> None:
    model = model_of("olmoe")
    caches: list[Any] = [None, None]
    with record(model, tmp_path, "turns"), watched(model) as passes, torch.no_grad():
        for step, which in ((slice(0, 3), 0), (slice(0, 2), 1), (slice(3, 7), 0), (slice(2, 9), 1)):
            ids = torch.tensor([ids_of(TEXTS[1 + 2 * which])[step]])
            caches[which] = model(input_ids=ids, past_key_values=caches[which], use_cache=True).past_key_values
    found = list(recorded(tmp_path, "turns").values())
    for which, (first, then) in enumerate(((0, 2), (1, 3))):
        start = passes[first][0][0].shape[0]
        wanted = expected(passes[first], torch.ones(1, start), 0)
        later = expected(passes[then], torch.ones(1, passes[then][0][0].shape[0]), 0)
        assert found[which] == wanted | {(start + place, layer): pairs for (place, layer), pairs in later.items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_recorded_once(reentrant: bool, tmp_path: Path) -> None:
    model = tiny_model("olmoe").train()
    inputs = batch(TEXTS)
    with record(model, tmp_path, "plain"):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with record(model, tmp_path, "checkpointed"), watched(model) as passes:
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert len(passes) > 1, "it was computed again"
    assert recorded(tmp_path, "checkpointed") == recorded(tmp_path, "plain") != {}
    assert model.training


def test_a_lora_model_and_a_hooked_module(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = tiny_model("olmoe")
    adapted: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "gate"], init_lora_weights=False)
    )
    inputs = batch(TEXTS)
    with record(adapted, tmp_path, "lora"), watched(model) as passes, torch.no_grad():
        adapted(**inputs)
        adapted.generate(**batch(("...",)), max_new_tokens=2, do_sample=False)
    found = recorded(tmp_path, "lora")
    assert len(found) == len(TEXTS) + 1
    for row, rows in enumerate([*found.values()][: len(TEXTS)]):
        assert rows == expected(passes[0], inputs["attention_mask"], row)

    steered = tiny_model("olmoe")
    steered.model.layers[0].register_forward_hook(lambda _, __, output: output + 0.5)
    with record(steered, tmp_path, "steered"), watched(steered) as passes, torch.no_grad():
        steered(**inputs)
    for row, rows in enumerate(recorded(tmp_path, "steered").values()):
        assert rows == expected(passes[0], inputs["attention_mask"], row)
    options = moewh.open(tmp_path).sql("select options::json ->> 'patches' from runs where run_id = 'steered'")
    assert "hook" in options.fetchall()[0][0]


def test_rows_without_a_mask_are_filled_with_what_is_named(tmp_path: Path) -> None:
    model = model_of("olmoe")
    inputs = batch(TEXTS, pad=5)
    for run, pad in (("tokens", None), ("padding", 5)):
        with record(model, tmp_path, run, pad_token_id=pad), torch.no_grad():
            model(input_ids=inputs["input_ids"])
    counts = "select num_tokens from prompts where run_id = $run order by prompt_id"
    found = {run: moewh.open(tmp_path).sql(counts, run=run).fetchall() for run in ("tokens", "padding")}
    assert found["tokens"] == [(inputs["input_ids"].shape[1],)] * len(TEXTS)
    assert found["padding"] == [(len(ids_of(text)),) for text in TEXTS]


def test_labels_are_of_the_sequences_that_begin_after_them(tmp_path: Path) -> None:
    model = model_of("olmoe")
    with record(model, tmp_path, "run") as recorder, torch.no_grad():
        model(**batch(("a",)))
        recorder.label(domain="prose", source="book", page=3)
        cache = model(**batch(("b", "c"))).past_key_values
        recorder.label(domain="code")
        model(input_ids=torch.tensor([[7], [8]]), past_key_values=cache)
        model(**batch(("d",)))
        assert recorder.run_id == "run"
    asked = "select domain, source, metadata, num_tokens from prompts order by prompt_id"
    book = ("prose", "book", '{"page": 3}', 3)
    assert moewh.open(tmp_path).sql(asked).fetchall() == [(None, None, None, 2), book, book, ("code", None, None, 2)]


def test_segments_are_committed_while_it_goes_on(tmp_path: Path) -> None:
    model = model_of("olmoe")
    progress = []
    asked = "select status, segments, prompts from runs"
    with record(model, tmp_path, "run", segment_rows=100), torch.no_grad():
        assert not (tmp_path / "runs" / "run_id=run").exists()
        for text in TEXTS * 3:
            model(**batch((text,)))
            gc.collect()
            progress.append(moewh.open(tmp_path).sql(asked).fetchall()[0])
    assert {status for status, _, _ in progress} == {"running"}
    assert progress[-1][1] > 1 and progress[-1][2] >= 8
    status, segments, prompts = moewh.open(tmp_path).sql(asked).fetchall()[0]
    assert (status, prompts) == ("complete", 12)
    assert segments > progress[-1][1]
    assert moewh.open(tmp_path).verify() == []


def test_an_exception_keeps_what_was_recorded_before(tmp_path: Path) -> None:
    model = model_of("olmoe")
    with pytest.raises(RuntimeError, match="mine own"), record(model, tmp_path, "run"), torch.no_grad():
        model(**batch(TEXTS))
        raise RuntimeError("mine own")
    assert moewh.open(tmp_path).sql("select status, prompts from runs").fetchall() == [("running", 4)]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(MoewhError, match="run 'run' exists already"), record(model, tmp_path, "run"):
        pass


def test_a_failed_write_in_the_background_is_reported_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other segments are in flight beside it; a loop that survives its errors does not end with a gap unnoticed."""
    model, real = model_of("olmoe"), write_segment

    def second_fails(layout: Layout, identity: Identity, number: int, *args: Any, **kwargs: Any) -> Committed:
        if number == 1:
            raise MoewhError("no room")
        return real(layout, identity, number, *args, **kwargs)

    monkeypatch.setattr(recorder_module, "in_background", lambda _: True)
    monkeypatch.setattr(open_run, "write_segment", second_fails)
    with pytest.raises(MoewhError, match="no room"), record(model, tmp_path, "run", segment_rows=1), torch.no_grad():
        for _ in range(20):
            with suppress(MoewhError):
                model(**batch(("ab",)))
    opened = moewh.open(tmp_path)
    assert opened.sql("select status, segments <= 1 + $beside from runs", beside=WRITERS).fetchall() == [
        ("running", True)
    ]
    assert opened.verify() == []


def test_a_pass_that_fails_is_not_recorded(tmp_path: Path) -> None:
    model = model_of("olmoe")

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with record(model, tmp_path, "run"), torch.no_grad():
        handle = model.model.layers[2].register_forward_pre_hook(out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(**batch(TEXTS))
        handle.remove()
        for text in TEXTS:
            model(**batch((text,)))
    assert [*recorded(tmp_path, "run")] == [tuple(ids_of(text)) for text in TEXTS]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_refused_pass_is_not_continued(
    background: bool, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache holds positions that were not recorded: what follows would be at the wrong ones."""
    model = model_of("olmoe")
    monkeypatch.setattr(recorder_module, "in_background", lambda _: background)
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(MoewhError, match=r"cannot be continued|were not recorded"), record(model, tmp_path, "run"):
        model(**batch(("first",)))
        if not first:
            model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
        mask = torch.tensor([[*[1] * cache.get_seq_length(), 2, 2]])
        with suppress(MoewhError):
            model(input_ids=torch.tensor([[4, 5]]), attention_mask=mask, past_key_values=cache)
        for _ in range(2):  # in the background, the refusal itself may come only now
            with suppress(*[MoewhError] if background else []):
                model(input_ids=torch.tensor([[6, 7]]), past_key_values=cache)
        model(input_ids=torch.tensor([[8]]), past_key_values=cache)
    stored = [list(ids) for ids in recorded(tmp_path, "run")]
    assert stored == [ids_of("first"), *([] if first else [[1, 2, 3]])]


@pytest.mark.parametrize("moment", ["_part", "_collect"])
def test_a_pass_that_is_interrupted_is_not_continued(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever moewh was about when the kernel was interrupted, no sequence has a gap."""
    model = model_of("olmoe")
    cache = transformers.DynamicCache(config=model.config)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(MoewhError, match="cannot be continued"), record(model, tmp_path, "run"):
        model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(recorder_module.Recorder, moment, interrupted)
            model(input_ids=torch.tensor([[4, 5]]), past_key_values=cache)
        model(input_ids=torch.tensor([[6, 7]]), past_key_values=cache)
    assert [*recorded(tmp_path, "run")] == [(1, 2, 3)]


# ------------------------------------------------------------------------------------------ what is refused


def _beams(model: Any) -> None:
    model.generate(**batch(("abc",)), num_beams=3, max_new_tokens=4)


def _embeddings(model: Any) -> None:
    model(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size))


def _positions(model: Any) -> None:
    model(input_ids=torch.tensor([[1, 2, 3, 4]]), position_ids=torch.tensor([[0, 1, 0, 1]]))


def _positions_and_a_mask(model: Any) -> None:
    ids, positions = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 0, 1]])
    model(input_ids=ids, position_ids=positions, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))


def _lengths(model: Any) -> None:
    model(input_ids=torch.tensor([[1, 2, 3]]), cu_seq_lens_q=torch.tensor([0, 1, 3]))


def _whole_mask(model: Any) -> None:
    model(input_ids=torch.tensor([[1, 2]]), attention_mask=torch.zeros(1, 1, 2, 2))


def _packed_mask(model: Any) -> None:
    model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 2, 2]]))


def _added_mask(model: Any) -> None:
    model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[-1e9, 0.0, 0.0]]))


def _gap(model: Any) -> None:
    model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 0, 1]]))


def _static_cache(model: Any) -> None:
    model.generate(**batch(("abc",)), max_new_tokens=3, cache_implementation="static")


def _cut_cache(model: Any) -> None:
    cache = model(input_ids=torch.tensor([[1, 2, 3]])).past_key_values
    cache.crop(-1)
    model(input_ids=torch.tensor([[4]]), past_key_values=cache)


def _copied_cache(model: Any) -> None:
    cache = copy.deepcopy(model(input_ids=torch.tensor([[1, 2, 3]])).past_key_values)
    model(input_ids=torch.tensor([[4]]), past_key_values=cache)


def _foreign_cache(model: Any) -> None:
    model(input_ids=torch.tensor([[4]]), past_key_values=((torch.zeros(1, 4, 2, 8),) * 2,) * 3)


def _layer(model: Any) -> None:
    model.model.layers[0].mlp(torch.zeros(1, 2, model.config.hidden_size))


def _assisted(model: Any) -> None:
    model.generate(**batch(("abcabcabcabc",)), max_new_tokens=6, prompt_lookup_num_tokens=3)


def _assisted_with_every_guess_right(model: Any) -> None:
    """Nothing is cut from the cache, so its passes look like turns of a chat."""
    model.generate(**batch(("abc",)), assistant_model=model, max_new_tokens=6, do_sample=False)


def _ingest_within(model: Any) -> None:
    moewh.ingest(model, TEXTS, "never", tokenizer=byte_tokenizer())


def _resized(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model(input_ids=torch.tensor([[1, model.config.vocab_size - 1]]))


def _fewer_experts(model: Any) -> None:
    model(input_ids=torch.tensor([[1, 2]]))
    model.model.layers[1].mlp.gate.top_k = 1
    model(input_ids=torch.tensor([[1, 2]]))


def _more_experts_in_generate(model: Any) -> None:
    cache = model(input_ids=torch.tensor([[1, 2]])).past_key_values
    model.model.layers[1].mlp.gate.top_k = 4
    model(input_ids=torch.tensor([[3]]), past_key_values=cache)


def _halved(model: Any) -> None:
    model(input_ids=torch.tensor([[1, 2]]))
    model.half()(input_ids=torch.tensor([[1, 2]]))


def _other_attention(model: Any) -> None:
    model.set_attn_implementation("eager")
    model(input_ids=torch.tensor([[1, 2]]))


def _copied(model: Any) -> None:
    copy.deepcopy(model)


def _averaged(model: Any) -> None:
    AveragedModel(model)


def _pickled(model: Any) -> None:
    torch.save(model, io.BytesIO())


def _nothing(model: Any) -> None:
    del model


def _fewer_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (_beams, r"put in another order \(beam search\)"),
        (_embeddings, "called without input_ids"),
        (_positions, "position_ids restart within a row: sequences are packed"),
        (_positions_and_a_mask, "position_ids restart within a row: sequences are packed"),
        (_lengths, r"sequences are packed into one row \(cu_seq_lens_q\)"),
        (_whole_mask, r"attention_mask is of shape \[1, 1, 2, 2\], not \[1 sequences, 2 positions\]"),
        (_packed_mask, "attention_mask holds values other than 0 and 1"),
        (_added_mask, "attention_mask holds values other than 0 and 1"),
        (_gap, "masks positions between tokens"),
        (_static_cache, "attention_mask is .*a static cache"),
        (_cut_cache, "the cache holds 2 positions of 1 sequences, and 3 of 1 were recorded"),
        (_copied_cache, "the cache holds 3 positions that were not recorded"),
        (_foreign_cache, "the cache is a tuple, which does not report its length"),
        (_layer, r"model\.layers\.0\.mlp\.experts was called outside of a forward pass of OlmoeModel"),
        (_assisted, "assisted decoding"),
        (_assisted_with_every_guess_right, "assisted decoding"),
        (_ingest_within, r"passes are being recorded \(moewh.record\)"),
        (_resized, r"token id \d+ is outside the vocabulary of the recording \(\d+ entries\)"),
        (_fewer_experts, "top-k is 1 at layer 1, and was 2 when the block was entered"),
        (_more_experts_in_generate, "top-k is 4 at layer 1, and was 2 when the block was entered"),
        (_halved, "dtype is float16, and was float32 when the block was entered"),
        (_other_attention, "attention is eager, and was sdpa when the block was entered"),
        (_copied, "Copy or pickle it before or after the block"),
        (_averaged, "Copy or pickle it before or after the block"),
        (_pickled, "Copy or pickle it before or after the block"),
        (_nothing, "no forward pass of the model was seen"),
        (_fewer_layers, r"model\.layers\.1\.mlp\.experts.*not called.*the layer is skipped, or"),
    ],
)
def test_what_cannot_be_distinguished_is_refused(use: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("olmoe"))
    with pytest.raises(MoewhError, match=message) as refused, torch.no_grad(), record(model, tmp_path, "run"):
        use(model)
    assert "\n" not in str(refused.value)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not {"get_compiled_call", "_get_candidate_generator", "__deepcopy__"} & vars(model).keys()
    assert set(moewh.open(tmp_path).sql("select status from runs").fetchall()) <= {("running",)}


def test_a_streamer_s_thread_is_recorded(tmp_path: Path) -> None:
    """Its loop ends before `generate` does, which nobody waits for."""
    model, inputs = model_of("olmoe"), batch(("abc",))
    with record(model, tmp_path, "said"):
        said = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ended = Event()

    class Slow(TextIteratorStreamer):
        def end(self) -> None:
            super().end()  # type: ignore[no-untyped-call]
            ended.wait(0.2)

    streamer = Slow(byte_tokenizer(), skip_prompt=True)
    options = {**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
    with record(model, tmp_path, "streamed"):
        Thread(target=model.generate, kwargs=options).start()
        streamed = "".join(streamer)
    assert streamed == byte_tokenizer().decode(said)
    assert recorded(tmp_path, "streamed") == recorded(tmp_path, "said")


def test_threads_that_take_turns_are_recorded(tmp_path: Path) -> None:
    """Also after one that failed, and one that died."""
    model = model_of("olmoe")

    def fail() -> None:
        with suppress(IndexError):
            model(input_ids=torch.tensor([[10**6]]))

    with record(model, tmp_path, "run"):
        for number, use in enumerate((lambda: model(input_ids=torch.tensor([[1, 2]])), fail) * 2):
            if number == 2:
                use()
            else:
                thread = Thread(target=use)
                thread.start()
                thread.join()
    assert moewh.open(tmp_path).sql("select vocab_id from tokens order by token_id").fetchall() == [(1,), (2,)] * 2
    assert moewh.open(tmp_path).sql("select status from runs").fetchall() == [("complete",)]


def test_two_threads_at_once_are_refused(tmp_path: Path) -> None:
    """In the second, whose pass gives nothing; the first is recorded."""
    model = model_of("olmoe")
    errors: list[str] = []

    def use(ids: list[int], generate: bool) -> None:
        try:
            run = partial(model.generate, max_new_tokens=2) if generate else model
            run(input_ids=torch.tensor([ids]))
        except MoewhError as error:
            errors.append(str(error))

    def meanwhile(*_: Any) -> None:
        handle.remove()
        for generate in (False, True):
            thread = Thread(target=use, args=([3, 4], generate))
            thread.start()
            thread.join()

    with record(model, tmp_path, "run"):
        handle = model.model.layers[0].register_forward_pre_hook(meanwhile)
        model(input_ids=torch.tensor([[1, 2]]))
    assert [error.partition(",")[0] for error in errors] == ["two threads run the model at once"] * 2
    assert moewh.open(tmp_path).sql("select vocab_id from tokens order by token_id").fetchall() == [(1,), (2,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.compile, "the model is compiled"),
        (lambda model: model.model.layers[0].compile() or model, "layers.0 is compiled"),
        (lambda model: model.to("meta"), "are not in memory"),
        (lambda _: tiny_model("qwen3-dense"), "has no routed experts"),
        (lambda _: build(next(one for one in FAMILIES if one.name == "switch_transformers")), "encoder-decoder"),
    ],
)
def test_a_model_that_cannot_be_observed_is_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    model = change(tiny_model("olmoe"))
    with pytest.raises(MoewhError, match=message), record(model, tmp_path / "wh", "run"):
        pass
    assert not (tmp_path / "wh").exists()


def test_experts_whose_output_a_hook_changes_are_refused(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.experts.register_forward_hook(lambda _, __, output: output + 1.0)
    with (
        pytest.raises(MoewhError, match="its output is not the sum of weight times expert"),
        record(model, tmp_path, "r"),
    ):
        pass
    assert np.isfinite(model(input_ids=torch.tensor([[1]])).logits.detach().numpy()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": "0"}, "pad_token_id is '0'. Give a whole number"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"segment_rows": 0}, "segment_rows is 0. Give a whole number of at least 1"),
        ({"series": 5}, "series is 5, which is not text"),
        ({"train_step": 5.5}, r"train_step is 5\.5"),
    ],
)
def test_an_option_of_another_type_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        record(model_of("olmoe"), tmp_path / "wh", "run", **options)


def test_a_name_is_not_a_loaded_model_or_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model is a str"), record("gpt2", tmp_path / "wh", "r"):
        pass
    recorder = moewh.record(model_of("olmoe"), "gpt2", tmp_path / "wh", "r")
    with pytest.raises(UsageError, match="the tokenizer is a str"), recorder:
        pass
    assert not (tmp_path / "wh").exists()


def test_a_label_after_the_block_is_refused(tmp_path: Path) -> None:
    with torch.no_grad(), record(model_of("olmoe"), tmp_path, "run") as recorder:
        model_of("olmoe")(**batch(("ab",)))
    with pytest.raises(UsageError, match="Call label within the block"):
        recorder.label(domain="late")


def test_the_run_id_before_the_block(tmp_path: Path) -> None:
    assert record(model_of("olmoe"), tmp_path, "run").run_id == "run"
    with pytest.raises(UsageError, match="no id before its block is entered"):
        _ = moewh.record(model_of("olmoe"), byte_tokenizer(), tmp_path).run_id


@pytest.mark.parametrize(
    ("name", "base"), [("org/Tiny_MoE-1.5B", "Tiny_MoE-1.5B"), ("_é!_", "model"), ("x" * 80, "x" * 54)]
)
def test_a_default_run_id_is_named_after_the_model_as_in_an_ingest(name: str, base: str, tmp_path: Path) -> None:
    model = model_of("olmoe")
    model.config._name_or_path = name
    with torch.no_grad(), moewh.record(model, byte_tokenizer(), tmp_path / "wh") as recorder:
        model(**batch(("ab",)))
    ingested = moewh.ingest(model, ["ab"], tmp_path / "wh", tokenizer=byte_tokenizer()).run_id
    assert [run_id.rpartition("-")[0] for run_id in (recorder.run_id, ingested)] == [base, base]


# ------------------------------------------------------------------------------------------ hooks within the block


@contextmanager
def _ran(model: Any) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """What OLMoE's experts ran with, behind every hook."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watching(number: int, forward: Any) -> Any:
        def ran(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
            seen[number] = (ids.detach().clone(), weights.detach().clone())
            return forward(hidden, ids, weights)

        return ran

    containers = [layer.mlp.experts for layer in model.model.layers]
    for number, experts in enumerate(containers):
        experts.forward = watching(number, experts.forward)
    try:
        yield seen
    finally:
        for experts in containers:
            del experts.forward


def test_a_hook_of_the_block_is_recorded_with_what_it_changes(tmp_path: Path) -> None:
    """The experts are called with what the last hook leaves, whenever it was registered."""
    model, given = tiny_model("olmoe"), batch(TEXTS)

    def next_experts(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, weights = args
        return hidden, (ids + 1) % 8, weights * 2

    with record(model, tmp_path, "run"), torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(next_experts)
        with _ran(model) as seen:
            model(**given)
    found = recorded(tmp_path, "run")
    for row, text in enumerate(TEXTS):
        assert found[tuple(ids_of(text))] == expected(seen, given["attention_mask"], row)


@pytest.mark.parametrize("name", ["jetmoe", "llama4", "doge"])
def test_a_hook_of_the_block_on_a_router_is_as_one_from_before(name: str, tmp_path: Path) -> None:
    """In families whose routing is read from the router's output."""
    model = copy.deepcopy(model_of(name))
    routers = [module for path, module in model.named_modules() if path.endswith((".router", ".router_gate"))]

    def halved(_: Any, __: Any, output: Any) -> Any:
        if name == "llama4":
            return output[0] / 2, output[1]
        return (*output[:2], output[2] / 2, *output[3:]) if name == "jetmoe" else output / 2

    def hook() -> list[Any]:
        return [router.register_forward_hook(halved) for router in routers]

    assert routers
    before = hook()
    with record(model, tmp_path, "before"), torch.no_grad():
        model(**batch(("abc",)))
    for handle in before:
        handle.remove()
    with record(model, tmp_path, "plain"), torch.no_grad():
        model(**batch(("abc",)))
    with record(model, tmp_path, "within"), torch.no_grad():
        hook()
        model(**batch(("abc",)))
    assert recorded(tmp_path, "within") == recorded(tmp_path, "before") != recorded(tmp_path, "plain")


@pytest.mark.parametrize("changed", ["input_ids", "attention_mask"])
def test_a_hook_of_the_block_that_changes_what_was_read_is_refused(changed: str, tmp_path: Path) -> None:
    model, given = tiny_model("olmoe"), batch(("abc", "defg"))

    def other(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, changed: torch.ones_like(kwargs[changed])}

    handle = model.model.register_forward_pre_hook(other, with_kwargs=True)
    with record(model, tmp_path, "before"), torch.no_grad():
        model(**given)
    handle.remove()
    with (
        pytest.raises(MoewhError, match=rf"within the block changes its {changed}, .* before the block\.$"),
        record(model, tmp_path, "within"),
        torch.no_grad(),
    ):
        model(**given)
        model.model.register_forward_pre_hook(other, with_kwargs=True)
        model(**given)
    assert moewh.open(tmp_path).sql("select run_id, prompts from runs order by 1").fetchall() == [
        ("before", 2),
        ("within", 2),
    ]


@pytest.mark.parametrize("positions", [[0, 1, 0, 1], [[0, 1, 0, 1]]], ids=["one for all rows", "one per row"])
def test_positions_that_restart_are_refused_in_either_form(positions: list[Any], tmp_path: Path) -> None:
    with (
        pytest.raises(MoewhError, match="position_ids restart within a row"),
        record(model_of("granitemoehybrid"), tmp_path, "run"),
        torch.no_grad(),
    ):
        model_of("granitemoehybrid")(input_ids=torch.tensor([[1, 2, 3, 4]]), position_ids=torch.tensor(positions))


@pytest.mark.parametrize("cleared", ["all", "stack", "layer"])
@pytest.mark.parametrize("again", [True, False])
def test_hooks_that_were_cleared_are_reported(cleared: str, again: bool, tmp_path: Path) -> None:
    """Notebooks clear all hooks of a model; then moewh does not see its passes."""
    model = tiny_model("olmoe")
    modules = {"all": [*model.modules()], "stack": [model.model], "layer": [model.model.layers[1].mlp.experts]}
    with (
        pytest.raises(MoewhError, match="moewh's hooks were removed from the model within the block"),
        record(model, tmp_path, "run"),
        torch.no_grad(),
    ):
        model(**batch(("abc",)))
        for module in modules[cleared]:
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        if again:
            model(**batch(("def",)))
    assert moewh.open(tmp_path).sql("select status, prompts from runs").fetchall() == [("running", 1)]


def test_a_stack_that_was_replaced_is_reported(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    with (
        pytest.raises(MoewhError, match="OlmoeModel was replaced within the block, so passes are missing"),
        record(model, tmp_path, "run"),
        torch.no_grad(),
    ):
        model(**batch(("abc",)))
        model.model = tiny_model("olmoe").model
        model(**batch(("def",)))
    assert moewh.open(tmp_path).sql("select status, prompts from runs").fetchall() == [("running", 1)]


def _stack(model: Any) -> Any:
    return model.model


def _another_head(model: Any) -> Any:
    other = type(model)(model.config)
    other.model = model.model
    return other


def _shared_layers(model: Any) -> Any:
    other = type(model)(model.config)
    other.model.layers = model.model.layers
    return other


@pytest.mark.parametrize("other", [_stack, _another_head, _shared_layers])
@pytest.mark.parametrize("door", ["ingest", "record", "trainer"])
def test_what_shares_a_recorded_model_is_not_run_by_moewh(
    other: Callable[[Any], Any], door: str, tmp_path: Path
) -> None:
    """Else its prompts, or the text that proves a model, would be recorded as the user's own passes."""
    model = copy.deepcopy(model_of("olmoe"))
    with record(model, tmp_path, "run"), torch.no_grad():
        model(**batch(("abc",)))
        shared = other(model)
        with pytest.raises(MoewhError, match=r"passes are being recorded \(moewh.record\)"):
            if door == "ingest":
                moewh.ingest(shared, TEXTS, tmp_path, "other", tokenizer=byte_tokenizer())
            elif door == "record":
                record(shared, tmp_path, "other").__enter__()
            else:
                callback = moewh.TrainerCallback(TEXTS, 1, tmp_path, "other", tokenizer=byte_tokenizer())
                state = transformers.TrainerState(global_step=0)
                arguments = transformers.TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
                callback.on_train_begin(arguments, state, transformers.TrainerControl(), model=shared)
        model(**batch(("def",)))
    assert [*recorded(tmp_path, "run")] == [tuple(ids_of(text)) for text in ("abc", "def")]
    moewh.ingest(shared, ("xyz",), tmp_path, "after", tokenizer=byte_tokenizer())
