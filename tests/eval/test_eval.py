"""The accuracy harness: scores that are known beforehand, and how caches are named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logquant import LogQuantConfig
from logquant.cache.sizes import head_nbytes
from logquant.compat import as_argument
from logquant.eval import CacheScores, bootstrap_interval, evaluate, read_tokens
from logquant.eval.divergence import SPAN, take_prompt
from logquant.methods.accounting import cache_nbytes, packed_bits_per_element
from logquant.methods.layers.quantized import QuantizingLayer
from logquant.methods.registry import parse_cache, parse_caches
from tests.helpers.models import family_config, save_tiny_model, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PREFILL, TOKENS = 100, 60


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (3, PREFILL + TOKENS + 1), generator=torch.Generator().manual_seed(1))


def scores(model, ids, caches, **options):
    results = evaluate(model, ids, parse_caches(caches), **{"prefill": PREFILL, **options})
    return {result.cache: result for result in results}


def test_the_full_cache_has_no_divergence_and_the_models_own_perplexity(model, ids):
    (full,) = scores(model, ids, "full").values()
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)
    own = -logp[:, PREFILL:-1].gather(-1, ids[:, PREFILL + 1 :, None]).mean((1, 2))
    assert full.kl == [0, 0, 0] and full.top1 == [1, 1, 1] and full.bits_per_element is None
    torch.testing.assert_close(torch.tensor(full.nll, dtype=torch.float32), own, rtol=1e-4, atol=1e-4)
    assert full.as_dict()["ppl"] == pytest.approx(math.exp(own.mean()), rel=1e-3)


def test_more_bits_diverge_less_and_an_exact_window_not_at_all(model, ids):
    by_name = scores(model, ids, "logquant:window=32,logquant:window=32,bits=4,logquant:window=32,bits=8,logquant")
    two, four, eight, exact = (sum(result.kl) / 3 for result in by_name.values())
    assert two > 4 * four > 16 * eight > 0
    assert eight < 1e-3
    assert abs(exact) < 1e-6 and by_name["logquant"].bits_per_element is None  # 160 tokens all fit in 3 * 64
    assert by_name["logquant"].top1 == [1, 1, 1]


def test_the_tail_of_kl_is_that_of_all_tokens(model, ids):
    """Recomputed from the logits of two caches, with numpy."""
    name, specs = "logquant:window=32", parse_caches("full,logquant:window=32")
    (result,) = scores(model, ids, name).values()
    model.set_attn_implementation("logquant")
    logp = []
    with torch.inference_mode():
        for spec in specs:
            cache, rows = spec.make(model.config), []
            model(ids[:, :PREFILL], **as_argument(cache))
            for i in range(PREFILL, PREFILL + TOKENS):
                rows.append(model(ids[:, i : i + 1], **as_argument(cache)).logits[:, 0].double().log_softmax(-1))
            logp.append(torch.stack(rows, 1))
    kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1).numpy()
    assert [each.shape for each in result.token_kl] == [(TOKENS,)] * 3
    np.testing.assert_allclose(torch.stack(result.token_kl).numpy(), kl, rtol=1e-3, atol=1e-5)
    found = result.as_dict()
    assert result.kl == pytest.approx(kl.mean(1).tolist(), rel=1e-3)
    assert found["kl_p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert found["kl_p999"] == pytest.approx(np.percentile(kl, 99.9), rel=1e-3)
    assert found["kl_p99"] < found["kl_p999"] < kl.max()


def test_the_share_of_tokens_above_1_counts_tokens():
    scored = CacheScores("x", [torch.tensor([0.0, 1.0, 1.5]), torch.tensor([3.0] * 2)], [1.0, 2.0], [0.5, 0.5])
    assert scored.as_dict()["kl_above_1"] == 3 / 5
    assert scored.as_dict()["kl"] == pytest.approx((2.5 / 3 + 3) / 2)


def test_kl_along_texts_is_the_mean_of_each_span():
    first, second, third = torch.rand(2 * SPAN + 10), torch.rand(2 * SPAN - 1), torch.rand(3)
    found = CacheScores("x", [first, second, third], [1.0] * 3, [0.5] * 3).as_dict()["kl_along"]
    want = [torch.cat([first[:SPAN], second[:SPAN]]).mean(), first[SPAN : 2 * SPAN].mean()]
    assert found["tokens"] == SPAN and found["kl"] == pytest.approx([float(kl) for kl in want])


def test_a_stopped_evaluation_scores_what_was_decoded(model, ids):
    """All caches the same tokens; texts of which none was decoded have no scores."""
    done = []
    stopped = evaluate(
        model,
        ids,
        parse_caches("recent:window=32,full"),
        prefill=PREFILL,
        batch_size=2,
        on_progress=done.append,
        stop=lambda: len(done) == 7,
    )
    whole = scores(model, ids, "recent:window=32,full", batch_size=2)
    assert sum(done) == 14
    for result in stopped:
        assert [len(kl) for kl in result.token_kl] == [7, 7] and len(result.nll) == len(result.top1) == 2
        assert result.token_kl[1].tolist() == whole[result.cache].token_kl[1][:7].tolist()
    nothing = evaluate(model, ids, parse_caches("full"), prefill=PREFILL, stop=lambda: True)
    assert nothing[0].token_kl == nothing[0].nll == []


def test_bits_and_bytes_are_those_of_the_format(model, ids):
    by_name = scores(model, ids, "log:window=32,full")
    config, seen = LogQuantConfig(window=32, rule="log"), PREFILL + TOKENS
    assert by_name["log:window=32"].bits_per_element == config.page_format(32).bits_per_element
    heads = 4  # of two layers
    assert by_name["full"].nbytes == heads * seen * 2 * 32 * 4
    least, most = (
        heads * head_nbytes(config, seen, 32, itemsize=4, decoding=decoding, query_heads=2)
        for decoding in (False, True)
    )
    assert least <= by_name["log:window=32"].nbytes <= most


def test_batches_and_chunks_of_one_window_do_not_change_the_result(model, ids):
    once = scores(model, ids, "recent:window=32")["recent:window=32"]
    split = scores(model, ids, "recent:window=32", batch_size=2)["recent:window=32"]
    assert split.kl == pytest.approx(once.kl, rel=1e-3) and split.nbytes == once.nbytes
    chunked = scores(model, ids, "full,recent:window=32", chunk=7)
    assert chunked["full"].nll == pytest.approx(scores(model, ids, "full")["full"].nll, rel=1e-4)
    assert 0 < sum(chunked["recent:window=32"].kl) < 2 * sum(once.kl)


ALL = (
    "full,logquant:window=32,recent,paper,kivi:group=16,residual=32,oscar:sinks=4,recent=32,turboquant:window=32,"
    "kvarn:tile=16,sinks=4,iterations=2,occam:group=16,residual=32,kitty:residual=16,sinks=4,nexusquant:window=16,"
    "h2o:heavy=16,recent=16,streaming:recent=40,partial:window=32"
)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_prompt_computed_once_leaves_what_each_cache_would_have_made_of_it(ids, family):
    """Also where layers have sliding windows, and where quantised tokens are decoded only once."""
    if family == "llama":
        model = tiny_model()
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(family)).eval()
    model.set_attn_implementation("logquant")
    specs = parse_caches(ALL)
    together = [spec.make(model.config) for spec in specs]
    with torch.no_grad():
        take_prompt(model, ids[:, :PREFILL], together)
        for spec, cache in zip(specs, together, strict=True):
            alone = spec.make(model.config)
            model(ids[:, :PREFILL], **as_argument(alone))
            for layer in cache.layers:
                if isinstance(layer, QuantizingLayer):
                    layer.remember()
            for first in range(PREFILL, PREFILL + 60, 12):
                got, want = (model(ids[:, first : first + 12], **as_argument(c)).logits for c in (cache, alone))
                torch.testing.assert_close(
                    got, want, rtol=1e-4, atol=1e-4, msg=lambda m, name=spec.name: f"{name}: {m}"
                )
            assert cache_nbytes(cache) == cache_nbytes(alone), "what was decoded does not count"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": 0}, "prefill must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"prefill": 160}, "ids must have at least prefill [+] 2 = 162 tokens, got 161"),
    ],
)
def test_bad_sizes_are_named(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, ids, parse_caches("full"), **options)


# ------------------------------------------------------------------------------------------------------------- names
def test_names_stand_for_settings():
    assert parse_cache("full").quantization is None
    assert parse_cache("logquant").quantization == LogQuantConfig()
    assert parse_cache("recent:window=128,bits=4").quantization == LogQuantConfig(rule="recent", window=128, bits=4)
    assert parse_cache("logquant:bits=4").replace(window=128).name == "logquant:bits=4,window=128"
    names = [spec.name for spec in parse_caches("logquant:bits=4,window=128, recent,full")]
    assert names == ["logquant:bits=4,window=128", "recent", "full"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapkv", "cache must be one of logquant, fine, small, log, recent, paper, partial, .*, full, got 'snapkv'"),
        ("logquant:bit=4", "a setting must be one of bits, .*, got 'bit'"),
        ("logquant:bits=two", "bits must be a whole number, got 'two'"),
        ("logquant:bits=3", "'logquant:bits=3': bits must be 2, 4 or 8, got 3"),
        ("logquant:rule=1", "a setting must be one of"),
        ("full:bits=2", "cache 'full' has no settings, got bits"),
        ("logquant:bits=4,bits=8", "cache 'logquant:bits=4,bits=8': bits must be given once"),
        ("kivi:bits=2,group=32,bits=2", "bits must be given once"),
        ("", "caches must name at least one of logquant, .*, full"),
        ("full,full", "caches must differ"),
    ],
)
def test_bad_names_are_explained(name, message):
    with pytest.raises(ValueError, match=message):
        parse_caches(name)


@pytest.mark.parametrize("name", ["full", "logquant", "recent:bits=8"])
def test_an_unused_cache_holds_nothing(model, name):
    cache = parse_cache(name).make(model.config)
    assert cache_nbytes(cache) == 0 and packed_bits_per_element(cache) is None


# ------------------------------------------------------------------------------------------------- text and intervals
def test_texts_are_cut_to_one_length(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "model"))
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("abcdef")
    short.write_text("abc")
    assert read_tokens(tokenizer, [long, short], 3).shape == (2, 3)
    with pytest.raises(ValueError, match=r"short.txt must have at least 5 tokens, got 3"):
        read_tokens(tokenizer, [long, short], 5)
    with pytest.raises(ValueError, match="text must name at least one file, got none"):
        read_tokens(tokenizer, [], 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"na\xefve", r"a\.txt must be text in UTF-8, got byte 0xef at 2"),
        (b" \n", r"a\.txt must hold text, got none"),
        (None, r"a\.txt cannot be read: No such file or directory"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, content, message):
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        read_tokens(None, [file], 5)


def test_the_interval_holds_the_mean_and_narrows_with_more_texts():
    few, many = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0] * 25
    low, high = bootstrap_interval(few)
    assert 1 <= low < 2.5 < high <= 4
    tighter = bootstrap_interval(many)
    assert low < tighter[0] < 2.5 < tighter[1] < high
    assert bootstrap_interval([1.0]) is None
