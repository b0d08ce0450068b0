"""Where transformers replaces or ignores a cache that it was given: the table in docs/generate.md, row by row."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    SpeechT5Config,
    SpeechT5ForTextToSpeech,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    WhisperForCausalLM,
)

import logquant
from logquant import LogQuantCache
from logquant.cache.layer import LogQuantLayer
from logquant.compat import CACHE, as_argument
from tests.helpers.masks import pad_mask
from tests.helpers.models import t5, tiny_model, whisper

pytestmark = pytest.mark.usefixtures("one_thread")

SWITCH = 60
"""Tokens after which the tiny models of :func:`switching` rotate in another way."""


def switching(family: str) -> Any:
    """A model whose longer texts are rotated in another way."""
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": SWITCH,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.2,
            "original_max_position_embeddings": SWITCH,
            "factor": 4.0,
        },
    }
    torch.manual_seed(0)
    if family == "phi3":
        return Phi3ForCausalLM(Phi3Config(**settings)).eval()
    if family == "phimoe":
        return PhimoeForCausalLM(PhimoeConfig(**settings, num_local_experts=2, num_experts_per_tok=1)).eval()
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = small | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "crop_size": 28}
    audio = small | {"num_blocks": 1, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32}
    audio |= {"nemo_conv_channels": 32, "input_size": 16, "time_reduction": 4}
    return Phi4MultimodalForCausalLM(Phi4MultimodalConfig(**settings, vision_config=vision, audio_config=audio)).eval()


SWITCHING = ["phi3", "phimoe", "phi4_multimodal"]


@pytest.fixture(scope="module", params=SWITCHING)
def model(request) -> Any:
    return switching(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 256, (2, 120), generator=torch.Generator().manual_seed(0))


def generated(model: Any, ids: Tensor, cache: Any = None, **options: Any) -> Any:
    defaults = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    options = {"attention_mask": torch.ones_like(ids)} | defaults | options
    return model.generate(ids, **as_argument(cache), **options)


def cache_in(output: Any) -> Any:
    return getattr(output, CACHE)


def warned(call: Any) -> tuple[Any, list[str]]:
    """What a call returns, and its warnings about a cache that is left."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if "leaves this LogQuantCache" in str(w.message)]


# ---------------------------------------------------------------------------------------- Phi-3: the rotary switch
def check_refilled(model: Any, prompt: Tensor, given: bool, reference: dict[str, Any], **options: Any) -> None:
    """An enabled model has a LogQuant cache with all tokens at the end, and writes what it does with ``reference``."""
    want = generated(model, prompt, **options | reference).sequences
    cache = LogQuantCache(model.config, window=512) if given else None
    logquant.enable(model, window=512)
    try:
        got, left = warned(lambda: generated(model, prompt, cache, **options))
    finally:
        logquant.disable(model)
    assert torch.equal(got.sequences, want) and not left
    assert type(cache_in(got)) is LogQuantCache and cache_in(got).get_seq_length() == want.shape[1] - 1 > SWITCH
    assert cache is None or cache_in(got) is cache


@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
@pytest.mark.parametrize("padded", [False, True])
def test_an_enabled_model_fills_the_cache_again_where_rotation_changes(model, ids, padded, given):
    """As without a cache: with a DynamicCache transformers' Phi-4-multimodal forgets its text there."""
    mask = pad_mask([50, 31], "left") if padded else torch.ones(2, 50, dtype=torch.long)
    check_refilled(model, ids[:, :50], given, {"use_cache": False}, attention_mask=mask)


@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=["beams", "drafts"])
@pytest.mark.parametrize("family", SWITCHING[:2])
def test_beams_and_drafts_are_filled_again_where_rotation_changes(family, ids, options, given):
    prompt = ids[:, :50] if "num_beams" in options else ids[:1, :10].repeat(1, 5)
    check_refilled(switching(family), prompt, given, {}, **options)


@pytest.mark.parametrize("rule", ["log", "attention"])
def test_packed_tokens_are_packed_again(ids, rule):
    model = switching("phi3")
    logquant.enable(model, window=32, rule=rule)
    prompt = ids[:, :50]
    out = generated(model, prompt, max_new_tokens=100)
    cache, text = cache_in(out), out.sequences[:, :-1]
    fresh = LogQuantCache(model.config, window=32, rule=rule)
    with torch.no_grad():
        model(text, **as_argument(fresh))
    cache.commit()  # sums of attention that wait with the last token
    # Positions of exact tokens are written down where tokens move.
    later = [layer.rows.length - layer.held.chosen.since.length for layer in cache.layers if layer.held.chosen]
    unwritten = 4 * len(ids) * sum(later)
    assert cache.get_seq_length() == fresh.get_seq_length() and cache.nbytes + unwritten == fresh.nbytes
    assert cache.layers[0].rows.packed == fresh.layers[0].rows.packed > 0


def test_a_given_cache_that_a_model_leaves_is_told_of(model, ids):
    cache = LogQuantCache(model.config)
    out, left = warned(lambda: generated(model, ids[:, :50], cache))
    assert type(cache_in(out)) is DynamicCache and cache.get_seq_length() == SWITCH
    assert len(left) == 1 and "with 60 tokens" in left[0] and "logquant.enable(model)" in left[0]


def test_a_given_cache_that_a_model_leaves_between_two_turns_is_told_of(model, ids):
    cache = LogQuantCache(model.config)
    first, left = warned(lambda: generated(model, ids[:, :20], cache))
    assert not left, "nothing is said while the cache is used"
    _, left = warned(lambda: generated(model, torch.cat([first.sequences, ids[:, :40]], 1), cache))
    assert len(left) == 1 and "with 43 tokens" in left[0]


def test_an_empty_cache_takes_a_prompt_that_is_longer_than_the_switch(model, ids):
    cache = LogQuantCache(model.config, window=512)
    assert not cache
    got, left = warned(lambda: generated(model, ids, cache))
    assert cache_in(got) is cache and cache.get_seq_length() == 143 and not left and cache
    assert torch.equal(got.sequences, generated(model, ids, use_cache=False).sequences)


def test_other_models_are_not_suspected(ids):
    model = tiny_model()
    cache = LogQuantCache(model.config)
    for _ in range(2):
        _, left = warned(lambda: generated(model, ids, cache))
        assert not left and (not cache or cache.get_seq_length() > 0)


# ------------------------------------------------------------------------------------- self-attention and the other
def in_two_parts(cache: LogQuantCache) -> EncoderDecoderCache:
    return EncoderDecoderCache(cache, DynamicCache(config=cache.config))


@pytest.mark.parametrize("make", [whisper, t5])
def test_a_bare_cache_for_an_encoder_decoder(make):
    """Whisper would throw it away, others would append the encoder's tokens at every step."""
    model, inputs = make()
    options = {**inputs, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    want = model.generate(**options)
    with pytest.raises(ValueError, match=r"give EncoderDecoderCache\(cache, DynamicCache"):
        model.generate(**options, **as_argument(LogQuantCache(model.config)))
    for enabled in (False, True):
        cache = LogQuantCache(model.config)
        if enabled:
            logquant.enable(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            got = model.generate(**options, **as_argument(cache if enabled else in_two_parts(cache)))
        assert torch.equal(got, want) and cache.get_seq_length() == 20


def test_a_decoder_of_whisper_alone():
    """It throws away a cache of one part; an enabled one gets two."""
    whole, inputs = whisper(encoder_layers=2)
    model = WhisperForCausalLM(copy.deepcopy(whole.config)).eval()
    with torch.no_grad():
        encoded = whole.get_encoder()(**inputs)
    ids = torch.tensor([[0, 5], [0, 6]])
    own = LogQuantCache(model.config)
    want = generated(model, ids, own, encoder_outputs=encoded)
    assert own.get_seq_length() == 0 and type(cache_in(want).self_attention_cache) is DynamicCache
    logquant.enable(model)
    for cache in (None, LogQuantCache(model.config)):
        got = generated(model, ids, cache, encoder_outputs=encoded)
        assert torch.equal(got.sequences, want.sequences)
        kept = cache_in(got).self_attention_cache
        assert type(kept) is LogQuantCache and kept.get_seq_length() == 25 and (cache is None or kept is cache)


def test_whisper_returns_tensors_that_were_dequantised():
    model, inputs = whisper()
    logquant.enable(model)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert type(cache_in(out).self_attention_cache) is DynamicCache


def test_t5gemma_has_a_cross_attention_of_its_own():
    layers = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    part = sizes | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24, "vocab_size": 256}
    part["layer_types"] = layers
    torch.manual_seed(0)
    config = T5GemmaConfig(encoder=dict(part), decoder=dict(part), vocab_size=256)
    model = T5GemmaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 255, (2, 60), generator=torch.Generator().manual_seed(0))
    want = generated(model, ids)
    logquant.enable(model)
    got = generated(model, ids)
    assert torch.equal(got.sequences, want.sequences)
    own, cross = cache_in(got).self_attention_cache, cache_in(got).cross_attention_cache
    assert [type(layer) is LogQuantLayer for layer in own.layers] == [False, True]
    assert [layer.get_seq_length() for layer in cross.layers] == [60, 60], "all of the encoder's tokens"


def test_gpt2_with_cross_attention_keeps_the_cache_in_a_pair():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
    model = GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True, bos_token_id=None, eos_token_id=None)).eval()
    ids = torch.randint(3, 255, (2, 60), generator=torch.Generator().manual_seed(0))
    other = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(0))
    want = generated(model, ids, encoder_hidden_states=other)
    cache = LogQuantCache(model.config)
    got = generated(model, ids, cache, encoder_hidden_states=other)
    assert cache_in(got).self_attention_cache is cache and cache.get_seq_length() == 83
    assert torch.equal(got.sequences, want.sequences)


# ------------------------------------------------------------------------------------------------ caches not in use
def test_without_use_cache_a_given_cache_gets_the_whole_text_at_every_step(ids):
    """As a DynamicCache does."""
    model = tiny_model()
    lengths = []
    for cache in (LogQuantCache(model.config), DynamicCache(config=model.config)):
        generated(model, ids[:, :50], cache, use_cache=False, max_new_tokens=3)
        lengths.append(cache.get_seq_length())
    assert lengths == [50 + 51 + 52] * 2


def test_gradient_checkpointing_uses_no_cache(ids):
    """transformers says so itself."""
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    cache = LogQuantCache(model.config)
    model(ids, **as_argument(cache), use_cache=True)
    assert cache.get_seq_length() == 0


def test_a_generate_of_its_own_is_refused():
    sizes = {"hidden_size": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "speech_decoder_prenet_units": 32}
    model = SpeechT5ForTextToSpeech(SpeechT5Config(**sizes, **heads, speech_decoder_postnet_units=32))
    assert model.can_generate()
    with pytest.raises(TypeError, match="that generates, got SpeechT5ForTextToSpeech"):
        logquant.enable(model)
