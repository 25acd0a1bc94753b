"""Small architectures of twenty model types without a closed form: experts, sliding windows, layers with a state."""

_DENSE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "pad_token_id": 0,
}  # fmt: skip
_HEADS = {"head_dim": 64}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_LATENT = {
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 64,
    "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16}
_DELTA = {
    "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

# The numbers that differ from `_DENSE`, by model type.
TRACED = {
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 128},
    "granitemoe": _EXPERTS,
    "gpt_oss": {**_HEADS, **_EXPERTS, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {**_EXPERTS, **_LATENT},
    "glm4_moe": {**_EXPERTS, "first_k_dense_replace": 1, "n_routed_experts": 8},
    "gemma": _HEADS,
    "gemma2": _HEADS,
    "gemma3_text": {**_HEADS, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "gpt_neox": {},
    "starcoder2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_EXPERTS, **_MAMBA, "shared_intermediate_size": 128, "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 512, "mamba_n_groups": 1},
    "qwen3_next": {**_HEADS, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 128},
    "qwen3_5_text": {**_HEADS, **_DELTA},
}  # fmt: skip


def architecture(kind):
    """Return the architecture of a model type, with the larger of its layers first where they differ."""
    return {**_DENSE, **TRACED[kind], "model_type": kind}


def save_untrained(kind, folder):
    """Write the folder of a model of a type, its configuration and random weights; return it with the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture(kind)))
    model.save_pretrained(folder / kind)
    return folder / kind, model
