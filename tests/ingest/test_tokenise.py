"""Tokens of every form of prompt, compared with the tokenizer itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moewh.ingest.options import Overflow
from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.tokenise import TokenRules, tokenise, tokenizer_sha256
from moewh.ingest.prompts.vocabulary import vocabulary_texts
from moewh.ingest.routing import TokenisedSegment, TokenTexts
from moewh.warehouse.errors import MoewhError
from tests.support.models import BOS, byte_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
RULES = TokenRules(max_length=32, on_overflow="chunk", special_tokens=True)


def segment(*prompts: tuple[str, Any], template: str | None = TEMPLATE, rules: TokenRules = RULES) -> TokenisedSegment:
    """Tokenise (form, prompt) pairs as prompts 7, 8, …"""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    rows = [
        {"text": prompt if form == "text" else json.dumps(prompt), "form": form, "source": "s"}
        for form, prompt in prompts
    ]
    return tokenise(pa.Table.from_pylist(rows, schema=CANONICAL), 7, tokenizer, rules)


def ids_of(tokens: TokenisedSegment, prompt: int) -> list[int]:
    return [int(token) for token in tokens.vocab_id_T[tokens.prompt_T == prompt]]


def test_chat_goes_through_the_template_with_one_bos() -> None:
    tokens = segment(("messages", CHAT), ("text", "plain"))
    assert tokens.text_P == [f"{BOS}[user]hi[assistant]yo", "plain"]
    assert ids_of(tokens, 7) == byte_tokenizer()("[user]hi[assistant]yo")["input_ids"]
    assert ids_of(tokens, 8) == byte_tokenizer()("plain")["input_ids"]
    assert tokens.special_T.sum() == 2
    assert tokens.special_T[[0, len(ids_of(tokens, 7))]].all()


def test_given_ids_are_taken_as_they_are() -> None:
    given = byte_tokenizer()("given")["input_ids"][1:]
    tokens = segment(("input_ids", given), ("input_ids", [0, *given, 0]), ("input_ids", []))
    assert ids_of(tokens, 7) == given
    assert ids_of(tokens, 8) == [0, *given, 0]
    assert tokens.special_T.tolist() == [False] * 5 + [True] + [False] * 5 + [True]
    assert tokens.text_P == ["given", f"{BOS}given{BOS}", ""]
    assert tokens.status_P == ["ok", "ok", "empty"]


@pytest.mark.parametrize(
    ("form", "prompt", "template", "says"),
    [
        ("messages", CHAT, None, "prompt 7 is chat messages, but the tokenizer has no chat template"),
        ("messages", CHAT, "{{ raise_exception('no roles') }}", "prompt 7: the chat template refuses"),
        ("messages", [5], "{{ messages[0].role.upper() }}", "prompt 7: the chat template refuses"),
        ("input_ids", [1, 257], TEMPLATE, "prompt 7: 257 among its input_ids is not a token"),
        ("input_ids", [-1], TEMPLATE, "prompt 7: -1 among its input_ids is not a token"),
        ("input_ids", ["x"], TEMPLATE, "prompt 7: x among its input_ids is not a token"),
        ("input_ids", [True], TEMPLATE, "prompt 7: True among its input_ids is not a token"),
    ],
)
def test_prompts_that_cannot_be_tokenised_are_named(form: str, prompt: Any, template: str | None, says: str) -> None:
    with pytest.raises(MoewhError) as caught:
        segment((form, prompt), template=template)
    assert says in str(caught.value)


PADDED = [
    ([0, 0, 5, 6, 7], [0, 0, 1, 1, 1]),
    ([5, 6, 7, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
    ([0, 5, 6, 7, 0], [0, 1, 1, 1, 0]),
    ([9, 5, 6, 7, 256], [False, True, True, True, False]),
    ([5, 6, 7], [1, 1, 1]),
    ([5, 6, 7], None),
]


@pytest.mark.parametrize(("ids", "mask"), PADDED)
def test_masked_positions_are_no_tokens(ids: list[int], mask: list[Any] | None) -> None:
    given, plain = {"input_ids": ids, "attention_mask": mask}, [5, 6, 7]
    tokens = segment(("input_ids", given), ("input_ids", plain))
    assert ids_of(tokens, 7) == ids_of(tokens, 8) == plain
    assert tokens.position_T.tolist() == [0, 1, 2] * 2
    assert tokens.length_C.tolist() == [3, 3]
    assert tokens.text_P[0] == tokens.text_P[1] == byte_tokenizer().decode(plain)


def test_a_prompt_that_is_masked_whole_is_failed() -> None:
    tokens = segment(
        ("input_ids", {"input_ids": [0, 0], "attention_mask": [0, 0]}),
        ("input_ids", {"input_ids": [], "attention_mask": []}),
        ("input_ids", [0, 0]),
    )
    assert tokens.status_P == ["failed", "empty", "empty"]
    assert tokens.without_tokens == (7,)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([1, 1], "attention_mask has 2 values for 3 input_ids"),
        ([1, 1, 1, 0], "attention_mask has 4 values for 3 input_ids"),
        ([], "attention_mask has 0 values for 3 input_ids"),
        ([1, 0, 1], "attention_mask masks position 1, between tokens"),
        ([1, 2, 1], "values other than 0 and 1"),
        ([1, -1, 1], "values other than 0 and 1"),
        ([0.0, 1.0, 1.0], "values other than 0 and 1"),
        ([None, 1, 1], "values other than 0 and 1"),
        (["0", "1", "1"], "values other than 0 and 1"),
        ([[1], [1], [1]], "values other than 0 and 1"),
        ("111", "values other than 0 and 1"),
        (1, "values other than 0 and 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_prompt(mask: Any, says: str) -> None:
    with pytest.raises(MoewhError, match="prompt 8: its attention_mask ") as refused:
        segment(("text", "x"), ("input_ids", {"input_ids": [1, 2, 3], "attention_mask": mask}))
    assert says in str(refused.value)


def test_only_ids_that_reach_the_model_must_have_a_row() -> None:
    beyond = [5, 6, 255, 256]
    cases: tuple[tuple[Overflow, list[int]], ...] = (("truncate", [5, 6]), ("skip", []))
    for rule, kept in cases:
        tokens = segment(("input_ids", beyond), rules=TokenRules(2, rule, True, vocabulary=255))
        assert ids_of(tokens, 7) == kept
    with pytest.raises(MoewhError, match=r"prompt 7: token id 255 is outside the model's vocabulary \(255 rows\)"):
        segment(("input_ids", beyond), rules=TokenRules(2, "chunk", True, vocabulary=255))


def test_chunks_keep_every_token_and_repeat_the_special_ones() -> None:
    text = "".join(chr(97 + n % 26) for n in range(100))
    tokens = segment(("text", text))
    plain = [token for token, special in zip(tokens.vocab_id_T, tokens.special_T, strict=True) if not special]
    assert plain == byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokens.length_C.tolist() == [32, 32, 32, 8]
    assert tokens.special_T[tokens.start_C].all()
    assert tokens.special_T.sum() == 4
    assert tokens.position_T.tolist() == list(range(104))
    assert np.diff(tokens.context_T).sum() == 3


def test_maximum_length_without_room_for_text_is_refused() -> None:
    with pytest.raises(MoewhError, match="leaves no room beside 1 special tokens"):
        segment(("text", "too long"), rules=TokenRules(1, "truncate", special_tokens=True))


def test_token_texts_join_to_the_prompt() -> None:
    text = "tabs\tand spaces  and ümlaut"
    tokens = segment(("text", text), rules=TokenRules(64, "error", special_tokens=False))
    texts = TokenTexts(vocabulary_texts(byte_tokenizer()))(tokens.vocab_id_T).to_pylist()
    assert "".join(texts).replace("\ufffd", "") == text.replace("ü", "")
    assert texts.count("\ufffd") == 2


def test_digest_of_a_tokenizer_sees_what_changes_its_ids() -> None:
    plain, templated, added = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    templated.chat_template = TEMPLATE
    added.add_tokens(["whole"])
    digests = {tokenizer_sha256(tokenizer) for tokenizer in (plain, templated, added)}
    assert len(digests) == 3
    assert tokenizer_sha256(byte_tokenizer()) in digests
    split = byte_tokenizer()
    split.split_special_tokens = True
    assert split(BOS)["input_ids"] != byte_tokenizer()(BOS)["input_ids"]
    assert tokenizer_sha256(split) not in digests


def test_a_doubled_special_token_is_reported() -> None:
    warned: list[str] = []
    rows = [{"text": text, "form": "text", "source": "s"} for text in ("plain", f"{BOS}a", f"{BOS}b", BOS)]
    table = pa.Table.from_pylist(rows, schema=CANONICAL)
    tokens = tokenise(table, 0, byte_tokenizer(), RULES, warn=warned.append)
    assert ids_of(tokens, 1) == [0, *byte_tokenizer()("a")["input_ids"]]
    assert len(warned) == 1
    assert warned[0].startswith("prompt 1 begins with <s>, and the tokenizer puts another in front.")
    tokenise(table, 0, byte_tokenizer(), TokenRules(32, "chunk", special_tokens=False), warn=warned.append)
    assert len(warned) == 1
