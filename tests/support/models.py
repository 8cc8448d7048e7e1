"""Tiny random models with a tokenizer, built from a config and saved as an ordinary model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moewh.ingest.model.loading import choose_device
from moewh.ingest.processes import Process

DEVICE = choose_device(None, Process()) or torch.device("cpu")
"""Where an ingest runs without --device: a GPU if there is one. Independent computations run there too, because devices
round differently."""
MAX_LENGTH = 64
BOS = "<s>"
_SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte (ids 1 to 256) that puts <s> (id 0) in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {BOS: 0, **{char: place + 1 for place, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model: olmoe, olmoe-normalised, mixtral, or qwen3-dense (which has no experts)."""
    torch.manual_seed(seed)
    routed = {"num_experts_per_tok": 3, **_SMALL, **changes}
    if kind == "olmoe":
        model: Any = OlmoeForCausalLM(OlmoeConfig(num_experts=8, norm_topk_prob=False, **routed))
    elif kind == "olmoe-normalised":
        model = OlmoeForCausalLM(OlmoeConfig(num_experts=8, norm_topk_prob=True, **routed))
    elif kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=8, **{**routed, "num_key_value_heads": 2}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **_SMALL))
    return model.to(dtype).eval()


def save_model(folder: Path, kind: str = "olmoe", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a tiny model and its tokenizer as a model folder and return its path."""
    tiny_model(kind, dtype, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
