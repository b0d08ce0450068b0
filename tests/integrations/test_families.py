"""Models that need more than a config of their own: encoder-decoders, vision, shared keys and values, Falcon.

Decoder families are in tests/cache/test_cache.py.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import logquant
from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.handle import KVHandle
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from tests.helpers.models import family_config, logits_of, t5, whisper


@pytest.fixture
def ids():
    return torch.randint(3, 255, (2, 300), generator=torch.Generator().manual_seed(0))


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().mean() < 5e-3 * want.abs().mean())


# ------------------------------------------------------------------------------------------------------ one key head
def test_falcon_whose_one_key_head_sdpa_broadcasts(ids):
    """It cannot change its attention after loading; sdpa takes the fused path."""
    config = FalconConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True, alibi=False
    )
    torch.manual_seed(0)
    model, eager = (
        FalconForCausalLM._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        for implementation in ("sdpa", "eager")
    )
    eager.load_state_dict(model.state_dict())
    outputs = []
    for m in (model, eager):
        # Plain pages, which are the same whatever the attention tells of its queries.
        cache = LogQuantCache(config, LogQuantConfig.paper(window=32))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error" if m is model else "ignore", RuntimeWarning)
            out = [m(ids[:, :200], **as_argument(cache)).logits]
            out += [m(ids[:, i : i + 1], **as_argument(cache)).logits for i in range(200, 240)]
        outputs.append(torch.cat(out, 1))
    assert cache.layers[0].rows.packed > 0 and cache.layers[0].held.storage.pages.shape[1] == 1
    assert (outputs[0] - outputs[1]).abs().max() < 3e-3 * outputs[1].abs().max()


# -------------------------------------------------------------------------------------------------- encoder-decoders
@pytest.mark.parametrize("make", [whisper, t5])
def test_encoder_decoders_keep_their_own_tokens_in_it(make, ids):
    """The cross-attention's keys and values never grow, and stay in a DynamicCache."""
    model, inputs = make()
    results = []
    for own in (LogQuantCache(model.config, bits=8, window=32), DynamicCache(config=model.config)):
        cache = EncoderDecoderCache(own, DynamicCache(config=model.config))
        out = []
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for part in (slice(0, 150), *(slice(i, i + 1) for i in range(150, 200))):
                out.append(model(**inputs, decoder_input_ids=ids[:, part], **as_argument(cache)).logits)
        results.append(torch.cat(out, 1))
        cache.crop(-10)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([0]))
        assert cache.get_seq_length() == 190
    assert close(*results)
    assert not torch.equal(*results), "something was quantised"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_whisper_and_t5_generate_with_it_enabled(options):
    for make in (whisper, t5):
        model, inputs = make()
        results = []
        for enabled in (False, True):
            if enabled:
                logquant.enable(model, bits=8)
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                results.append(model.generate(**inputs, max_new_tokens=60, min_new_tokens=60, **options))
        assert torch.equal(*results), "nothing is packed yet"


# --------------------------------------------------------------------------------------------------- vision and text
def test_a_vision_language_model_answers_from_its_image_in_the_cache():
    text = family_config("llama")
    config = LlavaConfig(
        text_config=text,
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 60,
            "patch_size": 5,
            "projection_dim": 32,
        },
        image_token_id=255,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    image = torch.randn(1, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    words = torch.randint(3, 255, (1, 100), generator=torch.Generator().manual_seed(0))
    prompt = torch.cat([words[:, :50], torch.full((1, 144), 255), words[:, 50:]], 1)
    results = []
    for cache in (LogQuantCache(config, bits=8), DynamicCache(config=config)):
        out = []
        with torch.no_grad():
            out.append(model(input_ids=prompt, pixel_values=image, **as_argument(cache)).logits)
            out += [model(input_ids=words[:, i : i + 1], **as_argument(cache)).logits for i in range(20)]
        results.append(torch.cat(out, 1))
    assert close(*results)


# ---------------------------------------------------------------------------------------- layers that share a cache
def test_layers_that_attend_to_another_layers_keys(ids):
    """Gemma 3n: the last layers have no keys and values of their own; handles serve more than one attention call."""
    config = Gemma3nTextConfig(
        vocab_size=256,
        vocab_size_per_layer_input=256,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=96,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(config).eval()
    portions = [150] + [1] * 60 + [40] + [1] * 5
    want = logits_of(model, DynamicCache(config=config), ids, portions, "eager")
    for implementation in ("logquant", "sdpa"):
        cache = LogQuantCache(config, bits=8, window=32)
        got = logits_of(model, cache, ids, portions, implementation)
        assert [type(layer) is LogQuantLayer for layer in cache.layers].count(True) == 1
        assert close(got, want), implementation


# ------------------------------------------------------------------------------------------------------- the handles
def test_whatever_touches_a_handle_gets_a_tensor(ids):
    k = torch.randn(1, 2, 300, 16)
    layer = LogQuantLayer(LogQuantCache(family_config("llama"), bits=8).quantization)
    layer.update(k[:, :, :299], k[:, :, :299])
    keys, values = layer.update(k[:, :, 299:], k[:, :, 299:])
    repeated = keys[:, :, None, :, :].expand(1, 2, 3, 300, 16).reshape(1, 6, 300, 16)
    assert isinstance(repeated, KVHandle) and repeated.contiguous() is repeated and repeated.shape == (1, 6, 300, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        dense = keys + 0
        assert type(dense) is Tensor and torch.equal(repeated * 1, dense.repeat_interleave(3, 1))
        half = keys[:, :, None, :, :].expand(1, 2, 3, 300, 16)
        assert torch.equal(half + 0, dense.unsqueeze(2).expand(1, 2, 3, 300, 16))
        assert torch.equal(torch.cat([values, k], 2)[:, :, :300], values + 0)
        assert torch.equal(keys[:, :1] + 0, dense[:, :1])
