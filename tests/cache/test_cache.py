"""LogQuantCache in tiny models of transformers: the rule, the three ways to attend, generation, errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention import handle, view
from logquant.attention.call import AttentionCall
from logquant.attention.handle import KVHandle
from logquant.cache.layer import LogQuantLayer
from logquant.cache.sizes import head_nbytes
from logquant.compat import as_argument
from logquant.ops import reference
from logquant.rule import COUNTED, split_positions
from tests.helpers.layers import PLAIN, contents, feed, make_layer, random_tokens
from tests.helpers.models import FAMILIES, family_config, generate, logits_of

IMPLEMENTATIONS = ["logquant", "sdpa", "eager"]


# ------------------------------------------------------------------------------------------------------ the layer
@pytest.mark.parametrize("window", [32, 64, 128])
@pytest.mark.parametrize("rule", COUNTED)
@pytest.mark.parametrize("tokens", [100, 385, 2000])
def test_prefill_and_single_steps_give_the_same_state(window, rule, tokens):
    k, v = random_tokens(tokens)
    whole, single, mixed = (make_layer(window=window, rule=rule) for _ in range(3))
    feed(whole, k, v, [tokens])
    feed(single, k, v, [1] * tokens)
    feed(mixed, k, v, [37, 1, 1, tokens // 2, 5, tokens - 44 - tokens // 2])
    packed, exact = split_positions(tokens, window, rule, whole.config.sinks)
    fmt = whole.format
    expected = reference.quantize(k, v, fmt, index=packed[None]), k[:, :, exact.long()], v[:, :, exact.long()]
    for layer in (whole, single, mixed):
        layer.commit()
        assert layer.held.layout.positions(k.device)[0].tolist() == packed.tolist() + exact.tolist()
        for got, want in zip(contents(layer), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"rule": "recent"}, {"window": 128, "key_bits": 4}], ids=str)
def test_bytes_are_those_of_the_formula(options):
    layer = make_layer(**options)
    k, v = random_tokens(8000, heads=3, dim=64, value_dim=32)
    layer.update(k.bfloat16(), v.bfloat16())
    layer.commit()
    assert layer.nbytes == 3 * head_nbytes(layer.config, 8000, 64, 32, itemsize=2)
    assert layer.full_precision_nbytes == 3 * 8000 * (64 + 32) * 2


def test_page_store_grows_by_at_most_one_page_in_32():
    layer = make_layer()
    k, v = random_tokens(6000)
    layer.update(k[:, :, :3000], v[:, :, :3000])
    for t in range(3000, 6000):
        layer.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
        layer.commit()
        used = layer.rows.packed // layer.format.page_tokens
        assert layer.held.storage.pages.shape[2] <= used + max(1, used // 32)


def test_first_prompt_attends_to_itself_exactly():
    k, v = random_tokens(1000)
    keys, values = make_layer().update(k, v)
    assert keys.dense() is k and values.dense() is v


@pytest.mark.parametrize("portions", [[300, 1], [300, 40], [300, 300], [100, 91, 1]], ids=str)
def test_handles_stand_for_all_tokens_in_logical_order(portions):
    k, v = random_tokens(sum(portions))
    layer = make_layer(bits=8)
    feed(layer, k, v, portions[:-1])
    start = sum(portions[:-1])
    keys, values = layer.update(k[:, :, start:], v[:, :, start:])
    assert isinstance(keys, KVHandle) and keys.shape == k.shape and values.shape == v.shape
    assert keys.dtype == k.dtype and keys.device == k.device
    assert (keys.kv_view.dense()[0] - k).abs().max() < 0.05
    assert torch.equal(keys.kv_view.dense()[1][:, :, -portions[-1] :], v[:, :, -portions[-1] :]), "new tokens are exact"
    if portions[-1] > 1:
        exact = split_positions(start, 64, "log", layer.config.sinks)[1].long()
        assert torch.equal(keys.kv_view.dense()[0][:, :, exact], k[:, :, exact]), "what was exact still is, this once"


@pytest.mark.parametrize(
    "options",
    [{}, {"rule": "log"}, {"prune": "keydiff"}, {"recall": "means"}, {"rule": "recent", "evict": "corm(window=128)"}],
    ids=str,
)
def test_no_new_tokens_are_attended_to(options):
    """Some engines call a layer with none."""
    layer = LogQuantLayer(LogQuantConfig(**options))
    q, k, v = (torch.randn(1, n, 600, 64) for n in (4, 2, 2))
    with torch.no_grad():
        keys, _ = layer.update(k, v)
        keys.kv_view.attend(AttentionCall(q, None, 0.2, causal=True))
        keys, _ = layer.update(k[:, :, :0], v[:, :, :0])
        for causal in (False, True):
            assert keys.kv_view.compute(AttentionCall(q[:, :, :0], None, 0.2, causal=causal)).shape == (1, 4, 0, 64)


def test_a_stale_handle_refuses():
    k, v = random_tokens(302)
    layer = make_layer()
    layer.update(k[:, :, :300], v[:, :, :300])
    keys, _ = layer.update(k[:, :, 300:301], v[:, :, 300:301])
    layer.update(k[:, :, 301:], v[:, :, 301:])
    with pytest.raises(RuntimeError, match="stale: their LogQuant cache layer was updated since"):
        keys.kv_view.attend(AttentionCall(torch.zeros(1, 2, 1, 64), None, 1.0))


BAD_UPDATES = [
    (lambda k, v: (k.double(), v.double()), TypeError, "key_states must be float32, float16 or bfloat16, got torch.fl"),
    (lambda k, v: (k, v.int()), TypeError, "value_states must be float32, float16 or bfloat16, got torch.int32"),
    (lambda k, v: (k, v.to("meta")), ValueError, "value_states must be on the device of key_states, got meta and cpu"),
    (lambda k, v: (k.to("meta"), v.to("meta")), ValueError, "key_states must stay on cpu, got meta"),
    (lambda k, v: (k[0], v[0]), ValueError, r"must be \[batch, heads, tokens, dim\] and agree"),
    (lambda k, v: (k, v[:, :, :0]), ValueError, "agree in all but dim"),
    (lambda k, v: (k[:, :1], v[:, :1]), ValueError, r"key_states must be \[1, 2, tokens, 64\] .* got \[1, 1, 1, 64\]"),
    (lambda k, v: (k[..., :32], v), ValueError, r"key_states must be \[1, 2, tokens, 64\] .* got \[1, 2, 1, 32\]"),
    (lambda k, v: (k, v[..., :32]), ValueError, r"value_states must be \[1, 2, tokens, 64\]"),
    (lambda k, v: (k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), ValueError, r"key_states must be \[1, 2, tokens, 64\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_UPDATES, ids=[m[:30] for _, _, m in BAD_UPDATES])
def test_a_bad_update_changes_nothing(change, error, message):
    k, v = random_tokens(301)
    layer = make_layer()
    layer.update(k[:, :, :300], v[:, :, :300])
    before = [t.clone() for t in contents(layer)]
    with pytest.raises(error, match=message):
        layer.update(*change(k[:, :, 300:], v[:, :, 300:]))
    assert layer.get_seq_length() == 300
    for got, want in zip(contents(layer), before, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=3), "bits must be 2, 4 or 8, got 3"),
        (dict(bits=True), "bits must be 2, 4 or 8, got True"),
        (dict(key_bits=16), "key_bits must be 2, 4 or 8, got 16"),
        (dict(value_bits="2"), "value_bits must be 2, 4 or 8, got '2'"),
        (dict(window=0), "window must be a positive whole number, got 0"),
        (dict(window=64.0), "window must be a positive whole number, got 64.0"),
        (dict(window=48), r"window must be a multiple of page_tokens \(32\), got 48"),
        (dict(window=64, page_tokens=128), r"window must be a multiple of page_tokens \(128\), got 64"),
        (dict(page_tokens=16), "page_tokens must be 32, 64 or 128, got 16"),
        (dict(value_group=20), "value_group must be a positive multiple of 16, got 20"),
        (dict(rule="newest"), "rule must be 'attention' or 'log' or 'recent', got 'newest'"),
        (dict(sinks=-1), "sinks must be a whole number of tokens, 0 or more, got -1"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        LogQuantConfig(**options)


def test_bad_cache_arguments():
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=40, num_hidden_layers=1)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 up to 1024, got 40"):
        LogQuantCache(config)
    with pytest.raises(TypeError, match="give either quantization or its fields, got both: bits"):
        LogQuantCache(LlamaConfig(), LogQuantConfig(), bits=4)
    with pytest.raises(TypeError, match=r"config must be the model's configuration \(model.config\), got LlamaFor"):
        LogQuantCache(LlamaForCausalLM(family_config("llama")))
    with pytest.raises(TypeError, match="unexpected keyword argument 'bit'"):
        LogQuantCache(LlamaConfig(), bit=4)


# ----------------------------------------------------------------------------------------------------- tiny models
# What takes the fused path: transformers' "sdpa" refuses softcaps and drops attention sinks.
FUSED = {"gemma2": ["logquant"], "gpt_oss": ["logquant"]}


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family_config(request.param)).eval()


PORTIONS = [[150] + [1] * 60, [30, 100, 5, 7, 90] + [1] * 20, [130] + [8] * 12]


@pytest.mark.parametrize("portions", PORTIONS, ids=["prompt+steps", "turns", "chunks"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_every_family_attends_alike_through_every_implementation(any_model, ids, portions, padded):
    """The fused path against dequantising and eager attention, which needs nothing of ours."""
    family = any_model.config.model_type
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
    options = {"window": 32} | PLAIN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        cache = LogQuantCache(any_model.config, **options)
        cache.set_padding(mask)
        want = logits_of(any_model, cache, ids, portions, "eager", mask)
    for implementation in FUSED.get(family, ["logquant", "sdpa"]):
        cache = LogQuantCache(any_model.config, **options)
        if family == "deepseek_v3":  # caches what it makes keys and values from: attention gets plain tensors
            cache.set_padding(mask)
        got = logits_of(any_model, cache, ids, portions, implementation, mask)
        difference = (got - want).abs()
        if padded:
            difference[1, :5] = 0  # what padding itself attends to means nothing
        assert difference.max() < 3e-3 * want.abs().max(), implementation


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_a_long_chunk_attends_through_the_operator_as_it_does_dequantised(llama, ids, padded, monkeypatch):
    """As on a GPU, whose kernels take chunks of any length."""
    mask = torch.ones_like(ids)
    mask[1, : 5 * padded] = 0
    logits = []
    for most in (view.MAX_FUSED_QUERIES, 1000):
        monkeypatch.setattr(view, "MAX_FUSED_QUERIES", most)
        logits.append(logits_of(llama, LogQuantCache(llama.config, window=32), ids, PORTIONS[1], "logquant", mask))
    difference = (logits[0] - logits[1]).abs()
    difference[1, : 5 * padded] = 0
    assert difference.max() < 3e-3 * logits[0].abs().max()


@pytest.mark.parametrize("portions", PORTIONS, ids=["prompt+steps", "turns", "chunks"])
def test_eight_bits_are_close_to_a_full_cache(any_model, ids, portions):
    want = logits_of(any_model, DynamicCache(config=any_model.config), ids, portions, "eager")
    cache = LogQuantCache(any_model.config, bits=8, window=32)
    got = logits_of(any_model, cache, ids, portions, "logquant")
    # The mean, for a router (gpt-oss) may send a token to another expert on the smallest difference.
    assert (got - want).abs().mean() < 5e-3 * want.abs().mean()


def test_layers_without_full_attention_stay_what_transformers_makes_them():
    kinds = {
        family: [type(layer).__name__ for layer in LogQuantCache(family_config(family)).layers]
        for family in ("llama", "mistral", "gemma2")
    }
    assert kinds == {
        "llama": ["LogQuantLayer"] * 3,
        "mistral": ["DynamicSlidingWindowLayer"] * 3,
        "gemma2": ["DynamicSlidingWindowLayer", "LogQuantLayer", "DynamicSlidingWindowLayer"],
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_greedy_while_nothing_is_packed_is_that_of_a_full_cache(llama, ids, implementation):
    llama.set_attn_implementation(implementation)
    want = generate(llama, ids[:, :100], DynamicCache(config=llama.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = generate(llama, ids[:, :100], LogQuantCache(llama.config))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 70}, {"do_sample": True, "temperature": 0.8, "top_k": 20}, {"repetition_penalty": 1.3}],
    ids=["greedy", "chunked prefill", "sampling", "penalty"],
)
def test_generate_gives_the_same_through_sdpa_and_fused(llama, ids, options):
    results = []
    for implementation in ("logquant", "sdpa"):
        llama.set_attn_implementation(implementation)
        torch.manual_seed(0)
        results.append(generate(llama, ids[:, :300], LogQuantCache(llama.config, window=32), **options))
    assert torch.equal(*results)


def test_rows_of_a_batch_are_independent(llama, ids):
    together = generate(llama, ids[:, :200], LogQuantCache(llama.config, window=32))
    alone = [generate(llama, row[None], LogQuantCache(llama.config, window=32)) for row in ids[:, :200]]
    assert torch.equal(together, torch.cat(alone))


def test_multi_turn_continues_the_cache(llama, ids):
    cache = LogQuantCache(llama.config, window=32, rule="log")
    first = generate(llama, ids[:, :200], cache)
    turn = torch.cat([first, ids[:, 200:260]], 1)
    second = generate(llama, turn, cache)
    assert cache.get_seq_length() == second.shape[1] - 1
    fresh = LogQuantCache(llama.config, window=32, rule="log")
    logits_of(llama, fresh, turn, [turn.shape[1]], "sdpa")
    for layer, want in zip(cache.layers, fresh.layers, strict=True):
        positions = layer.held.layout.positions(ids.device)[0][: want.rows.packed]
        assert torch.equal(positions, want.held.layout.positions(ids.device)[0][: want.rows.packed])


def test_batch_operations_move_whole_rows():
    k, v = random_tokens(400, batch=3)
    layer = make_layer()
    layer.update(k, v)
    before = contents(layer)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert all(torch.equal(a, b[[2, 0, 0]]) for a, b in zip(contents(layer), before, strict=True))
    layer.batch_select_indices(torch.tensor([1, 0]))
    assert layer.batch_size == 2
    assert all(torch.equal(a, b[[0, 2]]) for a, b in zip(contents(layer), before, strict=True))
    layer.batch_repeat_interleave(2)
    assert all(torch.equal(a, b[[0, 0, 2, 2]]) for a, b in zip(contents(layer), before, strict=True))


def test_deepcopy_is_independent(llama, ids):
    cache = LogQuantCache(llama.config, window=32)
    logits_of(llama, cache, ids[:1], [200], "sdpa")
    outputs = [generate(llama, ids[:1, :201], copy.deepcopy(cache)) for _ in range(2)]
    assert torch.equal(*outputs) and cache.get_seq_length() == 200


def test_reset_forgets(llama, ids):
    cache = LogQuantCache(llama.config, window=32)
    want = generate(llama, ids[:, :200], cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and not cache.is_initialized
    assert torch.equal(generate(llama, ids[:, :200], cache), want)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 4}, {"assistant_model": True, "num_assistant_tokens": 5}],
    ids=["prompt lookup", "assistant"],
)
def test_speculative_decoding_gives_the_tokens_of_plain_greedy(llama, ids, options):
    if "assistant_model" in options:
        torch.manual_seed(1)
        options = options | {"assistant_model": AutoModelForCausalLM.from_config(family_config("llama")).eval()}
    llama.set_attn_implementation("logquant")
    repetitive = ids[:1, :50].repeat(1, 5)
    want = generate(llama, repetitive, LogQuantCache(llama.config, bits=8, window=32), max_new_tokens=80)
    got = generate(llama, repetitive, LogQuantCache(llama.config, bits=8, window=32), max_new_tokens=80, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beam_search_gives_the_same_through_every_implementation(llama, ids, options):
    results = []
    for implementation in IMPLEMENTATIONS:
        llama.set_attn_implementation(implementation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            # Plain pages, which are the same whatever the attention tells of its queries.
            cache = LogQuantCache(llama.config, LogQuantConfig.paper(window=32))
            results.append(generate(llama, ids[:, :200], cache, **options))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_dequantising_at_every_step_warns_once(llama, ids):
    handle._warn_dense.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"is dequantised at every step.*set_attn_implementation\(\"logquant\"\)"
    ) as caught:
        logits_of(llama, LogQuantCache(llama.config), ids, [100, 1, 1, 1], "eager")
    assert len([w for w in caught if "dequantised" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for implementation in ("logquant", "sdpa"):
            logits_of(llama, LogQuantCache(llama.config), ids, [100, 1, 1, 1], implementation)


def test_memory_of_a_long_prompt_is_a_fifth_or_less(llama, ids):
    llama.set_attn_implementation("logquant")
    cache = LogQuantCache(llama.config)
    long = ids.repeat(1, 16)
    with torch.no_grad():
        llama.bfloat16()(long, **as_argument(cache), logits_to_keep=1)
    llama.float()
    assert cache.nbytes * 3 < cache.full_precision_nbytes
