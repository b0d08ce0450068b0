"""Baseline caches: each rule against a plain statement of it, each cache's bytes, and what they refuse."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

from logquant import LogQuantConfig
from logquant.compat import as_argument
from logquant.eval import evaluate
from logquant.methods import H2O, HQQ, KIVI, OSCAR, Partial, Quanto, Streaming, TurboQuant, quanto
from logquant.methods.layers.minmax import MinMax
from logquant.methods.oscar import rotation_for
from logquant.methods.registry import cache_nbytes, packed_bits_per_element, parse_cache, token_nbytes
from logquant.methods.streaming import rope_frequencies
from logquant.methods.turboquant import codebook, rotation
from logquant.rule import split_positions
from tests.helpers.models import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, HEADS, QUERY_HEADS, DIM = 2, 2, 4, 32
# A prompt, then steps and chunks.
ARRIVALS = [[10, *[1] * 30], [64, *[1] * 20], [65, *[1] * 40], [129, 7, 1, 40, *[1] * 5], [1] * 75, [200]]


def tokens_for(total, seed=0):
    """Keys and values of all tokens, and queries."""
    generator = torch.Generator().manual_seed(seed)
    make = [(BATCH, heads, total, DIM) for heads in (HEADS, HEADS, QUERY_HEADS)]
    return [torch.randn(shape, generator=generator) for shape in make]


def feed(layer, arrivals, seed=0):
    """Give a layer tokens as they arrive, and attend to it. Returns all keys and values, and the outputs."""
    keys, values, queries = tokens_for(sum(arrivals), seed)
    first, outputs = 0, []
    for new in arrivals:
        part = slice(first, first + new)
        seen_k, seen_v = layer.update(keys[:, :, part], values[:, :, part])
        # As transformers does: no mask for a step, none but is_causal for a prompt.
        mask = torch.ones(new, seen_k.shape[2], dtype=torch.bool).tril(seen_k.shape[2] - new)[None, None]
        how = {"is_causal": True} if first == 0 and new > 1 else {"attn_mask": mask if new > 1 else None}
        out = F.scaled_dot_product_attention(queries[:, :, part], seen_k, seen_v, enable_gqa=True, **how)
        outputs.append(out)
        first += new
    return keys, values, outputs


def exact_positions(dense, original):
    """Positions at which a cache gives back what it was given."""
    same = (dense == original).flatten(0, 1).all(-1)
    assert (same == same[0]).all()
    return same[0].nonzero().flatten().tolist()


def half(x):
    return torch.tensor(x).half().item()


def minmax(group, bits=2):
    """What a group of floats becomes, in plain Python."""
    low = half(min(group))
    scale = half((max(group) - min(group)) / (2**bits - 1))
    return [low + scale * min(max(round((x - low) / scale), 0), 2**bits - 1) for x in group]


# ------------------------------------------------------------------------------------------------------------- KIVI
def kivi_by_the_paper(arrivals, residual):
    """Exact keys and exact values, as positions: Algorithm 1 step by step."""
    keys, values, position = [], [], 0
    for new in arrivals:
        keys += range(position, position + new)
        values += range(position, position + new)
        position += new
        while len(keys) >= residual:
            keys = keys[residual:]
        while len(values) > residual:
            values = values[1:]
    return keys, values


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_kivi_quantises_keys_by_the_residual_and_values_one_by_one(arrivals):
    layer = KIVI(residual=64).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    seen_k, seen_v = layer.dense()
    assert (exact_positions(seen_k, keys), exact_positions(seen_v, values)) == kivi_by_the_paper(arrivals, 64)
    packed_k, packed_v = layer.packed_keys, layer.packed_values
    for channel in (0, DIM - 1):
        for group in range(0, packed_k, 32):
            stated = minmax(keys[1, 1, group : group + 32, channel].tolist())
            assert seen_k[1, 1, group : group + 32, channel].tolist() == pytest.approx(stated, abs=1e-5)
    for token in range(0, packed_v, 7):
        assert seen_v[1, 1, token].tolist() == pytest.approx(minmax(values[1, 1, token].tolist()), abs=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi_takes_two_more_halves_a_group(bits):
    layer = KIVI(bits=bits, residual=64).layer(tiny_config())
    feed(layer, [130, 1])
    exact = 131 - 128 + 64
    codes = 128 * DIM * bits // 8 + 67 * DIM * bits // 8
    params = 4 * (128 // 32 * DIM + 67 * DIM // 32)
    assert layer.nbytes == BATCH * HEADS * (codes + params + exact * DIM * 4)
    assert [part.tokens for part in layer.packed()] == [128, 67]


def test_a_group_without_spread_stays_what_it_was():
    x = torch.full((1, 1, 1, 32), 0.5)
    quantizer = MinMax(2, 32)
    assert (quantizer.decode(*quantizer.encode(x)) == 0.5).all()
    huge = torch.tensor([1e30, -1e30] * 16)
    assert quantizer.decode(*quantizer.encode(huge)).isfinite().all()


# -------------------------------------------------------------------------------------------------- PartialLogQuant
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_partial_keeps_keys_by_the_log_rule_and_the_newest_values(arrivals):
    layer = Partial(window=16).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    exact, total = [], sum(arrivals)
    for position in range(total):
        exact.append(position)
        while len(exact) >= 48:
            exact = exact[:32:2] + exact[32:]
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact
    assert exact_positions(seen_v, values) == list(range(total // 16 * 16, total))
    for seen, original, known in ((seen_k, keys, exact), (seen_v, values, range(total // 16 * 16, total))):
        for token in set(range(0, total, 5)) - set(known):
            assert seen[1, 0, token].tolist() == pytest.approx(minmax(original[1, 0, token].tolist()), abs=1e-5)
    halves = 2 * (DIM * 2 // 8 + 4)
    packed_k, packed_v = total - len(exact), total // 16 * 16
    assert layer.nbytes == BATCH * HEADS * (
        (packed_k + packed_v) * halves // 2 + (2 * total - packed_k - packed_v) * DIM * 4
    )


# ------------------------------------------------------------------------------------------------------- TurboQuant
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_turboquant_keeps_what_recent_keeps(arrivals):
    layer = TurboQuant(window=32).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    _, exact = split_positions(sum(arrivals), 32, "recent", 4)
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact_positions(seen_v, values) == exact.tolist()


# Of a unit vector, from the paper's Theorem 1 (and Max 1960, for a Gaussian).
@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.36), (2, 0.117), (4, 0.009)])
def test_turboquant_loses_what_the_paper_says(bits, distortion):
    dim = 128
    layer = TurboQuant(bits=bits, window=32, sinks=0).layer(tiny_config())
    x = torch.randn(1, 1, 4096, dim, generator=torch.Generator().manual_seed(1)) * 3 + 1
    layer.update(x, x)
    error = (layer.dense()[0] - x).square().sum(-1) / x.square().sum(-1)
    assert error[:, :, : layer.packed_keys].mean().item() == pytest.approx(distortion, rel=0.05)


def test_turboquants_constants():
    torch.testing.assert_close(rotation(64) @ rotation(64).mT, torch.eye(64), atol=1e-6, rtol=0)
    assert codebook(512, 1).tolist() == pytest.approx(
        [-math.sqrt(2 / math.pi / 512), math.sqrt(2 / math.pi / 512)], 1e-2
    )
    # Lloyd's conditions, by sampling: each centroid is the mean of what is nearest to it.
    x = F.normalize(torch.randn(200_000, 16, generator=torch.Generator().manual_seed(2)), dim=-1)[:, 0]
    book = codebook(16, 2)
    nearest = (x[:, None] - book).abs().argmin(-1)
    means = torch.stack([x[nearest == i].mean() for i in range(4)])
    torch.testing.assert_close(means, book, atol=5e-3, rtol=0)


def test_turboquant_takes_one_half_a_vector():
    layer = TurboQuant(window=32).layer(tiny_config())
    feed(layer, [200])
    packed = 32 * ((200 - 4) // 32 - 2)
    assert layer.nbytes == BATCH * HEADS * 2 * (packed * (DIM * 2 // 8 + 2) + (200 - packed) * DIM * 4)


# ------------------------------------------------------------------------------------------------------------ OSCAR
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_oscar_keeps_sinks_and_the_newest(arrivals):
    layer = OSCAR(sinks=8, recent=40).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    total = sum(arrivals)
    stated = [position for position in range(total) if position < 8 or position >= total - 40]
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact_positions(seen_v, values) == stated


def test_oscar_rotates_by_what_attends_and_clips():
    layer = OSCAR(sinks=8, recent=40).layer(tiny_config())
    keys, values, _ = feed(layer, [30, 60])
    queries = tokens_for(90)[2].double()
    # Attention weights of the exact tokens: nothing was quantised before.
    grouped = queries.unflatten(1, (HEADS, -1))
    hidden = torch.ones(90, 90, dtype=torch.bool).triu(1)
    scores = torch.einsum("bhgld,bhtd->bhglt", grouped, keys.double()) / math.sqrt(DIM)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    out = torch.einsum("bhglt,bhtd->bhgld", weights, values.double()).flatten(2, 3)
    flat = grouped.flatten(2, 3)
    for made, covariance in zip(layer.rotations, (flat.mT @ flat, out.mT @ out), strict=True):
        made = made.double()
        torch.testing.assert_close(made @ made.mT, torch.eye(DIM).double().expand_as(made), atol=1e-5, rtol=0)
        # An eigenvector's sign is free, and so is the rotation's up to it: what counts is that Hadamard spreads the
        # variance evenly, which it does for the eigenvectors alone.
        variances = torch.diagonal(made.mT @ covariance @ made, dim1=-2, dim2=-1)
        assert (variances.std(-1) / variances.mean(-1)).max() < 1e-3
        assert torch.diagonal(covariance, dim1=-2, dim2=-1).std() / covariance.mean().abs() > 1e-3
    row = (keys[0, 1, 20].double() @ layer.rotations[0][0, 1].double()).tolist()
    bound = sorted(abs(x) for x in row)[int(0.96 * DIM)]
    stated = (
        torch.tensor(minmax([min(max(x, -bound), bound) for x in row])).double() @ layer.rotations[0][0, 1].double().mT
    )
    torch.testing.assert_close(layer.dense()[0][0, 1, 20].double(), stated, atol=1e-5, rtol=1e-4)


def test_oscars_rotation_is_eigenvectors_hadamard_and_bit_reversal():
    covariance = torch.diag(torch.arange(16, 0, -1.0))
    made = rotation_for(covariance)
    # Of a diagonal covariance: rows of the Hadamard matrix, up to sign, with columns in bit-reversed order.
    sylvester = torch.ones(1, 1)
    while len(sylvester) < 16:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    order = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15]
    torch.testing.assert_close(made.abs(), torch.full_like(made, 0.25))
    signs = made[:, :1].sign()
    torch.testing.assert_close(made * signs, sylvester[:, order] / 4, atol=1e-6, rtol=0)


def test_oscar_takes_two_halves_a_vector_and_its_rotations():
    layer = OSCAR(sinks=8, recent=40).layer(tiny_config())
    feed(layer, [200])
    packed = 200 - 48
    rotations = 2 * DIM * DIM * 4
    assert layer.nbytes == BATCH * HEADS * (2 * (packed * (DIM * 2 // 8 + 4) + 48 * DIM * 4) + rotations)


# ----------------------------------------------------------------------------------------------------- StreamingLLM
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_streaming_keeps_sinks_and_the_newest(arrivals):
    layer = Streaming(sinks=3, recent=50).layer(tiny_config())
    _, values, _ = feed(layer, arrivals)
    kept, position = [], 0
    for new in arrivals:
        kept += range(position, position + new)
        position += new
        while len(kept) > 53:
            del kept[3]
    assert torch.equal(layer.values, values[:, :, kept])
    assert layer.get_mask_sizes(5) == (len(kept) + 5, position - len(kept))
    assert layer.get_seq_length() == position
    assert layer.nbytes == BATCH * HEADS * len(kept) * 2 * DIM * 4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ],
)
def test_streaming_predicts_as_if_only_the_kept_tokens_had_come(changes):
    """In a model of one layer keys and values do not depend on the context, so this is what section 3.2 asks for."""
    model = tiny_model(num_hidden_layers=1, **changes)
    model.set_attn_implementation("logquant")
    ids = torch.randint(256, (2, 90), generator=torch.Generator().manual_seed(3))
    cache = Streaming(sinks=4, recent=30).make(model.config)
    with torch.inference_mode():
        model(ids[:, :60], **as_argument(cache))
        for step in range(60, 90):
            logits = model(ids[:, step : step + 1], **as_argument(cache)).logits[:, -1]
            kept = torch.cat([ids[:, :4], ids[:, step - 30 : step + 1]], 1)
            torch.testing.assert_close(logits, model(kept).logits[:, -1], atol=2e-4, rtol=1e-4)
        # Without moving the sinks it would not be so.
        cache.layers[0].frequencies = None
        wrong = model(ids[:, -1:], **as_argument(cache)).logits[:, -1]
        kept = torch.cat([ids[:, :4], ids[:, -30:], ids[:, -1:]], 1)
        assert not torch.allclose(wrong, model(kept).logits[:, -1], atol=1e-2)


def test_streaming_refuses_rope_that_it_does_not_know():
    with pytest.raises(ValueError, match="cannot move keys with the RoPE of 'llama' \\(dynamic\\)"):
        rope_frequencies(tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))


# -------------------------------------------------------------------------------------------------------------- H2O
def h2o_by_the_paper(keys, queries, arrivals, heavy, recent):
    """Kept positions of one KV head, whose query heads are ``queries`` ``[G, T, D]``: Algorithm 1."""
    score, kept, position = {}, [], 0
    for new in arrivals:
        kept += range(position, position + new)
        for at in range(position, position + new):
            seen = [j for j in kept if j <= at]
            for query in queries:
                logits = [float(query[at] @ keys[j]) / math.sqrt(DIM) for j in seen]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                for j, weight in zip(seen, weights, strict=True):
                    score[j] = score.get(j, 0.0) + weight / sum(weights)
        position += new
        if len(kept) > heavy + recent:
            older = sorted(kept[:-recent], key=lambda j: score[j], reverse=True)[:heavy]
            kept = sorted(older) + kept[-recent:]
    return kept, score


@pytest.mark.parametrize("arrivals", [[40, *[1] * 8], [5, *[1] * 25], [25, 6, 1, 9]])
def test_h2o_keeps_what_got_most_attention(arrivals):
    layer = H2O(heavy=6, recent=9).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    queries = tokens_for(sum(arrivals))[2].double()
    kinds = set()
    for row in range(BATCH):
        for head in range(HEADS):
            group = queries[row, 2 * head : 2 * head + 2]
            kept, score = h2o_by_the_paper(keys[row, head].double(), group, arrivals, 6, 9)
            assert torch.equal(layer.keys[row, head], keys[row, head, kept])
            assert torch.equal(layer.values[row, head], values[row, head, kept])
            assert layer.scores[row, head].tolist() == pytest.approx([score[j] for j in kept], rel=1e-4)
            kinds.add(tuple(kept))
    assert len(kinds) > 1  # heads choose for themselves
    assert layer.nbytes == BATCH * HEADS * 15 * (2 * DIM * 4 + 4)


# ----------------------------------------------------------------------------------------------------- quanto and HQQ
def needs(settings):
    try:
        return settings()
    except ImportError as error:
        pytest.skip(f"{error}")


@pytest.mark.parametrize("settings", [Quanto, HQQ])
def test_quantized_cache_is_that_of_transformers(settings):
    cache = needs(settings).make(tiny_config())
    layer = cache.layers[0]
    keys, *_ = feed(layer, [100, *[1] * 10])
    assert layer.keys.shape[2] == 10 and layer.get_seq_length() == 110
    bits = packed_bits_per_element(cache)
    # Scales and zeros of 64 channels each: 32 bits, or as much as the dtype wants.
    assert 2.25 <= bits <= 2 + 64 / 64 + 0.1
    assert cache_nbytes(cache) >= BATCH * HEADS * 2 * DIM * (10 * 4 + 100 * bits / 8)
    seen = layer._dequantize(layer._quantized_keys)
    assert 0 < (seen - keys[:, :, :100]).square().mean() < 0.3


@pytest.mark.parametrize(("name", "package"), [("quanto", "optimum-quanto"), ("hqq", "hqq")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setattr(quanto.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=rf"cache '{name}' needs the package {package}: pip install"):
        parse_cache(name)


# -------------------------------------------------------------------------------------------------------- all of them
NAMES = [
    "partial",
    "kivi",
    "turboquant",
    "turboquant:bits=4",
    "oscar:sinks=4,recent=64",
    "streaming:recent=100",
    "h2o:heavy=50,recent=50",
]
if importlib.util.find_spec("hqq"):
    NAMES.append("hqq")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["logquant", "sdpa"])
def test_prompts_are_exact_and_a_short_text_stays_so(name, attention):
    """Also: steps after a reset, and generate."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    ids = torch.randint(256, (2, 300), generator=torch.Generator().manual_seed(4))
    cache = parse_cache(name).make(model.config)
    assert cache_nbytes(cache) == 0 and packed_bits_per_element(cache) is None
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, **as_argument(cache)).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == 300
        after_a_prompt = model(ids[:, :1], **as_argument(cache)).logits
        cache.reset()
        torch.testing.assert_close(model(ids, **as_argument(cache)).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids[:, :1], **as_argument(cache)).logits, after_a_prompt, atol=1e-4, rtol=1e-4)
        fresh = parse_cache(name).make(model.config)
        out = model.generate(ids[:, :20], max_new_tokens=40, do_sample=False, **as_argument(fresh))
        if name != "hqq":  # quantises a prompt of any length
            assert torch.equal(out, model.generate(ids[:, :20], max_new_tokens=40, do_sample=False))


def test_the_better_the_cache_the_smaller_the_divergence():
    model = tiny_model()
    ids = torch.randint(256, (2, 341), generator=torch.Generator().manual_seed(5))
    names = ["kivi", "kivi:bits=4", "kivi:bits=8", "turboquant", "turboquant:bits=4", "turboquant:bits=8"]
    names += ["oscar:recent=64,sinks=4", "oscar:recent=64,sinks=4,bits=4", "oscar:recent=64,sinks=4,bits=8,key_clip=1"]
    names += ["partial:window=32", "partial:window=32,bits=4", "partial:window=32,bits=8"]
    names += ["streaming:recent=100", "streaming:recent=200", "streaming:recent=400"]
    names += ["h2o:heavy=50,recent=50", "h2o:heavy=100,recent=100", "h2o:heavy=200,recent=200"]
    scores = evaluate(model, ids, [parse_cache(name) for name in names], prefill=300, chunk=4)
    kl = [sum(score.kl) / 2 for score in scores]
    for first in range(0, len(names), 3):
        assert kl[first] > kl[first + 1] > kl[first + 2] >= -1e-9, names[first]
    assert kl[2] < 1e-2 and abs(kl[14]) < 1e-5 and abs(kl[17]) < 1e-5


def test_caches_can_be_compared_at_equal_bytes_a_token():
    model = tiny_model()
    ids = torch.randint(256, (2, 330), generator=torch.Generator().manual_seed(6))
    names = ["full", "logquant", "paper:bits=4", *NAMES]
    scores = evaluate(model, ids, [parse_cache(name) for name in names], prefill=300, chunk=29)
    by_name = {score.cache: score.token_nbytes for score in scores}
    heads = 2 * 2  # of two layers
    assert by_name["full"] == heads * 2 * 32 * 4
    assert by_name["logquant"] == heads * LogQuantConfig().page_format(32).nbytes / 64
    assert by_name["paper:bits=4"] == heads * LogQuantConfig.paper(bits=4).page_format(32).nbytes / 64
    assert by_name["kivi"] == heads * 2 * (32 * 2 / 8 + 4)
    assert by_name["partial"] == heads * 2 * (32 * 2 / 8 + 4)
    assert by_name["turboquant"] == heads * 2 * (32 * 2 / 8 + 2)
    assert by_name["turboquant:bits=4"] == heads * 2 * (32 * 4 / 8 + 2)
    assert by_name["oscar:sinks=4,recent=64"] == heads * 2 * (32 * 2 / 8 + 4)
    assert by_name["streaming:recent=100"] == by_name["h2o:heavy=50,recent=50"] == 0
    unused = parse_cache("kivi").make(model.config)
    assert token_nbytes(unused) is None


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", NAMES[:-1])
def test_rollback_and_beams_are_refused(name):
    model = tiny_model()
    ids = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(7))
    cache = parse_cache(name).make(model.config)
    with pytest.raises(NotImplementedError, match="not beam search"):
        model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False, **as_argument(cache))
    with pytest.raises(NotImplementedError, match="baseline caches do greedy decoding and sampling"):
        cache.crop(-1)


@pytest.mark.parametrize("name", ["streaming", "h2o"])
def test_caches_that_forget_refuse_padding(name):
    model = tiny_model()
    model.set_attn_implementation("logquant")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    with pytest.raises(ValueError, match="takes no padding"):
        model(
            torch.ones(2, 20, dtype=torch.long),
            attention_mask=mask,
            **as_argument(parse_cache(name).make(model.config)),
        )


@pytest.mark.parametrize("name", ["streaming", "h2o", "oscar"])
def test_attention_that_does_not_tell_is_refused(name):
    model = tiny_model()
    model.set_attn_implementation("eager")
    cache = parse_cache(name).make(model.config)
    ids = torch.ones(1, 20, dtype=torch.long)
    torch.testing.assert_close(model(ids, **as_argument(cache)).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="attention implementation must be 'logquant' or 'sdpa'"):
        model(ids, **as_argument(cache))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kivi:bits=3", "bits must be 2, 4 or 8, got 3"),
        ("kivi:group=33", "group must be a positive multiple of 16, got 33"),
        ("kivi:residual=100", "residual must be a multiple of 32, got 100"),
        ("turboquant:bits=3", "bits must be 1, 2, 4 or 8, got 3"),
        ("turboquant:sinks=-1", "sinks must be a whole number of tokens, 0 or more, got -1"),
        ("oscar:group=48", "group must be a power of two from 16 on, got 48"),
        ("oscar:key_clip=1.5", "key_clip must be above 0 and at most 1, got 1.5"),
        ("streaming:recent=0", "recent must be a positive whole number, got 0"),
        ("h2o:heavy=-1", "heavy must be a whole number of tokens, 0 or more, got -1"),
        ("h2o:bits=2", "a setting must be one of heavy, recent, got 'bits'"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)


@pytest.mark.parametrize(
    ("settings", "dim", "message"),
    [
        (KIVI(), 48, "group must divide the value dimension 48, got 32"),
        (OSCAR(), 48, "powers of two from 16 on, got 48"),
    ],
)
def test_heads_that_do_not_fit_are_refused(settings, dim, message):
    x = torch.zeros(1, 1, 5, dim)
    with pytest.raises(ValueError, match=message):
        settings.layer(tiny_config()).update(x, x)
