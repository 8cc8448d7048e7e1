"""Every MoE family of transformers as a tiny random model, built from a configuration: the table, as data.

A family is a folder of transformers' models. `TINY` is what all share, as far as a configuration knows the
name; a row adds what is the family's own, and what its layers must be found to do. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moewh.ingest import families
from moewh.ingest.families.find import adapter_of
from moewh.ingest.families.rule import FamilyAdapter

VOCABULARY = 257
TINY: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.05, "num_hidden_layers": 4},
    "unpadded_vocab_size": VOCABULARY - 7,  # the head's rows, in families whose checkpoints pad it to vocab_size
    **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    **{"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8},
    **{"num_experts_per_tok": 2, "top_k_experts": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2},
    **{"n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    **{"norm_topk_prob": True, "routed_scaling_factor": 1.5},
}


@dataclass(frozen=True, eq=False)
class Family:
    """One family: which class to build, what its configuration needs, and what the table `layers` must say."""

    name: str
    model: str
    changes: dict[str, Any] = field(default_factory=dict)
    """What its (text) configuration is given beside `TINY`."""
    without: tuple[str, ...] = ()
    """Names of TINY that it must not be given."""
    towers: dict[str, Any] | None = None
    """Of a model that also sees or hears: the rest of its configuration."""
    layers: tuple[int, ...] = (0, 1, 2, 3)
    """The MoE layers."""
    scoring: str = "softmax"
    renormalized: bool = True
    post_scale: float = 1.0
    shared: int = 0
    router_input: str = "experts"
    arithmetic: str = "swiglu"
    """What an expert computes: a function of `tests.support.expert_arithmetic`."""
    routed_part: str = "experts"
    """The part of the block without which the routed sum is zero."""
    sum_is_seen: bool = True
    """False where a norm or projection follows the routed sum inside the block."""
    weight_on_input: bool = False
    """True where the weight multiplies the expert's input."""
    router_gain: float = 4.0
    """What the router's random weights are multiplied by, so that tokens differ in their choice."""
    drops: bool = False
    """True where some tokens have no route."""
    refused: str | None = None
    """Why moewh must not record it."""


LATER = (1, 2, 3)
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
_LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
}
_LOOP = {
    **{"n_layers_per_attn_res_block": 1, "loop_gate_rank": 8},
    **{"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 3},
}
"""Layers 1 and 2 run three times: 0, 1, 2, 1, 2, 1, 2, 3."""
_DOTS3 = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    **{"swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 8, "swa_head_dim": 16, "swa_v_head_dim": 8},
    **{"index_n_heads": 2, "index_head_dim": 16, "shared_experts_intermediate_size": 16},
}
_VISION = {
    **{"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32},
    "num_position_embeddings": 16,
}
_VISION_HF = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
_VISION_INKLING = {**_VISION_HF, "text_hidden_size": 32, "projection_hidden_dim": 16}
_DOTS3_TOWERS = {
    "vision_config": {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"moe_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"mlp_layer_types": ["dense", "sparse"], "adapter_in_dim": 16, "adapter_out_dim": 32},
    },
    "audio_config": {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"adapter_input_size": 16, "adapter_out_dim": 32, "downsample_hidden_size": 16, "feature_size": 16},
    },
}
_MARKS = {"vision_start_token_id": 254, "audio_start_token_id": 255}
_AUDIO = {
    **{"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32},
    **{"num_mel_bins": 16, "downsample_hidden_size": 16},
}

# fmt: off
FAMILIES: tuple[Family, ...] = (
    Family("afmoe", "AfmoeForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("aria", "AriaTextForCausalLM", shared=1, arithmetic="swiglu_transposed"),
    Family("axk1", "AXK1ForCausalLM", sum_is_seen=False, layers=LATER, scoring="sigmoid", shared=1),
    Family("axk2", "AXK2ForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("bailing_hybrid", "BailingHybridForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("beam", "BeamForCausalLM", layers=LATER, scoring="sigmoid", post_scale=1.5,
           changes={"mlp_layer_types": _SPARSE}),
    Family("cohere2_moe", "Cohere2MoeForCausalLM", post_scale=0.5, shared=1),
    Family("dbrx", "DbrxForCausalLM", arithmetic="dbrx",
           changes={"d_model": 32, "n_heads": 4, "n_layers": 4, "ffn_config": {"ffn_hidden_size": 16,
                    "moe_num_experts": 8, "moe_top_k": 2}, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0,
                    "rope_theta": 1e4}}),
    Family("deepseek_ocr2", "DeepseekOcr2TextModel", layers=LATER, renormalized=False, shared=1,
           changes={"mlp_layer_types": _SPARSE}),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", layers=LATER, renormalized=False, shared=1),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("deepseek_v32", "DeepseekV32ForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("deepseek_v4", "DeepseekV4ForCausalLM", scoring="sqrtsoftplus", shared=1),
    Family("diffusion_gemma", "DiffusionGemmaEncoderTextModel", sum_is_seen=False, router_input="own"),
    Family("doge", "DogeForCausalLM", shared=1, arithmetic="neuron", routed_part="up_embed", changes={"is_moe": True,
                    "num_experts": 16}),
    Family("dots1", "Dots1ForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("dots3_note", "Dots3NoteForCausalLM", layers=LATER, scoring="sigmoid", shared=1,
           changes=_DOTS3),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", layers=LATER, shared=1),
    Family("ernie4_5_vl_moe", "Ernie4_5_VLMoeTextModel", layers=LATER, shared=1,
           changes={"moe_intermediate_size": [16, 8], "rope_parameters": _MROPE}),
    Family("exaone_moe", "ExaoneMoeForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("flex_olmo", "FlexOlmoForCausalLM"),
    Family("flint", "FlintForCausalLM", layers=LATER, scoring="sigmoid", shared=1, changes={"mlp_only_layers": [0]}),
    Family("gemma4", "Gemma4ForCausalLM", sum_is_seen=False, router_input="own",
           changes={"enable_moe_block": True, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": VOCABULARY}),
    Family("glm4_moe", "Glm4MoeForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("glm4v_moe", "Glm4vMoeTextModel", layers=LATER, scoring="sigmoid", shared=1,
           changes={"rope_parameters": _MROPE}),
    Family("glm5_next", "Glm5NextTextModel", layers=LATER, scoring="sigmoid", shared=1,
           changes={"mlp_layer_types": _SPARSE, "linear_head_dim": 8, "linear_num_heads": 4, "index_n_heads": 2,
                    "index_head_dim": 8},
           without=("qk_rope_head_dim", "head_dim")),
    Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("gpt_oss", "GptOssForCausalLM", arithmetic="swiglu_interleaved"),
    Family("granitemoe", "GraniteMoeForCausalLM"),
    Family("granitemoe_swa", "GraniteMoeSWAForCausalLM", shared=1, changes={"shared_intermediate_size": 16}),
    Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", shared=1,
           changes={"mamba_n_heads": 8, "mamba_d_state": 16, "shared_intermediate_size": 16,
                    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}),
    Family("granitemoeshared", "GraniteMoeSharedForCausalLM", shared=1, changes={"shared_intermediate_size": 16}),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", shared=1),
    Family("hy_v3", "HYV3ForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("hy_v4", "HYV4ForCausalLM", layers=LATER, scoring="sigmoid", shared=1),
    Family("hy_v4_vl", "HYV4VLTextModel", layers=LATER, scoring="sigmoid", shared=1,
           changes={"rope_parameters": _MROPE}),
    Family("inkling", "InklingForCausalLM", scoring="sigmoid", renormalized=False, shared=1),
    Family("inkling2", "Inkling2ForCausalLM", arithmetic="softcapped", scoring="sigmoid"),
    Family("inkling2_loop", "Inkling2LoopForCausalLM", arithmetic="softcapped", scoring="sigmoid",
           layers=tuple(range(8)), changes=_LOOP),
    Family("jamba", "JambaForCausalLM", layers=(1, 3), renormalized=False),
    Family("jetmoe", "JetMoeForCausalLM", arithmetic="jetmoe", routed_part="output_linear"),
    Family("kimi_linear", "KimiLinearForCausalLM", layers=LATER, scoring="sigmoid", shared=1,
           changes={"linear_head_dim": 8, "linear_num_heads": 4}),
    Family("kolibri1", "Kolibri1ForCausalLM", scoring="sigmoid", shared=1),
    Family("laguna", "LagunaForCausalLM", layers=LATER, scoring="sigmoid", post_scale=2.5, shared=1,
           changes={"moe_routed_scaling_factor": 2.5}),
    Family("lara_mini", "LaraMiniForCausalLM", shared=1, changes=_LINEAR),
    Family("lfm2_moe", "Lfm2MoeForCausalLM", layers=(2, 3), scoring="sigmoid",
           changes={"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    Family("llama4", "Llama4ForCausalLM", weight_on_input=True, arithmetic="swiglu_transposed", layers=(1, 3),
           scoring="sigmoid", renormalized=False, shared=1, changes={"interleave_moe_layer_step": 2}),
    Family("longcat_flash", "LongcatFlashForCausalLM", arithmetic="or_identity", layers=(0, 1, 2), renormalized=False,
           changes={"num_layers": 3, "zero_expert_num": 3, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16}),
    Family("mellum", "MellumForCausalLM"),
    Family("mimo_v2_flash", "MiMoV2FlashForCausalLM", layers=LATER, scoring="sigmoid",
           changes={"num_key_value_heads": 2}),
    Family("minimax", "MiniMaxForCausalLM"),
    Family("minimax_m2", "MiniMaxM2ForCausalLM", scoring="sigmoid"),
    Family("minimax_m3_vl", "MiniMaxM3VLForCausalLM", arithmetic="swiglu_alpha", scoring="sigmoid", post_scale=1.5,
           shared=1),
    Family("mistral4", "Mistral4ForCausalLM", layers=LATER, shared=1),
    Family("mistral_large4", "MistralLarge4TextModel", layers=LATER, shared=1),
    Family("mixtral", "MixtralForCausalLM"),
    Family("muse_spark", "MuseSparkTextModel", sum_is_seen=False, arithmetic="normed", scoring="sigmoid",
           router_input="own", changes={"moe_hidden_size": 16}),
    Family("nemotron_h", "NemotronHForCausalLM", sum_is_seen=False, layers=(1, 3), router_input="own",
           arithmetic="ungated", scoring="sigmoid", shared=1,
           changes={"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "moe_latent_size": 12,
                    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8}),
    Family("nllb_moe", "NllbMoeForConditionalGeneration", refused="transformers computes it wrongly",
           changes={"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
                    "d_model": 32, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 4,
                    "decoder_attention_heads": 4}),
    Family("olmoe", "OlmoeForCausalLM", renormalized=False, changes={"norm_topk_prob": False}),
    Family("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", arithmetic="swiglu_concatenated",
           post_scale=2.0),
    Family("phimoe", "PhimoeForCausalLM", scoring="sparsemixer", renormalized=False),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", shared=1),
    Family("qwen3_5_moe", "Qwen3_5MoeForCausalLM", shared=1,
           changes=_LINEAR),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", layers=(1, 3), changes={"decoder_sparse_step": 2}),
    Family("qwen3_next", "Qwen3NextForCausalLM", shared=1,
           changes=_LINEAR),
    Family("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    Family("qwen3_vl_moe", "Qwen3VLMoeTextModel"),
    Family("qwen4_exp", "Qwen4ExpForCausalLM", shared=1,
           changes={**_LINEAR, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                    "indexer_budget": 16, "indexer_compress_ratio": 4}),
    Family("solar_open", "SolarOpenForCausalLM", scoring="sigmoid", shared=1),
    Family("step3p7", "Step3p7TextModel", layers=LATER, scoring="sigmoid", post_scale=3.0, shared=1,
           changes={"moe_router_scaling_factor": 3.0, "mlp_layer_types": _SPARSE, "sliding_window": 16}),
    Family("switch_transformers", "SwitchTransformersForConditionalGeneration", arithmetic="dense", drops=True,
           layers=(1, 3), renormalized=False,
           changes={"d_model": 32, "d_kv": 8, "d_ff": 24, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4,
                    "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "expert_capacity": 3}),
    Family("unlimited_ocr", "UnlimitedOcrTextModel", layers=LATER, renormalized=False, shared=1),
    Family("zaya", "ZayaForCausalLM", drops=True, router_gain=8, renormalized=False, router_input="own",
           changes={"num_experts_per_tok": 1, "router_hidden_size": 16}),
)

WRAPPERS: tuple[Family, ...] = (
    Family("qwen3_vl_moe with images", "Qwen3VLMoeForConditionalGeneration",
           changes={"rope_parameters": _MROPE}, towers={"vision_config": {**_VISION, "deepstack_visual_indexes": [0]}}),
    Family("qwen3_5_moe with images", "Qwen3_5MoeForConditionalGeneration", shared=1, changes=_LINEAR,
           towers={"vision_config": _VISION}),
    Family("qwen3_omni_moe with images and sound", "Qwen3OmniMoeThinkerForConditionalGeneration",
           changes={"rope_parameters": _MROPE},
           towers={"vision_config": {**_VISION, "deepstack_visual_indexes": [0]}, "audio_config": _AUDIO, **_MARKS}),
    Family("llama4 with images", "Llama4ForConditionalGeneration", router_gain=2, weight_on_input=True,
           arithmetic="swiglu_transposed", layers=(1, 3), scoring="sigmoid", renormalized=False, shared=1,
           changes={"interleave_moe_layer_step": 2},
           towers={"vision_config": {**_VISION_HF, "vision_output_dim": 16, "projector_input_dim": 16,
                                     "projector_output_dim": 16}}),
    Family("gemma4 with images", "Gemma4ForConditionalGeneration", sum_is_seen=False, router_input="own",
           changes={"enable_moe_block": True, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": VOCABULARY},
           towers={"vision_config": {**_VISION_HF, "num_key_value_heads": 2, "head_dim": 8}, "audio_config": None}),
    Family("ernie4_5_vl_moe with images", "Ernie4_5_VLMoeForConditionalGeneration", layers=LATER, shared=1,
           changes={"moe_intermediate_size": [16, 8], "rope_parameters": _MROPE},
           towers={"vision_config": {**_VISION, "hidden_size": 16}}),
    Family("dots3_note with images", "Dots3NoteForConditionalGeneration", layers=LATER, scoring="sigmoid", shared=1,
           changes=_DOTS3, towers=_DOTS3_TOWERS),
    Family("hy_v4_vl with images", "HYV4VLForConditionalGeneration", layers=LATER, scoring="sigmoid", shared=1,
           changes={"rope_parameters": _MROPE},
           towers={"vision_config": {**_VISION_HF, "out_hidden_size": 32, "max_image_size": 64}}),
    Family("inkling2 with images", "Inkling2ForConditionalGeneration", arithmetic="softcapped", scoring="sigmoid",
           towers={"vision_config": _VISION_INKLING}),
    Family("inkling2_loop with images", "Inkling2LoopForConditionalGeneration", arithmetic="softcapped",
           scoring="sigmoid", layers=tuple(range(8)), changes=_LOOP, towers={"vision_config": _VISION_INKLING}),
)
"""Models that also see or hear, given text: the experts of their towers must stay silent."""
# fmt: on


def configuration(family: Family) -> Any:
    """The family's configuration: TINY as far as it is known there, and the family's own."""
    whole = getattr(transformers, family.model).config_class
    kind = whole if family.towers is None else text_configuration_class(whole)
    known = {part.name for part in dataclasses.fields(kind)} | set(getattr(kind, "attribute_map", {}))
    shared = {name: value for name, value in TINY.items() if name in known and name not in family.without}
    text = {**shared, **family.changes}
    return kind(**text) if family.towers is None else whole(text_config=text, **family.towers)


def text_configuration_class(whole: Any) -> Any:
    """The class of the text part of a configuration of several parts."""
    return type(whole().get_text_config())


def build(family: Family, seed: int = 0) -> Any:
    """The family's tiny model in float32, with random numbers wherever zeros or ones would hide a mistake."""
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, family.model)(configuration(family)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                chosen = torch.rand(len(tensor), 8).argsort(-1)  # a hash table: different experts by token id
                tensor.copy_(chosen[:, : tensor.shape[-1]])
            elif name.endswith("balancing_biases"):
                # One per expert, and the last for no expert at all: loading sets it to -1, and so do we.
                tensor.uniform_(-1.1, -1.05)[..., -1] = -1
            elif not tensor.isfinite().all():
                tensor.normal_(std=0.05)
            elif tensor.numel() > 1 and tensor.min() == tensor.max():  # norms, scales, and what starts as zeros
                tensor.add_((0.2 if tensor.any() else 0.05) * torch.randn(tensor.shape))
            elif name.endswith(("embed_tokens.weight", "wte.weight", "shared.weight")):
                tensor[0].normal_(std=0.05)  # the padding row, which starts as zeros and is <s> too
            if _ROUTER.search(name):
                tensor.mul_(family.router_gain)
    return model


def adapters() -> dict[str, FamilyAdapter]:
    """Every family that has a file of its own: its model type, with _ for -, and its adapter."""
    found = ((module.name, adapter_of(module.name)) for module in pkgutil.iter_modules(families.__path__))
    return {name: adapter for name, adapter in found if adapter is not None}


def present(family: Family) -> bool:
    """Tell whether the installed transformers has this family."""
    return hasattr(transformers, family.model)


_EXPERTS = re.compile(
    r"^class \w*(?:Experts?|MoE|Moe|Router|TopKGat)\w*\(|^ +(?:top_k_index|top_k_weights): ", re.MULTILINE
)
_ROUTER = re.compile(r"\.(?:gate|router|router_gate)\.(?:\w+\.)*(?<!norm\.)weight$")
_NO_LANGUAGE_MODEL = {"vitpose_backbone", "granite_docling"}
"""Experts by task in a vision model; a router of images that has no experts."""


def has_experts() -> set[str]:
    """Names of the folders of the installed transformers whose models hold experts."""
    folder = Path(transformers.__file__).parent / "models"
    files = (path for path in folder.glob("*/modeling_*.py") if _EXPERTS.search(path.read_text()))
    return {path.parent.name for path in files} - _NO_LANGUAGE_MODEL
