"""Every MoE family of transformers as a tiny random model, built from a configuration: the table, as data.

A family is a folder of transformers' models. `TINY` is what all share, as far as a configuration knows the
name; a row of `FAMILIES` adds what is the family's own. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 257
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}


@dataclass(frozen=True)
class Family:
    """One family: which class to build, and what its configuration needs beside `TINY`."""

    name: str
    model: str
    changes: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Names of TINY that this configuration must not be given."""


_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SPARSE = ["dense", "sparse", "sparse", "sparse"]

FAMILIES: tuple[Family, ...] = (
    Family("afmoe", "AfmoeForCausalLM"),
    Family("aria", "AriaTextForCausalLM"),
    Family("axk1", "AXK1ForCausalLM"),
    Family("axk2", "AXK2ForCausalLM"),
    Family("bailing_hybrid", "BailingHybridForCausalLM"),
    Family("beam", "BeamForCausalLM", {"mlp_layer_types": _SPARSE}),
    Family("cohere2_moe", "Cohere2MoeForCausalLM"),
    Family(
        "dbrx",
        "DbrxForCausalLM",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 4,
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        },
    ),
    Family("deepseek_ocr2", "DeepseekOcr2TextModel", {"mlp_layer_types": _SPARSE}),
    Family("deepseek_v2", "DeepseekV2ForCausalLM"),
    Family("deepseek_v3", "DeepseekV3ForCausalLM"),
    Family("deepseek_v32", "DeepseekV32ForCausalLM"),
    Family("deepseek_v4", "DeepseekV4ForCausalLM"),
    Family("diffusion_gemma", "DiffusionGemmaEncoderTextModel"),
    Family("doge", "DogeForCausalLM", {"is_moe": True, "num_experts": 16}),
    Family("dots1", "Dots1ForCausalLM"),
    Family(
        "dots3_note",
        "Dots3NoteForCausalLM",
        {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_qk_rope_head_dim": 8,
            "swa_head_dim": 16,
            "swa_v_head_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "shared_experts_intermediate_size": 16,
        },
    ),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextModel",
        {
            "moe_intermediate_size": [16, 8],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
    ),
    Family("exaone_moe", "ExaoneMoeForCausalLM"),
    Family("flex_olmo", "FlexOlmoForCausalLM"),
    Family("flint", "FlintForCausalLM", {"mlp_only_layers": [0]}),
    Family(
        "gemma4",
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    ),
    Family("glm4_moe", "Glm4MoeForCausalLM"),
    Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    Family(
        "glm4v_moe",
        "Glm4vMoeTextModel",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 1.0,
            }
        },
    ),
    Family(
        "glm5_next",
        "Glm5NextTextModel",
        {
            "mlp_layer_types": _SPARSE,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
        },
        ("qk_rope_head_dim", "head_dim"),
    ),
    Family("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    Family("gpt_oss", "GptOssForCausalLM"),
    Family("granitemoe", "GraniteMoeForCausalLM"),
    Family("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            "mamba_n_heads": 8,
            "mamba_d_state": 16,
            "shared_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    Family("granitemoeshared", "GraniteMoeSharedForCausalLM", {"shared_intermediate_size": 16}),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    Family("hy_v3", "HYV3ForCausalLM"),
    Family("hy_v4", "HYV4ForCausalLM"),
    Family("inkling", "InklingForCausalLM"),
    Family("inkling2", "Inkling2ForCausalLM"),
    Family("jamba", "JambaForCausalLM"),
    Family("jetmoe", "JetMoeForCausalLM"),
    Family("kimi_linear", "KimiLinearForCausalLM", {"linear_head_dim": 8, "linear_num_heads": 4}),
    Family("kolibri1", "Kolibri1ForCausalLM"),
    Family("laguna", "LagunaForCausalLM", {"moe_routed_scaling_factor": 2.5}),
    Family("lfm2_moe", "Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"] * 2}),
    Family("llama4", "Llama4ForCausalLM", {"interleave_moe_layer_step": 2}),
    Family(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        {"num_layers": 3, "zero_expert_num": 3, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16},
    ),
    Family("mellum", "MellumForCausalLM"),
    Family("mimo_v2_flash", "MiMoV2FlashForCausalLM", {"num_key_value_heads": 2}),
    Family("minimax", "MiniMaxForCausalLM"),
    Family("minimax_m2", "MiniMaxM2ForCausalLM"),
    Family("minimax_m3_vl", "MiniMaxM3VLForCausalLM"),
    Family("mistral4", "Mistral4ForCausalLM"),
    Family("mistral_large4", "MistralLarge4TextModel"),
    Family("mixtral", "MixtralForCausalLM"),
    Family("muse_spark", "MuseSparkTextModel", {"moe_hidden_size": 16}),
    Family("nemotron_h", "NemotronHForCausalLM"),
    Family(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "d_model": 32,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
    ),
    Family("olmoe", "OlmoeForCausalLM"),
    Family("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    Family("phimoe", "PhimoeForCausalLM"),
    Family("qwen2_moe", "Qwen2MoeForCausalLM"),
    Family("qwen3_5_moe", "Qwen3_5MoeForCausalLM", _LINEAR),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}),
    Family("qwen3_next", "Qwen3NextForCausalLM", _LINEAR),
    Family("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    Family("qwen3_vl_moe", "Qwen3VLMoeTextModel"),
    Family(
        "qwen4_exp",
        "Qwen4ExpForCausalLM",
        {
            **_LINEAR,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
    Family("solar_open", "SolarOpenForCausalLM"),
    Family(
        "step3p7",
        "Step3p7TextModel",
        {"moe_router_scaling_factor": 3.0, "mlp_layer_types": _SPARSE, "sliding_window": 16},
    ),
    Family(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 24,
            "num_heads": 4,
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "expert_capacity": 3,
        },
    ),
    Family("unlimited_ocr", "UnlimitedOcrTextModel"),
    Family("zaya", "ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
)


def configuration(family: Family) -> Any:
    """The family's configuration: TINY as far as it is known there, and the family's own."""
    kind = getattr(transformers, family.model).config_class
    known = {part.name for part in dataclasses.fields(kind)} | set(getattr(kind, "attribute_map", {}))
    shared = {name: value for name, value in TINY.items() if name in known and name not in family.without}
    return kind(**{**shared, **family.changes})


def build(family: Family, seed: int = 0) -> Any:
    """The family's tiny model in float32, with random numbers everywhere that zeros or ones would hide a mistake."""
    torch.manual_seed(seed)
    model = getattr(transformers, family.model)(configuration(family)).eval()
    with torch.no_grad():
        persistent = model.state_dict(keep_vars=True)
        for name, tensor in persistent.items():
            if not tensor.is_floating_point():
                tensor.random_(0, 8)  # a hash table: expert by token id
            elif not tensor.isfinite().all() or tensor.numel() > 1 and tensor.min() == tensor.max():
                constant = 1.0 if tensor.isfinite().all() and float(tensor.flatten()[0]) == 1.0 else 0.0
                tensor.copy_(constant + 0.2 * torch.randn(tensor.shape))
            elif name.endswith(("embed_tokens.weight", "wte.weight", "shared.weight")):
                tensor[0].normal_(std=0.2)  # the padding row, which starts as zeros and is <s> too
    return model
