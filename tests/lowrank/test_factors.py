"""Ranks and factors are those that the papers state, in every layer and head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from logquant.lowrank import compress
from logquant.lowrank.factors import factors, root
from logquant.lowrank.ranks import layer_ranks
from tests.helpers.lowrank import moments, progressive, truncated, whitened
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 255, (2, 300), generator=torch.Generator().manual_seed(0))


def check_all_weights(model, fit: str, values: float | tuple, keys: float | tuple, data: Tensor) -> None:
    """Every layer and head: what the compressed model computes from an input is what the oracle's weights compute."""
    small = compress(copy.deepcopy(model), values, keys, None if fit == "weights" else [data], fit)
    seen = moments(model, data)
    dim, group = model.config.head_dim, model.config.num_attention_heads // model.config.num_key_value_heads
    weights = [(x.self_attn.k_proj.weight, x.self_attn.v_proj.weight) for x in model.model.layers]

    def ranks(share: float | tuple, size: int, step: int) -> list[int]:
        if isinstance(share, tuple):
            return progressive(weights, share[0] * size, share[1] * size, step)
        return [round(share * size / step) * step] * len(weights)

    heads = model.config.num_key_value_heads
    value_ranks, key_ranks = ranks(values, dim, 16), ranks(keys, heads * dim, 16 * heads)
    for i, (layer, before, moment) in enumerate(zip(small.model.layers, model.model.layers, seen, strict=True)):

        def near(weight: Tensor, rank: int, moment: Tensor = moment) -> Tensor:
            return truncated(weight, rank) if fit == "weights" else whitened(weight, rank, moment)

        new, old = layer.self_attn, before.self_attn
        out = old.o_proj.weight.double().split(dim, 1)
        absorbed = new.o_proj.weight.double().split(value_ranks[i], 1)
        down = new.v_proj.weight.double().split(value_ranks[i], 0)
        for query_head in range(len(out)):
            head = query_head // group
            want = near(old.v_proj.weight[head * dim : (head + 1) * dim], value_ranks[i])
            assert torch.allclose(absorbed[query_head] @ down[head], out[query_head] @ want, atol=1e-5, rtol=1e-4)
        if key_ranks[i] < heads * dim:
            assert new.k_proj.out_features == key_ranks[i]
            made = new.k_up.weight.double() @ new.k_proj.weight.double()
            assert torch.allclose(made, near(old.k_proj.weight, key_ranks[i]), atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(new.k_proj.weight, old.k_proj.weight)


@pytest.mark.parametrize("fit", ["weights", "inputs"])
@pytest.mark.parametrize(("values", "keys"), [(0.5, 1.0), (0.75, 0.5), ((1.0, 0.25), (0.75, 0.25))])
def test_every_layer_and_head_has_the_weights_of_the_paper(ids, fit, values, keys):
    model = tiny_model(num_hidden_layers=4, num_attention_heads=8, head_dim=64, hidden_size=128)
    check_all_weights(model, fit, values, keys, ids)


@pytest.mark.slow
def test_so_has_a_real_model(smollm2, smollm2_tokenizer, data_dir):
    text = (data_dir / "dev/books/frankenstein_84.txt").read_text()[:8000]
    ids = smollm2_tokenizer(text, return_tensors="pt").input_ids[:, :1500]
    check_all_weights(smollm2, "inputs", (1.0, 0.5), 0.75, ids)


def test_by_outputs_the_error_is_the_least_there_is(ids):
    """What is left out are the smallest singular values of what ``o_proj`` makes of values; no rank does better."""
    model = tiny_model(num_attention_heads=8)
    by_outputs, by_inputs = (compress(copy.deepcopy(model), 0.5, data=[ids], fit=fit) for fit in ("outputs", "inputs"))
    for i, (moment, layer) in enumerate(zip(moments(model, ids), model.model.layers, strict=True)):
        full, c = layer.self_attn, root(moment)
        out, value = (
            full.o_proj.weight.double().unflatten(1, (2, 4, 32)),
            full.v_proj.weight.double().unflatten(0, (2, 32)),
        )
        for head in range(2):
            read = torch.cat([out[:, head, q] for q in range(4)])
            left_out = torch.linalg.svdvals(read @ value[head] @ c)[16:].square().sum()
            errors = []
            for small in (by_outputs, by_inputs):
                new = small.model.layers[i].self_attn
                absorbed = new.o_proj.weight.double().unflatten(1, (2, 4, 16))
                made = (
                    torch.cat([absorbed[:, head, q] for q in range(4)]) @ new.v_proj.weight.double()[16 * head :][:16]
                )
                errors.append(((read @ value[head] - made) @ c).square().sum())
            assert torch.allclose(errors[0], left_out, rtol=1e-2) and errors[0] < errors[1]


def test_factors_of_full_rank_are_the_matrix():
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 30, generator=random), torch.randn(100, 30, generator=random)
    seen, read = root(x.T @ x / 100), root(torch.diag(torch.arange(1.0, 13)))
    for inputs, outputs in ((None, None), (seen, None), (seen, read)):
        up, down = factors(weight, 12, inputs, outputs)
        assert torch.allclose(up @ down, weight, atol=1e-4)


def test_ranks_of_layers_of_equal_condition_are_the_first():
    assert layer_ranks((0.5, 0.25), 64, 16, [0.0, 0.0]) == [32, 32]
    assert layer_ranks((1.0, 0.25), 64, 16, [4.0, 3.0, 1.0]) == [64, 48, 16]
    assert layer_ranks(0.01, 64, 16, [4.0, 3.0, 1.0]) == [16, 16, 16]
