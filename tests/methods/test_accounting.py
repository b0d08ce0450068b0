"""Bytes and bits of all caches, measured on their tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from logquant import LogQuantConfig
from logquant.cache.sizes import packed_tokens
from logquant.compat import as_argument
from logquant.eval import evaluate
from logquant.methods.accounting import packed_bits_per_element, packed_in, token_nbytes
from logquant.methods.layers.base import BaselineLayer, Packed
from logquant.methods.registry import parse_cache
from tests.helpers.methods import NAMES
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_caches_can_be_compared_at_equal_bytes_a_token():
    model = tiny_model()
    ids = torch.randint(256, (2, 330), generator=torch.Generator().manual_seed(6))
    names = ["full", "log", "logquant", "paper:bits=4", *NAMES]
    scores = evaluate(model, ids, [parse_cache(name) for name in names], prefill=300, chunk=29)
    by_name = {score.cache: score.token_nbytes for score in scores}
    heads = 2 * 2  # of two layers
    assert by_name["full"] == heads * 2 * 32 * 4
    assert by_name["log"] == heads * LogQuantConfig().page_format(32).nbytes / 64
    assert by_name["logquant"] == by_name["log"] + 2 * 2  # a position of 16 bits in each of two layers
    assert by_name["paper:bits=4"] == heads * LogQuantConfig.paper(bits=4).page_format(32).nbytes / 64
    assert by_name["kivi"] == heads * 2 * (32 * 2 / 8 + 4)
    assert by_name["partial"] == heads * 2 * (32 * 2 / 8 + 4)
    assert by_name["turboquant"] == heads * 2 * (32 * 2 / 8 + 2)
    assert by_name["turboquant:bits=4"] == heads * 2 * (32 * 4 / 8 + 2)
    assert by_name["oscar:sinks=4,recent=64"] == heads * 2 * (32 * 2 / 8 + 4)
    key_tile, value_tile = 64 * 32 * 4 / 8 + 2 * (2 * 32 + 64), 64 * 32 * 2 / 8 + 2 * (32 + 2 * 64)
    assert by_name["kvarn:tile=64,sinks=4"] == heads * (key_tile + value_tile) / 64
    assert by_name["occam:residual=64"] == heads * 2 * (32 * 2 / 8 + 4) + 2 * 2  # the norm of a layer's keys
    kitty = (32 + 8) * 2 / 8 + (32 * 4 + 8) / 64 + 32 * 2 / 8 + 4
    assert by_name["kitty:residual=64,sinks=4"] == heads * kitty
    assert by_name["nexusquant"] == heads * 2 * (32 * 18 / 64 + 2)
    assert by_name["streaming:recent=100"] == by_name["h2o:heavy=50,recent=50"] == 0
    unused = parse_cache("kivi").make(model.config)
    assert token_nbytes(unused) is None


@pytest.mark.parametrize(
    "name",
    ["log:window=32,key_columns=1.5", "logquant:window=32,key_columns=1.5", "small:window=32", "paper:window=32"],
)
def test_bits_of_an_element_count_column_maps_and_bytes_of_a_token_do_not(name):
    model, spec = tiny_model(), parse_cache(name)
    cache = spec.make(model.config)
    ids = torch.randint(256, (2, 200), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        model(ids, **as_argument(cache))
    fmt, packed = spec.quantization.page_format(32), packed_tokens(spec.quantization, 200)
    has_map = name != "paper:window=32"
    assert packed > 0 and spec.quantization.has_map(fmt) == has_map
    # Of a KV head of one sequence.
    pages, key_map = packed // 32 * fmt.nbytes, 2 * fmt.key_columns if has_map else 0
    position = 2 if spec.quantization.rule == "attention" else 0  # the position of a token, for both heads
    bits = 8 * (pages + key_map + packed * position / 2) / (packed * 2 * 32)
    assert packed_bits_per_element(cache) == pytest.approx(bits)
    assert token_nbytes(cache, batch=2) == 2 * (2 * fmt.nbytes / 32 + position)  # two layers of two KV heads


class Exact(BaselineLayer):
    """All tokens, exact."""

    def update(self, key_states, value_states, *args, **kwargs):
        self.tokens += key_states.shape[2]
        return super().update(key_states, value_states)


class Own(CacheLayerMixin):
    """A layer that has nothing in common with others but what it says."""

    update = lazy_initialization = get_mask_sizes = get_seq_length = get_max_length = None

    def packed(self):
        return [Packed(nbytes=600, elements=1600, tokens=10, fixed_nbytes=200)]


def test_layers_answer_for_themselves_and_others_have_an_answer():
    x = torch.zeros(2, 2, 10, 32)
    exact, plain, sliding = Exact(), DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)
    for layer in (exact, plain, sliding):
        layer.update(x, x)
        assert packed_in(layer) is None
    of_a_token = 2 * 2 * 32 * 4
    assert token_nbytes(Cache(layers=[exact]), batch=2) == token_nbytes(Cache(layers=[plain]), batch=2) == of_a_token
    assert token_nbytes(Cache(layers=[sliding]), batch=2) == 0
    assert packed_bits_per_element(Cache(layers=[Own(), plain])) == 8 * 800 / 1600
    assert token_nbytes(Cache(layers=[Own(), plain]), batch=2) == 60 / 2 + of_a_token
