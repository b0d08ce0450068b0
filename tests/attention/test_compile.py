"""torch.compile: no graph breaks in a decode step, no recompilation as the context grows, the same tokens."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import is_cudagraph_unsafe_fx_node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module
from transformers import AutoModelForCausalLM, DynamicCache

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.compiled import _warn_dense
from logquant.compat import as_argument
from tests.helpers.masks import pad_mask
from tests.helpers.models import family_config, tiny_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 500), generator=torch.Generator().manual_seed(0))


def decode(forward, cache, ids: Tensor, start: int, mask: Tensor | None = None) -> tuple[Tensor, list[int]]:
    """Logits of each token from ``start`` on, and how many graphs there were after each."""
    out, graphs = [], []
    for t in range(start, ids.shape[1]):
        seen = None if mask is None else mask[:, : t + 1]
        with torch.no_grad():
            out.append(forward(ids[:, t : t + 1], attention_mask=seen, **as_argument(cache)).logits)
        graphs.append(counters["stats"]["unique_graphs"])
    return torch.cat(out, 1), graphs


@pytest.mark.parametrize(
    ("family", "padded"),
    [
        ("tiny", True),
        ("gemma2", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tiny", False), ("gemma2", True))),
        *(pytest.param("gpt_oss", padded, marks=pytest.mark.slow) for padded in (False, True)),
    ],
)
def test_decoding_is_one_graph_that_the_growing_context_does_not_change(ids, family, padded):
    if family == "tiny":
        model = tiny_model()
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(family)).eval()
    model.set_attn_implementation("logquant")
    mask = torch.cat([pad_mask([300, 250], "left"), torch.ones(2, 200, dtype=torch.long)], 1) if padded else None
    cache = LogQuantCache(model.config)
    with torch.no_grad():
        model(ids[:, :300], attention_mask=None if mask is None else mask[:, :300], **as_argument(cache))
    twin, third = copy.deepcopy(cache), copy.deepcopy(cache)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, graphs = decode(compiled, cache, ids[:, :420], 300, mask)
    want, _ = decode(model, twin, ids[:, :420], 300, mask)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert not counters["graph_break"]
    # The second step makes lengths symbolic, and later ones have nothing new to see: eviction does not show.
    assert graphs[-1] == graphs[3] <= 3, graphs
    again, graphs = decode(compiled, third, ids[:, :310], 300, mask)
    assert torch.equal(again, got[:, :10]) and graphs[-1] <= graphs[0] + 1, "another cache is not another program"
    assert cache.layers[1].rows.packed > third.layers[1].rows.packed
    assert cache.get_seq_length() == 420


def test_a_compiled_prompt_is_computed_outside_of_the_graph(ids):
    model = tiny_model()
    model.set_attn_implementation("logquant")
    want = model.generate(ids[:1, :250], **as_argument(LogQuantCache(model.config)), max_new_tokens=40, do_sample=False)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    got = model.generate(ids[:1, :250], **as_argument(LogQuantCache(model.config)), max_new_tokens=40, do_sample=False)
    assert torch.equal(got, want)


def test_a_compiled_model_serves_other_caches_too(ids):
    model = tiny_model()
    model.set_attn_implementation("logquant")
    compiled = torch.compile(model, backend="aot_eager")
    for make in (lambda: DynamicCache(config=model.config), lambda: LogQuantCache(model.config)):
        first, second = make(), make()
        with torch.no_grad():
            model(ids[:, :100], **as_argument(first))
            model(ids[:, :100], **as_argument(second))
        got, _ = decode(compiled, first, ids[:, :110], 100)
        want, _ = decode(model, second, ids[:, :110], 100)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_gets_dequantised_tensors_in_one_graph(ids, implementation):
    """With one warning, which says what would be faster; padding is hidden by the mask, as without a compiler."""
    model = tiny_model()
    model.set_attn_implementation(implementation)
    mask = torch.cat([pad_mask([200, 150], "left"), torch.ones(2, 200, dtype=torch.long)], 1)
    # Plain pages, which are the same whatever the attention tells of its queries.
    cache = LogQuantCache(model.config, LogQuantConfig.paper(window=32))
    cache.set_padding(mask)
    _warn_dense.cache_clear()
    with torch.no_grad():
        model(ids[:, :200], attention_mask=mask[:, :200], **as_argument(cache))
    twin = copy.deepcopy(cache)
    program = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, graphs = decode(program, cache, ids[:, :270], 200, mask)
        want, _ = decode(model, twin, ids[:, :270], 200, mask)
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
    assert not counters["graph_break"] and graphs[-1] == graphs[3] <= 3, graphs
    told = [str(w.message) for w in caught if "torch.compile" in str(w.message)]
    assert len(told) == 1 and 'set_attn_implementation("logquant")' in told[0]
    assert [slots.packed for slots in cache.layers[0].rows.slots] == [
        slots.packed for slots in twin.layers[0].rows.slots
    ]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_too_may_be_compiled_with_other_attention(ids, implementation):
    model = tiny_model(num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    logits = []
    for forward in (torch.compile(model, backend="eager", dynamic=True), model):
        cache = LogQuantCache(model.config)
        with torch.no_grad():
            forward(ids[:, :50], **as_argument(cache))
        logits.append(decode(forward, cache, ids[:, :54], 50)[0])
        assert cache.get_seq_length() == 54
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[1].abs().max()


def test_a_mask_whose_memory_is_used_again_loses_no_token(ids):
    """As a CUDA graph's replay does it, or a compiler that has no further use for it."""
    model = tiny_model()
    model.set_attn_implementation("logquant")
    mask = torch.cat([pad_mask([300, 295], "left"), torch.ones(2, 1, dtype=torch.long)], 1)
    cache = LogQuantCache(model.config)
    with torch.no_grad():
        model(ids[:, :300], attention_mask=mask[:, :300], **as_argument(cache))
    layer = cache.layers[0]
    new = torch.randn(2, *layer.held.storage.window_k.shape[1::2]).unsqueeze(2)
    query = torch.randn(2, model.config.num_attention_heads, 1, new.shape[3])
    for tokens in ([301, 296], [302, 297]):
        seen = torch.cat([mask[:, :300], torch.ones(2, tokens[0] - 300, dtype=torch.long)], 1)[:, None, None].bool()
        key, _ = layer.update(new, new)
        key.kv_view.attend(AttentionCall(query, seen, 1.0))
        seen.fill_(False)
        layer.commit()
        assert [slots.tokens for slots in layer.rows.slots] == tokens


class Recorded(torch.nn.Module):
    """What a CUDA graph does, on a CPU: runs what was recorded, whatever Python would do now, into the same memory.

    What the last replay wrote is gone when the next one starts.
    """

    def __init__(self, part: fx.GraphModule) -> None:
        super().__init__()
        self.part, self.graph, self.outputs = part, None, ()
        self.replays = 0

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        assert all(isinstance(x, Tensor) for x in inputs), "a number among the inputs: every one would be recorded anew"
        if self.graph is None:
            self.graph = make_fx(lambda *x: self._tuple(self.part(*x)))(*inputs)
            self.outputs = tuple(x.clone() for x in self.graph(*inputs))
        else:
            self.replays += 1
            for x in self.outputs:
                x.fill_(float("nan") if x.is_floating_point() else -1)
            for x, new in zip(self.outputs, self.graph(*inputs), strict=True):
                x.copy_(new)
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]

    @staticmethod
    def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (x,) if isinstance(x, Tensor) else tuple(x)


@pytest.mark.parametrize("quantization", [{}, {"param_bits": 16, "key_columns": 1}], ids=["searched", "plain"])
def test_cuda_graphs_of_what_lies_between_the_operators_decode_the_same(ids, quantization):
    """``mode="reduce-overhead"`` cuts a graph at operators that no CUDA graph may hold, and captures the parts.

    Without a mask: its length is a number among what the first part is given, for which each is recorded anew.
    """
    unsafe, recorded = [], []

    def piecewise(gm: fx.GraphModule, _: list[Tensor]) -> fx.GraphModule:
        part_of, part = {}, 0
        for node in gm.graph.nodes:
            if cut := is_cudagraph_unsafe_fx_node(node):
                unsafe.append(str(node.target))
                part += 1
            part_of[node] = part
            part += cut
        split = split_module(gm, None, part_of.__getitem__, keep_original_order=True)
        for name, child in split.named_children():
            if not any(is_cudagraph_unsafe_fx_node(node) for node in child.graph.nodes):
                recorded.append(Recorded(child))
                setattr(split, name, recorded[-1])
        return split

    model = tiny_model()
    model.set_attn_implementation("logquant")
    cache = LogQuantCache(model.config, **quantization)
    with torch.no_grad():
        model(ids[:, :300], **as_argument(cache))
    twin = copy.deepcopy(cache)
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=piecewise), fullgraph=True)

    def step(forward, cache, t: int) -> Tensor:
        with torch.no_grad():
            return forward(ids[:, t : t + 1], position_ids=torch.full((2, 1), t), **as_argument(cache)).logits.clone()

    for t in range(300, 340):
        got, want = step(compiled, cache, t), step(model, twin, t)
        assert (got - want).abs().max() < 1e-4 * want.abs().max(), t
    layers = len(cache.layers)
    assert set(unsafe) == {"logquant.update_layer.default", "logquant.attend_layer.default"}
    # One part before each layer's attention and one after the last; the second step makes a second program.
    assert len(recorded) == 2 * (layers + 1)
    assert sum(part.replays for part in recorded) == 40 * (layers + 1) - len(recorded)
    assert cache.layers[0].rows.packed > 64, "the cache evicted meanwhile"


def test_a_compiled_cache_is_freed_with_its_last_user(ids):
    model = tiny_model()
    model.set_attn_implementation("logquant")
    cache = LogQuantCache(model.config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        model(ids[:, :300], **as_argument(cache))
        compiled(ids[:, 300:301], **as_argument(cache))
    layer = cache.layers[0]
    assert layer.compiled_view is not None and copy.deepcopy(cache).layers[0].compiled_view is None
    view, layer = weakref.ref(layer.compiled_view), weakref.ref(layer)
    cache.reset()
    gc.collect()
    assert view() is None
    del cache
    gc.collect()
    assert layer() is None
