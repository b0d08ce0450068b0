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
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.compiled import _warn_dense
from logquant.cache.layer import LogQuantLayer
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
        pytest.param("tiny", False, marks=pytest.mark.slow),
        pytest.param("gemma2", True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", True, marks=pytest.mark.slow),
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


# --------------------------------------------------------------------------------------------- a cache of fixed size
def prefilled(model, ids: Tensor, mask: Tensor | None, **options) -> LogQuantCache:
    cache = LogQuantCache(model.config, **options)
    with torch.no_grad():
        seen = None if mask is None else mask[:, : ids.shape[1]]
        model(ids, attention_mask=seen, **as_argument(cache))
    return cache


def mask_of(padded: bool) -> Tensor | None:
    return torch.cat([pad_mask([300, 250], "left"), torch.ones(2, 200, dtype=torch.long)], 1) if padded else None


RULES_AND_BITS = ("attention", 2), ("log", 8), ("recent", 2)


@pytest.mark.parametrize(
    ("family", "rule", "bits", "padded"),
    [
        *(("tiny", *rule, padded) for rule in RULES_AND_BITS for padded in (False, True)),
        pytest.param("gemma2", "attention", 2, False, marks=pytest.mark.slow),
        pytest.param("gemma2", "log", 8, True, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_fixed_size_is_one_graph_without_python(ids, family, rule, bits, padded):
    """No recompilation as the context grows, evictions or not, and nothing that a CUDA graph cannot hold."""
    if family == "tiny":
        model = tiny_model()
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(family)).eval()
    model.set_attn_implementation("logquant")
    mask, options = mask_of(padded), {"rule": rule, "bits": bits}
    cache = prefilled(model, ids[:, :300], mask, **options, max_length=512)
    grows = prefilled(model, ids[:, :300], mask, **options)
    unsafe: list[str] = []

    def look(gm: fx.GraphModule, _: list[Tensor]) -> fx.GraphModule:
        unsafe.extend(str(node.target) for node in gm.graph.nodes if is_cudagraph_unsafe_fx_node(node))
        return gm

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=look), fullgraph=True)

    def forward(*args, **kwargs):
        cache.make_room()
        return compiled(*args, **kwargs)

    got, graphs = decode(forward, cache, ids[:, :440], 300, mask)
    want, _ = decode(model, grows, ids[:, :440], 300, mask)
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
    assert not counters["graph_break"] and not unsafe
    # A padding mask grows, so that its length is symbolic from the second step on. And the sliding layers of
    # transformers, which gemma2 has, are told by a number whether they are full.
    assert graphs[-1] == graphs[3] <= (1 if mask is None and family == "tiny" else 2), graphs
    with torch.no_grad():
        cache.reset()
        model(ids[:, :300], attention_mask=None if mask is None else mask[:, :300], **as_argument(cache))
    again, more = decode(forward, cache, ids[:, :310], 300, mask)
    assert torch.equal(again, got[:, :10]) and more[-1] == graphs[-1], "another text is not another program"
    got, _ = decode(forward, cache, ids[:, :440], 310, mask)
    layer, other = (next(x for x in c.layers if isinstance(x, LogQuantLayer)) for c in (cache, grows))
    assert layer.length == 440 and layer.rows.packed == other.rows.packed == 256


@pytest.mark.parametrize("padded", [False, True])
def test_the_recorded_step_is_replayed_with_its_inputs_overwritten(ids, padded):
    """As a CUDA graph does it: all of the step is one recording, with tensors that stay where they are."""
    model = tiny_model()
    model.set_attn_implementation("logquant")
    recorded: list[Recorded] = []

    def record(gm: fx.GraphModule, _: list[Tensor]) -> Recorded:
        recorded.append(Recorded(gm))
        return recorded[-1]

    cache, grows = (prefilled(model, ids[:, :300], mask_of(padded), max_length=n) for n in (512, None))
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    token, position = torch.empty(2, 1, dtype=torch.long), torch.empty(2, 1, dtype=torch.long)
    seen = torch.zeros(2, 1, 1, 512, dtype=torch.bool) if padded else None
    addresses = [t.data_ptr() for layer in cache.layers for t in vars(layer.steps).values() if isinstance(t, Tensor)]
    for t in range(300, 440):
        token.copy_(ids[:, t : t + 1])
        position.fill_(t)
        if padded:
            seen[:, 0, 0, : t + 1] = mask_of(True)[:, : t + 1].bool()
        cache.make_room()
        with torch.no_grad():
            got = compiled(token, attention_mask=seen, position_ids=position, **as_argument(cache)).logits
            mask = None if seen is None else seen[..., : t + 1]
            want = model(token, attention_mask=mask, position_ids=position, **as_argument(grows)).logits
        assert (got - want).abs().max() < 1e-3 * want.abs().max(), t
    assert len(recorded) == 1 and recorded[0].replays == 139
    after = [t.data_ptr() for layer in cache.layers for t in vars(layer.steps).values() if isinstance(t, Tensor)]
    assert after == addresses


@pytest.mark.slow
def test_generate_compiles_a_cache_of_fixed_size_by_itself(ids):
    model = tiny_model()
    model.set_attn_implementation("logquant")
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # as on a GPU
    want, got = (
        model.generate(
            ids[:, :300],
            attention_mask=mask_of(True)[:, :300],
            **as_argument(LogQuantCache(model.config, max_length=512 if compiles else None)),
            max_new_tokens=100,
            do_sample=False,
            pad_token_id=0,
            **({"compile_config": config} if compiles else {}),
        )
        for compiles in (False, True)
    )
    assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_other_attention_gets_all_positions_of_a_cache_of_fixed_size(ids):
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    mask = mask_of(True)
    # Plain pages, which are the same whatever the attention tells of its queries.
    plain = LogQuantConfig.paper(window=32)
    cache, grows = (prefilled(model, ids[:, :300], mask, quantization=plain, max_length=n) for n in (512, None))
    grows.set_padding(mask)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def forward(*args, **kwargs):
        cache.make_room()
        return compiled(*args, **kwargs)

    got, graphs = decode(forward, cache, ids[:, :400], 300, mask)
    model.set_attn_implementation("eager")  # which gets dequantised tensors, too
    want, _ = decode(model, grows, ids[:, :400], 300, mask)
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
    assert graphs[-1] <= 2 and not counters["graph_break"]
    cache.commit()
    grows.commit()
    assert cache.layers[0].rows.packed_counts == grows.layers[0].rows.packed_counts
