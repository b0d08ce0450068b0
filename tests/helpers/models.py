"""Models with random weights: a small Llama with a tokenizer of single bytes, and one of each family; running them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from logquant.compat import as_argument

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def tiny_config(**changes: object) -> LlamaConfig:
    settings = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
        "bos_token_id": None,
        # Weights of 0.02 would give the same prediction everywhere.
        "initializer_range": 0.2,
    }
    return LlamaConfig(**settings | changes)


def tiny_model(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**changes)).eval()


def save_tiny_model(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    tiny_model().save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = chat_template
    fast.save_pretrained(path)
    return path


FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {
        "attn_logit_softcapping": 5.0,
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "initializer_range": 0.3,
    },
    # Both experts take part: a choice of one would change with the smallest difference.
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 24, "initializer_range": 0.3},
    "gpt_neox": {},
    "phi3": {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 192, "head_dim": 96},
    "gemma3_text": {
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "initializer_range": 0.3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "deepseek_v3": {
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
    },
}


def family_config(family: str) -> PreTrainedConfig:
    """A model of three layers of a family that transformers knows."""
    base = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(family, **base | FAMILIES[family])


def whisper(encoder_layers: int = 1) -> tuple[WhisperForConditionalGeneration, dict[str, Tensor]]:
    """And its inputs."""
    config = WhisperConfig(
        vocab_size=256,
        d_model=64,
        encoder_layers=encoder_layers,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=400,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    return model, {"input_features": torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))}


def t5() -> tuple[T5ForConditionalGeneration, dict[str, Tensor]]:
    """And its inputs."""
    config = T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    return model, {"input_ids": torch.randint(3, 255, (2, 40), generator=torch.Generator().manual_seed(0))}


def logits_of(
    model, cache, ids: Tensor, portions: list[int], implementation: str, mask: Tensor | None = None
) -> Tensor:
    """Logits of all tokens, fed in portions."""
    supported = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        if model.config._attn_implementation != implementation:
            pytest.fail(f"the model has no {implementation} attention")
        out, first = [], 0
        with torch.no_grad():
            for n in portions:
                part = None if mask is None else mask[:, : first + n]
                out.append(model(ids[:, first : first + n], attention_mask=part, **as_argument(cache)).logits)
                first += n
        return torch.cat(out, 1)
    finally:
        model.set_attn_implementation(supported)


def generate(model, ids: Tensor, cache, **options) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    options = {"max_new_tokens": 40, "do_sample": False} | options
    return model.generate(ids, attention_mask=mask, **as_argument(cache), **options)
