"""A compressed model: what it computes, with every cache, and what it holds."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import logquant
from logquant import LogQuantCache
from logquant.cache.sizes import head_nbytes
from logquant.compat import as_argument
from logquant.lowrank import compress, load, save
from logquant.lowrank.attention import LowRankAttention
from logquant.lowrank.positions import key_positions
from logquant.methods.accounting import cache_nbytes
from logquant.methods.registry import parse_cache
from logquant.plan import sequence_nbytes
from tests.helpers.layers import PLAIN
from tests.helpers.masks import pad_mask
from tests.helpers.models import family_config, generate, logits_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
}
OWN: dict[str, dict] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 24},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
SHARES = [(0.5, 1.0), (1.0, 0.5), ((1.0, 0.25), 0.5)]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 255, (2, 400), generator=torch.Generator().manual_seed(0))


def family_model(family: str) -> nn.Module:
    """Of three layers with heads of 32 channels; mixtures have experts that all take part."""
    settings: dict = {"num_hidden_layers": 3, "initializer_range": 0.2, "head_dim": 32, **OWN[family]}
    config = AutoConfig.for_model(family, **SMALL | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="logquant").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def widened(small: nn.Module, model: nn.Module) -> nn.Module:
    """The original model with the weights that those of low rank stand for, biases as they were."""
    twin = copy.deepcopy(model)
    for full, layer in zip(twin.model.layers, small.model.layers, strict=True):
        new, old = layer.self_attn, full.self_attn
        if not isinstance(new, LowRankAttention):
            continue
        heads, group = new.kv_heads, new.num_key_value_groups
        if new.rank < new.head_dim:
            # What the first query head of each KV head reads tells what its values have become.
            down = new.v_proj.weight.double().unflatten(0, (heads, -1))
            read = old.o_proj.weight.double().unflatten(1, (heads, group, -1))[:, :, 0]
            absorbed = new.o_proj.weight.double().unflatten(1, (heads, group, -1))[:, :, 0]
            up = [torch.linalg.lstsq(read[:, h], absorbed[:, h]).solution for h in range(heads)]
            old.v_proj.weight.data = torch.cat([up[h] @ down[h] for h in range(heads)]).float()
        if new.k_up is not None:
            old.k_proj.weight.data = new.k_up.weight @ new.k_proj.weight
    return twin


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize(("values", "keys"), [(0.5, 1.0), (0.5, 0.5)])
def test_it_computes_what_the_original_computes_with_such_weights(ids, family, values, keys):
    model = family_model(family)
    small = compress(copy.deepcopy(model), values, keys, [ids[:, :100]])
    with torch.no_grad():
        want = widened(small, model)(ids[:, :60]).logits
    for portions in ([60], [40, *[1] * 5, 15]):
        for make in (DynamicCache, LogQuantCache):
            for name in ("logquant", "sdpa", "eager"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Mistral's layers all slide; attention "eager" is dequantised
                    got = logits_of(small, make(config=small.config), ids[:, :60], portions, name)
                assert torch.allclose(got, want, atol=2e-3, rtol=1e-3)


def test_off_is_the_model_that_it_was(ids):
    model = tiny_model()
    small = compress(copy.deepcopy(model), 1.0, 1.0, [ids])
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert small.config.to_dict() == model.config.to_dict()
    caches = [LogQuantCache(m.config) for m in (model, small)]
    outputs = [
        logits_of(m, c, ids[:, :260], [250, *[1] * 10], "logquant") for m, c in zip((model, small), caches, strict=True)
    ]
    assert torch.equal(*outputs)
    for before, after in zip(model.parameters(), small.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(("values", "keys"), SHARES)
def test_attention_over_pages_is_that_over_their_tokens(ids, values, keys):
    """Fused or not, "logquant" and "sdpa" give what "eager" gives over dequantised tokens."""
    small = compress(tiny_model(), values, keys, [ids])
    outputs = []
    for name in ("logquant", "sdpa", "eager"):
        cache = LogQuantCache(small.config, **PLAIN | {"rule": "recent"})
        outputs.append(logits_of(small, cache, ids, [330, *[1] * 10, 20, 20], name))
        assert cache.layers[0].rows.packed
    for other in outputs[1:]:
        assert torch.allclose(outputs[0], other, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("name", ["recent", "logquant"])
@pytest.mark.parametrize(("values", "keys"), SHARES)
def test_bytes_are_those_of_the_ranks_and_of_the_plan(ids, values, keys, name):
    small = compress(tiny_model(num_hidden_layers=3), values, keys)
    cache = parse_cache(name).make(small.config)
    logits_of(small, cache, ids[:1], [400], "logquant")
    held = small.config.lowrank
    for layer, rank, latents in zip(cache.layers, held["values"], held["keys"], strict=True):
        assert (layer.format.head_dim, layer.format.value_dim) == ((latents or 64) // 2, rank)
        if name == "recent":
            asked = 2 if latents is None else 0
            assert layer.nbytes == 2 * head_nbytes(
                cache.quantization, 400, (latents or 64) // 2, rank, 4, query_heads=asked
            )
    assert cache.nbytes == sequence_nbytes(parse_cache(name), small.config, 400, 4)
    full = DynamicCache(config=small.config)
    logits_of(small, full, ids[:1], [400], "logquant")
    assert cache_nbytes(full) == sequence_nbytes(parse_cache("full"), small.config, 400, 4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("values", "keys"), SHARES)
def test_a_padded_row_is_as_if_alone(ids, values, keys, side):
    """Also with padding in the middle of a row, which generated tokens follow."""
    small = compress(tiny_model(), values, keys)
    logquant.enable(small, rule="recent")
    mask = torch.cat([pad_mask([300, 211], side), torch.ones(2, 40, dtype=torch.long)], 1)
    caches = [LogQuantCache(small.config, rule="recent"), DynamicCache(config=small.config)]
    for cache in caches:
        together = run(small, cache, ids[:, :340], mask, [300, *[1] * 10, 30])
        for row in range(2):
            real = mask[row].bool()
            prompt = int(real[:300].sum())
            alone_ids = ids[row : row + 1, :340][:, real]
            like = type(cache)(config=small.config, **({"rule": "recent"} if isinstance(cache, LogQuantCache) else {}))
            alone = run(small, like, alone_ids, torch.ones_like(alone_ids), [prompt, *[1] * 10, 30])
            assert torch.allclose(together[row, real], alone[0], atol=2e-3, rtol=1e-3)


def run(model, cache, ids: Tensor, mask: Tensor, portions: list[int]) -> Tensor:
    """Logits, with positions as ``generate`` counts them."""
    positions, first, out = (mask.cumsum(1) - 1).clamp_min(0), 0, []
    with torch.no_grad():
        for n in portions:
            part = slice(first, first + n)
            given = {"attention_mask": mask[:, : first + n], "position_ids": positions[:, part]}
            out.append(model(ids[:, part], **given, **as_argument(cache)).logits)
            first += n
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    ("values", "keys", "rule"), [(0.5, 1.0, "attention"), (0.5, 1.0, "recent"), ((1.0, 0.25), 0.5, "recent")]
)
def test_generation_beams_copies_and_files_of_caches(ids, tmp_path, values, keys, rule):
    small = compress(tiny_model(), values, keys, [ids])
    small.set_attn_implementation("logquant")
    prompt = ids[:1, :30].repeat(1, 10)
    greedy = generate(small, prompt, LogQuantCache(small.config, rule=rule))
    drafted = generate(small, prompt, LogQuantCache(small.config, rule=rule), prompt_lookup_num_tokens=4)
    assert torch.equal(greedy, drafted)
    assert generate(small, prompt, LogQuantCache(small.config, rule=rule), num_beams=3).shape == greedy.shape
    cache = LogQuantCache(small.config, rule=rule)
    logits_of(small, cache, ids, [320], "logquant")
    cache.save(tmp_path / "cache", small)
    swapped, twin = copy.deepcopy(cache), copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    others = [twin, LogQuantCache.load(tmp_path / "cache", small)]
    want = logits_of(small, cache, ids[:, 320:], [1] * 40, "logquant")
    assert all(torch.equal(want, logits_of(small, other, ids[:, 320:], [1] * 40, "logquant")) for other in others)
    got = logits_of(small, swapped, ids[:, 320:].flip(0), [1] * 40, "logquant").flip(0)
    assert torch.allclose(got, want, atol=1e-4)
    with pytest.raises(ValueError, match="was made by another model"):
        LogQuantCache.load(tmp_path / "cache", tiny_model())


@pytest.mark.parametrize("keys", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_compressed_model_compiles_in_one_graph_unless_keys_are_of_low_rank(ids, keys):
    small = compress(tiny_model(), 0.5, keys, data=[ids])
    small.set_attn_implementation("logquant")
    caches = [LogQuantCache(small.config) for _ in range(2)]
    for cache in caches:
        logits_of(small, cache, ids, [320], "logquant")
    compiled = torch.compile(small, fullgraph=keys == 1, backend="eager")
    with torch.no_grad():
        for i in range(320, 324):
            outputs = [
                m(ids[:, i : i + 1], **as_argument(c)).logits for m, c in zip((small, compiled), caches, strict=True)
            ]
            assert torch.allclose(*outputs, atol=1e-5)


def test_recall_and_pruning_go_along_where_keys_are_as_ever(ids):
    settings = {"rule": "recent", "prune": "snapkv(keep=0.6)", "recall": "both(pages=0.5;skip=0)"}
    small = compress(tiny_model(), 0.5)
    cache = LogQuantCache(small.config, **settings)
    out = logits_of(small, cache, ids, [380, *[1] * 20], "logquant")
    assert out.isfinite().all() and cache.layers[0].rows.slots[0].by_head.kept < 256
    small = compress(tiny_model(), 0.5, 0.5)
    with pytest.raises(RuntimeError, match="tell its queries, and has not"):
        logits_of(small, LogQuantCache(small.config, **settings), ids, [380], "logquant")


# ------------------------------------------------------------------------------------------------- the model's file
@pytest.mark.parametrize(("values", "keys", "family"), [(0.5, 1.0, "qwen2"), (1.0, 0.5, "llama"), (0.5, 0.5, "qwen2")])
def test_a_loaded_model_is_the_saved_one(ids, tmp_path, values, keys, family):
    model = family_model(family)
    small = compress(copy.deepcopy(model), values, keys, [ids])
    save(small, tmp_path / "lowrank")
    loaded = load(copy.deepcopy(model), tmp_path / "lowrank")
    assert loaded.config.lowrank == small.config.lowrank
    again = [loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))]
    with torch.no_grad():
        want = small(ids[:, :50]).logits
        assert all(torch.equal(want, other(ids[:, :50]).logits) for other in again)
    for other in again[1:]:
        assert other.model.layers[-1].self_attn._rotary[0] is other.model.rotary_emb


def test_files_of_other_models_and_damaged_ones_are_refused(ids, tmp_path):
    model = tiny_model()
    save(compress(copy.deepcopy(model), 0.5, 0.5), tmp_path / "lowrank")
    other = tiny_model(initializer_range=0.1)
    with pytest.raises(ValueError, match="was made of another model: its config differs"):
        load(other, tmp_path / "lowrank")
    assert not hasattr(other.config, "lowrank")
    LogQuantCache(model.config).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds no LogQuant lowrank"):
        load(model, tmp_path / "cache")
    raw = bytearray((tmp_path / "lowrank").read_bytes())
    raw[-10] ^= 1
    (tmp_path / "lowrank").write_bytes(raw)
    with pytest.raises(ValueError, match="is damaged"):
        load(model, tmp_path / "lowrank")
    assert not any(isinstance(module, LowRankAttention) for module in model.modules())
    with pytest.raises(ValueError, match="model must be compressed"):
        save(model, tmp_path / "lowrank")


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": 0}, "values must be a share of the channels above 0"),
        ({"values": 1.5}, "values must be a share"),
        ({"keys": (0.5, 0.75)}, "keys must be a share .* that of the first layer and a smaller one of the last"),
        ({"keys": True}, "keys must be a share"),
        ({"fit": "outputs"}, "data must be given for fit 'inputs' and 'outputs', and only then; got none"),
        ({"fit": "weights", "data": [torch.zeros(1, 5, dtype=torch.long)]}, "got some for 'weights'"),
        ({"fit": "best"}, "fit must be 'weights', 'inputs', 'outputs', got 'best'"),
        ({"data": []}, "data must hold tokens, got none"),
        ({"data": [torch.zeros(5, dtype=torch.long)]}, r"data must be token ids \[B, T\], got a tensor of shape \[5\]"),
    ],
)
def test_bad_settings_are_refused_and_the_model_stays(settings, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        compress(model, **settings)
    assert not hasattr(model.config, "lowrank")
    assert not any(isinstance(module, LowRankAttention) for module in model.modules())


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"model must have attention of LlamaAttention.* in all layers, got GPTNeoX"):
        compress(AutoModelForCausalLM.from_config(family_config("gpt_neox")))
    with pytest.raises(ValueError, match="heads of a multiple of 16 channels, got 24"):
        compress(tiny_model(head_dim=24))
    with pytest.raises(ValueError, match="model must be one that is not compressed yet"):
        compress(compress(tiny_model(), 0.5))


def test_keys_of_low_rank_need_a_mask_they_can_read(ids):
    for mask in (object(), torch.ones(1, 4)):
        with pytest.raises(
            ValueError, match="attention_mask must be a tensor over 5 tokens where keys are of low rank"
        ):
            key_positions(ids[:1, :5], mask, 5)


def test_positions_are_counted_back_from_the_newest_token_that_is_seen():
    new = torch.tensor([[7, 8]])
    assert key_positions(new, None, 5).tolist() == [[4, 5, 6, 7, 8]]
    seen = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0]])
    want = [[6, 7, 8], [5, 6, 7]]
    for mask in (
        seen,
        seen[:, None, None].bool(),
        torch.where(seen.bool(), 0.0, -1e38)[:, None, None].expand(-1, 4, 2, -1),
    ):
        found = key_positions(new, mask, 5)
        assert [row[m.bool()].tolist() for row, m in zip(found, seen, strict=True)] == want
