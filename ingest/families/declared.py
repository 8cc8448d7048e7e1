"""What a family's code says of its weights, for where that cannot be measured.

That is: on the meta device, where nothing runs, and through a router that does not show its logits. A family
that is not listed is unknown until it runs; the tests hold the others to what is measured.

`softmax` and `sigmoid` are taken of the router's logits. Renormalised: a token's K weights are divided by their sum,
be they scaled by a constant (or by a factor of each expert) afterwards.
"""

from __future__ import annotations

from typing import Any

from moewh.ingest.model.expected import text_config

_FUNCTIONS = {
    "softmax": (
        "aria_text dbrx deepseek_ocr2_text deepseek_v2 diffusion_gemma_text doge ernie4_5_moe ernie4_5_vl_moe_text "
        "flex_olmo gemma4_text gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe "
        "jamba jetmoe lara_mini longcat_flash mellum minimax mistral4 mistral_large4_text mixtral olmoe "
        "openai_privacy_filter qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe_text "
        "qwen4_exp_text switch_transformers unlimited_ocr_text zaya"
    ),
    "sigmoid": (
        "afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note_text exaone_moe flint glm4_moe "
        "glm4_moe_lite glm4v_moe_text glm5_next_text glm_moe_dsa hy_v3 hy_v4 hy_v4_vl_text inkling_text kimi_linear "
        "kolibri1 laguna lfm2_moe llama4_text mimo_v2_flash minimax_m2 minimax_m3_vl_text muse_spark_text nemotron_h "
        "solar_open step3p5"
    ),
    "sparsemixer": "phimoe",
}
_UNMEASURABLE = {
    "gemma4_text": "the router puts out probabilities, and multiplies each weight by a factor of its expert",
    "diffusion_gemma_text": "as gemma4_text",
    "phimoe": "each slot's weight is a softmax over what the slots before left, above a threshold",
}
"""Families whose weights are no function of what their router's forward puts out, and why."""
_FUNCTION = {model_type: name for name, types in _FUNCTIONS.items() for model_type in types.split()}
_FUNCTION_NAMES = ("scoring_func", "expert_selection_fn")
_NOT_RENORMALIZED = {
    *("deepseek_ocr2_text", "deepseek_v2", "inkling_text", "jamba", "llama4_text", "longcat_flash", "phimoe"),
    *("switch_transformers", "unlimited_ocr_text", "zaya"),
}


def declared_scoring(config: Any) -> str | None:
    """The function from logits to weights, as far as it is known without running the model."""
    text = text_config(config)
    stated = (getattr(text, name, None) for name in _FUNCTION_NAMES)
    if named := next((str(value) for value in stated if value), None):
        return named
    return _FUNCTION.get(text.model_type)


def declared_renormalized(config: Any) -> bool | None:
    """Whether a token's K weights are divided by their sum, as far as it is known without running the model."""
    text = text_config(config)
    if declared_scoring(config) is None:
        return None
    if text.model_type in _NOT_RENORMALIZED:
        return False
    stated = getattr(text, "norm_topk_prob", None)
    return True if stated is None else bool(stated)


def can_be_measured(config: Any) -> bool:
    """Tell whether the router's output and the weights together show the function."""
    return text_config(config).model_type not in _UNMEASURABLE
