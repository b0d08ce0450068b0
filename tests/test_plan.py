"""What fits: bytes predicted from configurations are those of caches that hold tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from logquant.methods.accounting import cache_nbytes
from logquant.methods.registry import parse_cache
from logquant.plan import pays_from, plan, sequence_nbytes
from tests.helpers.models import FAMILIES, family_config

RECALL = "logquant:recall=both(pages=0.5;skip=1)"
MIXED = "logquant:layers=middle(key_bits=4;value_bits=8)"
REFUSED = {
    "lfm2": "layer 0 must be full or sliding-window attention, got LinearAttention",
    "qwen3_next": "layer 0 must be full or sliding-window attention, got LinearAttention",
    "deepseek_v3": "config must be of a model that caches keys and values, got deepseek_v3",
}


def noted(cache) -> int:
    """Bytes of the positions that rows have been asked for: 4 a token, for all layers together."""
    return sum(
        {id(layer.rows): layer.rows.nbytes for layer in cache.layers if isinstance(layer, LogQuantLayer)}.values()
    )


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(REFUSED)))
@pytest.mark.parametrize("name", ["full", "logquant:window=32", "paper", RECALL, MIXED])
def test_bytes_predicted_are_those_held(family, name):
    config = family_config(family)
    if family == "gpt_neox":
        del config.num_key_value_heads  # it has none
    torch.manual_seed(0)
    network, spec = AutoModelForCausalLM.from_config(config).eval(), parse_cache(name)
    network.set_attn_implementation("logquant")
    cache = spec.make(network.config)
    with torch.no_grad():
        network(torch.randint(0, 256, (1, 470)), **as_argument(cache), logits_to_keep=1)
        lengths = sum(8 for layer in cache.layers if getattr(layer, "is_sliding", False))  # transformers' own notes
        assert cache_nbytes(cache) - lengths == sequence_nbytes(spec, config, 470, 4)
        held = []
        for tokens in range(471, 641):
            network(torch.randint(0, 256, (1, 1)), **as_argument(cache))
            most = sequence_nbytes(spec, config, tokens, 4, decoding=True)
            held.append((cache_nbytes(cache) - lengths - noted(cache)) / most)
    assert min(held) > 0.9
    assert max(held) == 1, "the most is reached, and no more"


@pytest.mark.parametrize("family", REFUSED)
def test_models_whose_bytes_the_configuration_does_not_tell(family):
    with pytest.raises(ValueError, match=REFUSED[family]):
        sequence_nbytes(parse_cache("full"), family_config(family), 100, 2)


def test_plans_are_the_largest_that_fit():
    config, spec = family_config("llama"), parse_cache("logquant")
    found = plan(spec, config, budget=1 << 24, tokens=4000, itemsize=2)
    each = sequence_nbytes(spec, config, 4000, 2, decoding=True)
    assert found.nbytes == each and found.batch * each <= 1 << 24 < (found.batch + 1) * each
    assert sequence_nbytes(spec, config, found.longest, 2, decoding=True) <= 1 << 24
    assert sequence_nbytes(spec, config, found.longest + 1, 2, decoding=True) > 1 << 24
    with pytest.raises(ValueError, match="cache must be full, logquant or one with its settings, got 'kivi'"):
        sequence_nbytes(parse_cache("kivi"), config, 100, 2)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        plan(spec, config, budget=0, tokens=1, itemsize=2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize(
    "name", ["logquant", MIXED, "logquant:bits=8,window=32", "paper:window=128", "recent:param_bits=16"]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_cache_pays_from_the_first_token_on_that_no_later_one_undoes(family, name, itemsize):
    config, spec, full = family_config(family), parse_cache(name), parse_cache("full")

    def smaller(tokens):
        held, plain = (sequence_nbytes(each, config, tokens, itemsize, decoding=True) for each in (spec, full))
        return held < plain

    least = pays_from(spec, config, itemsize)
    assert not smaller(least - 1)
    assert all(smaller(tokens) for tokens in range(least, least + 1000))


def test_what_pays_from_is_known_of_logquant_caches_alone():
    for name in ("full", "kivi"):
        with pytest.raises(ValueError, match=f"cache must be logquant or one with its settings, got '{name}'"):
            pays_from(parse_cache(name), family_config("llama"), 2)
    with pytest.raises(ValueError, match="config must be of a model with full attention in some layer, got mistral"):
        pays_from(parse_cache("logquant"), family_config("mistral"), 2)
