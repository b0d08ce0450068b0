"""What all methods have in common: exact prompts, what more memory buys, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from logquant.compat import as_argument
from logquant.eval import evaluate
from logquant.methods.accounting import cache_nbytes, packed_bits_per_element
from logquant.methods.registry import parse_cache
from tests.helpers.methods import NAMES
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


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
    names += ["kvarn:tile=64,sinks=4,key_bits=2", "kvarn:tile=64,sinks=4", "kvarn:tile=64,sinks=4,value_bits=4"]
    names += ["occam:residual=64", "occam:residual=64,bits=4", "occam:residual=64,bits=8"]
    names += ["kitty:residual=64,sinks=4,boosted=0", "kitty:residual=64,sinks=4", "kitty:residual=64,sinks=4,boosted=1"]
    names += ["nexusquant", "nexusquant:key_bits=3,value_bits=3", "nexusquant:key_bits=4,value_bits=4"]
    names += ["partial:window=32", "partial:window=32,bits=4", "partial:window=32,bits=8"]
    few = "clusterkv:per_cluster=20,sinks=4,skip=0,budget="
    names += [f"{few}20", f"{few}100", f"{few}200"]
    names += ["streaming:recent=100", "streaming:recent=200", "streaming:recent=400"]
    names += ["h2o:heavy=50,recent=50", "h2o:heavy=100,recent=100", "h2o:heavy=200,recent=200"]
    scores = evaluate(model, ids, [parse_cache(name) for name in names], prefill=300, chunk=4)
    kl = [sum(score.kl) / 2 for score in scores]
    for first in range(0, len(names), 3):
        assert kl[first] > kl[first + 1] > kl[first + 2] >= -1e-9, names[first]
    assert kl[2] < 1e-2 and all(abs(kl[names.index(exact)]) < 1e-5 for exact in names[-4::3])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hqq"])
def test_rollback_and_beams_are_refused(name):
    model = tiny_model()
    ids = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(7))
    cache = parse_cache(name).make(model.config)
    with pytest.raises(NotImplementedError, match="not beam search"):
        model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False, **as_argument(cache))
    with pytest.raises(NotImplementedError, match="baseline caches do greedy decoding and sampling"):
        cache.crop(-1)


@pytest.mark.parametrize("name", ["streaming", "h2o", "clusterkv"])
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


@pytest.mark.parametrize("name", ["streaming", "h2o", "clusterkv", "oscar"])
def test_attention_that_does_not_tell_is_refused(name):
    model = tiny_model()
    model.set_attn_implementation("eager")
    cache = parse_cache(name).make(model.config)
    ids = torch.ones(1, 20, dtype=torch.long)
    torch.testing.assert_close(model(ids, **as_argument(cache)).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="attention implementation must be 'logquant' or 'sdpa'"):
        model(ids, **as_argument(cache))
