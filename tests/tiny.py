"""Tiny random models, built on the spot."""

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from spts_compress.fit.updates import blank, fit_updates
from spts_compress.modeling.modeling_spts_deepseek import (
    SptsDeepseekV2Config,
    SptsDeepseekV2ForCausalLM,
    SptsDeepseekV3Config,
    SptsDeepseekV3ForCausalLM,
)
from spts_compress.modeling.modeling_spts_gemma3 import SptsGemma3Config, SptsGemma3ForCausalLM
from spts_compress.modeling.modeling_spts_llama import SptsLlamaConfig, SptsLlamaForCausalLM
from spts_compress.modeling.modeling_spts_ministral import SptsMinistralConfig, SptsMinistralForCausalLM
from spts_compress.modeling.modeling_spts_mistral import SptsMistralConfig, SptsMistralForCausalLM
from spts_compress.modeling.modeling_spts_mixtral import SptsMixtralConfig, SptsMixtralForCausalLM
from spts_compress.modeling.modeling_spts_olmo2 import SptsOlmo2Config, SptsOlmo2ForCausalLM
from spts_compress.modeling.modeling_spts_phi3 import SptsPhi3Config, SptsPhi3ForCausalLM
from spts_compress.modeling.modeling_spts_qwen2 import SptsQwen2Config, SptsQwen2ForCausalLM
from spts_compress.modeling.modeling_spts_qwen3 import SptsQwen3Config, SptsQwen3ForCausalLM
from spts_compress.modeling.modeling_spts_qwen3_moe import SptsQwen3MoeConfig, SptsQwen3MoeForCausalLM

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    # Large enough weights that attention is far from uniform and selections differ clearly.
    initializer_range=0.25,
)
SCHEDULE = dict(
    start=1,
    stages=[{"end": 2, "budget": 12, "prune_to": 16}, {"end": 4, "budget": 8}],
    proxy={"channels": 12, "rank": 4},
)
# The same where skipped tokens are updated and more of them cached: with proxies, and without.
UPDATES = [{"attention_rank": 4, "ffn_rank": 0}, {"attention_rank": 2, "ffn_rank": 3}] * 2
UPDATING = {**SCHEDULE, "update": UPDATES, "kv": 0.6}
BARE = {**SCHEDULE, "proxy": None, "ffn_selection": "attention", "update": UPDATES[1], "kv": 1.0, "probe": {"rank": 2}}
FAMILIES = {
    "deepseek_v2": (DeepseekV2Config, SptsDeepseekV2Config, SptsDeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, SptsDeepseekV3Config, SptsDeepseekV3ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, SptsGemma3Config, SptsGemma3ForCausalLM),
    "llama": (LlamaConfig, SptsLlamaConfig, SptsLlamaForCausalLM),
    "ministral": (MinistralConfig, SptsMinistralConfig, SptsMinistralForCausalLM),
    "mistral": (MistralConfig, SptsMistralConfig, SptsMistralForCausalLM),
    "mixtral": (MixtralConfig, SptsMixtralConfig, SptsMixtralForCausalLM),
    "olmo2": (Olmo2Config, SptsOlmo2Config, SptsOlmo2ForCausalLM),
    "phi3": (Phi3Config, SptsPhi3Config, SptsPhi3ForCausalLM),
    "qwen2": (Qwen2Config, SptsQwen2Config, SptsQwen2ForCausalLM),
    "qwen3": (Qwen3Config, SptsQwen3Config, SptsQwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, SptsQwen3MoeConfig, SptsQwen3MoeForCausalLM),
}
FULL, SLIDING = "full_attention", "sliding_attention"
# DeepSeek's latent attention, and experts in groups beside a shared one.
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "experts_implementation": "eager",
}
# What a family's tiny model has beside the common sizes: what makes it different, at its smallest.
SPECIAL = {
    "deepseek_v2": {
        **LATENT,
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**LATENT, "q_lora_rank": 12, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
        "sliding_window": 10,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "final_logit_softcapping": 5.0,
    },
    "ministral": {
        "head_dim": 16,
        "layer_types": [FULL, SLIDING, FULL, FULL, SLIDING],
        "sliding_window": 10,
    },
    "mistral": {"sliding_window": None, "head_dim": 16},
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "sliding_window": 4096,  # longer than the context, so none
    },
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "experts_implementation": "eager",
    },
}


def sizes(family: str, changes: dict) -> dict:
    return {**SIZES, **SPECIAL.get(family, {}), **changes}


def tiny_config(family: str, **changes):
    """Stock configuration of a tiny model."""
    return FAMILIES[family][0](**sizes(family, changes))


def tiny_model(family: str = "llama", schedule: dict | None = None, seed: int = 0, **changes):
    """A tiny skipping model with random weights and biases, in evaluation mode."""
    torch.manual_seed(seed)
    _, config_class, model_class = FAMILIES[family]
    config = config_class(**sizes(family, changes), spts=schedule or SCHEDULE)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            if "norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
        bias_routers(model)
    return model


def shallow_model(family: str, schedule: dict = SCHEDULE, **changes):
    """One of three layers, each of which torch.compile traces by itself."""
    schedule = {**schedule, "stages": [{"end": 1, "budget": 12, "prune_to": 16}, {"end": 2, "budget": 8}]}
    if isinstance(schedule.get("update"), list):
        schedule["update"] = schedule["update"][:2]
    if "layer_types" in SPECIAL.get(family, {}):
        changes["layer_types"] = SPECIAL[family]["layer_types"][:3]
    return tiny_model(family, schedule, num_hidden_layers=3, **changes)


def bias_routers(model):
    """Random biases for routers that have one, which change what is routed where."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)


def stock_twin(model):
    """The stock model with the same weights."""
    family = model.config.model_type.removeprefix("spts_")
    settings = {
        k: v for k, v in model.config.to_dict().items() if k not in ("spts", "model_type", "architectures", "auto_map")
    }
    config = FAMILIES[family][0](**settings)
    stock_class = FAMILIES[family][2].__bases__[1]
    stock = stock_class(config).eval()
    if experts := model.config._experts_implementation:
        stock.set_experts_implementation(experts)
    own = stock.state_dict().keys()  # without what skipping adds
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    return stock.to(model.dtype)


TEXT = (
    "The quick brown fox jumps over the lazy dog near the river bank while seven wise owls watch from an old oak tree. "
)


def tiny_tokenizer(vocab_size: int = 300):
    """A byte-level tokenizer with a chat template, trained on one sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    return tokenizer


def tiny_base(folder, family: str = "llama", shards: bool = False, **changes):
    """A stock checkpoint with a tokenizer in `folder`."""
    torch.manual_seed(0)
    stock_class = FAMILIES[family][2].__bases__[1]
    config = tiny_config(family, **{"vocab_size": 300, "max_position_embeddings": 2048, **changes})
    stock = stock_class(config)
    bias_routers(stock)
    stock.to(torch.bfloat16)
    stock.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_updates(family, schedule, context, counts):
    """A tiny model of so much context whose updates are fitted, the `counts` of prompts of 64 tokens to fit on and held
    out, and what was said of the fit."""
    model = tiny_model(family, schedule, max_position_embeddings=context)
    model.load_state_dict({**model.state_dict(), **blank(model.config.schedule(), model.config, torch.float32)})
    generator = torch.Generator().manual_seed(3)
    fit, held_out = (list(torch.randint(3, 97, (count, 64), generator=generator)) for count in counts)
    return model, fit, held_out, fit_updates(model, fit, held_out, 64)
