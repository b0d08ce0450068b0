"""The rule ``attention``: which tokens stay exact follows from what was attended to, in each layer and sequence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

from logquant import LogQuantCache
from logquant.attention.call import AttentionCall
from logquant.attention.weights import given
from logquant.cache.chosen import importance
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from logquant.rule import RULES
from tests.helpers.layers import make_layer, random_tokens, row_contents
from tests.helpers.masks import causal_mask
from tests.helpers.models import generate, tiny_model

W, SINKS, SCALE = 64, 4, 0.3


def states(tokens: int, batch: int = 1, group: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; some keys are looked at by all queries."""
    k, v = random_tokens(tokens, batch=batch)
    (q, _) = random_tokens(tokens, batch=batch, heads=2 * group, seed=1)
    q[..., 0] += 4
    k[:, :, ::37, 0] += 5
    return q, k, v


def step(layer: LogQuantLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, _ = layer.update(k, v)
    return keys.kv_view.attend(AttentionCall(q, None, SCALE, causal=q.shape[2] > 1))


class Oracle:
    """The rule as issue and paper say it, token by token, for one sequence, from all queries and keys."""

    def __init__(self) -> None:
        self.packed: list[int] = []
        self.exact: list[int] = []
        self.sums = torch.zeros(2, 0)

    def arrive(self, q: Tensor, k: Tensor, v: Tensor, first: int, last: int) -> None:
        """Positions from ``first`` to before ``last`` come; tensors are ``[H, T, D]`` of the whole sequence."""
        self.exact += range(first, last)
        sums = torch.zeros(2, len(self.exact))
        sums[:, : self.sums.shape[1]] = self.sums
        at = torch.tensor(self.exact)
        for position in range(max(first, last - 64), last):
            seen = at <= position
            for head in range(q.shape[0]):
                own = head // (q.shape[0] // 2)
                weights = (SCALE * k[own, at[seen]] @ q[head, position]).softmax(0)
                sums[own, seen] += weights.square()
        self.sums = sums
        count = 0
        while len(self.exact) - count - SINKS >= 3 * W:
            count += W
        if not count:
            return
        cost = (sums.sqrt() * v[:, at].norm(dim=-1)).mean(0)
        newest = len(self.exact) - W
        least = sorted(range(SINKS, newest), key=lambda i: (cost[i].item(), i))[:count]
        leaving = sorted(least)
        for page in range(0, count, 64):
            self.packed += [self.exact[i] for i in sorted(leaving[page : page + 64], key=lambda i: -cost[i].item())]
        self.exact = [p for i, p in enumerate(self.exact) if i not in set(leaving)]
        self.sums = torch.zeros(2, 0)


PORTIONS = {
    "a prompt": [700],
    "steps": [300, *[1] * 260],
    "chunks": [100, 100, 100, 40, 230, 1, 1],
    "steps from the start": [1] * 420,
}


@pytest.mark.parametrize("portions", PORTIONS.values(), ids=PORTIONS)
def test_the_choice_is_that_of_the_rule(portions):
    q, k, v = states(sum(portions))
    layer, oracle, first = make_layer(rule="attention", sinks=SINKS), Oracle(), 0
    for n in portions:
        part = slice(first, first + n)
        step(layer, q[:, :, part], k[:, :, part], v[:, :, part])
        oracle.arrive(q[0], k[0], v[0], first, first + n)
        first += n
        layer.commit()
        table = layer.held.layout.positions(k.device)[0].tolist()
        assert table[layer.rows.packed :] == oracle.exact
        assert table[: layer.rows.packed] == oracle.packed
    heavy = set(range(0, sum(portions) - W, 37))
    assert len(heavy & set(oracle.exact)) > 0.8 * min(len(heavy), W), "what all look at stays"


@pytest.mark.parametrize("places", [[15, 31, 47, 63], [14, 15, 30, 31, 46, 47, 62, 63]], ids=len)
def test_fine_values_go_to_the_most_attended(places):
    q, k, v = states(700)
    tables, errors = [], []
    count = len(places)
    for fine in (0, count):
        layer = make_layer(rule="attention", sinks=SINKS, param_bits=8, fine_values=fine)
        step(layer, q, k, v)
        layer.commit()
        table = layer.held.layout.positions(k.device)[0, : layer.rows.packed].long()
        tables.append(table.view(-1, 64))
        errors.append((layer.values - v)[:, :, table].square().mean((0, 1, 3)).view(-1, 64).mean(0))
    others = [t for t in range(64) if t not in places]
    assert torch.equal(tables[1][:, places], tables[0][:, :count])
    assert torch.equal(tables[1][:, others], tables[0][:, count:])
    assert errors[1][places].mean() < errors[0][:count].mean() / 1.5, "they also make up for errors of earlier ones"


def test_contents_are_those_of_the_positions():
    """Pages hold the tokens that they say, and the window the others."""
    q, k, v = states(600, batch=2)
    layer = make_layer(rule="attention", bits=8)
    for part in (slice(0, 500), *(slice(t, t + 1) for t in range(500, 600))):
        step(layer, q[:, :, part], k[:, :, part], v[:, :, part])
    layer.commit()
    table = layer.held.layout.positions(k.device).long()
    assert not torch.equal(table[0], table[1]), "each row chooses for itself"
    for row in range(2):
        _, window_k, window_v = row_contents(layer, row)
        exact = table[row, layer.rows.packed :]
        assert torch.equal(window_k, k[row, :, exact]) and torch.equal(window_v, v[row, :, exact])
        assert table[row].sort().values.tolist() == list(range(600))
    assert (layer.keys - k).abs().amax() < 0.05


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("tokens", [10, 5000])
def test_given_is_the_sum_of_squared_weights(softcap, tokens):
    q, k, _ = states(tokens, group=3)
    q = q[:, :, -9:]
    scores = SCALE * q.unflatten(1, (2, 3)) @ k.mT.unsqueeze(2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.ones(9, tokens, dtype=torch.bool).triu(tokens - 9 + 1)
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1).square().sum((2, 3))
    torch.testing.assert_close(given(q, k, SCALE, softcap), want)
    nobody = torch.zeros(1, 9, tokens, dtype=torch.bool)
    assert not given(q, k, SCALE, softcap, nobody).any()


def test_importance_is_the_mean_of_heads_of_what_a_token_adds():
    sums, v = (
        torch.tensor([[[4.0, 0.0], [1.0, 9.0]]]),
        torch.tensor([[[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]]),
    )
    assert importance(sums, v).tolist() == [[(2 * 5 + 1 * 2) / 2, (0 + 3 * 1) / 2]]


def test_what_does_not_tell_its_queries_leaves_the_newest_exact_and_says_so():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 255, (1, 400), generator=torch.Generator().manual_seed(0))
    tables = []
    for rule in ("attention", "recent"):
        cache = LogQuantCache(model.config, rule=rule)
        with torch.no_grad():
            model(ids, **as_argument(cache))
        cache.commit()
        tables.append(cache.layers[1].held.layout.positions(ids.device)[0])
    assert torch.equal(tables[0][cache.layers[1].rows.packed :], tables[1][cache.layers[1].rows.packed :])


@pytest.mark.parametrize("left", [590, 450, 300, 150, 0])
def test_after_a_crop_the_choice_goes_on_from_what_is_left(left):
    """Pages made before the cut stay, tokens of later ones come back as they were packed, the others are exact."""
    q, k, v = states(900, batch=2)
    layer = make_layer(rule="attention", bits=8)
    for part in (slice(0, 400), *(slice(t, t + 1) for t in range(400, 600))):
        step(layer, q[:, :, part], k[:, :, part], v[:, :, part])
    layer.commit()
    before = layer.held.layout.positions(k.device)
    dense = layer.keys.clone()
    layer.crop(left - 600)
    assert layer.get_seq_length() == left
    after = layer.held.layout.positions(k.device)
    assert torch.equal(after[:, : layer.rows.packed], before[:, : layer.rows.packed])
    for row in after:
        assert row.sort().values.tolist() == list(range(left))
    assert torch.equal(layer.keys, dense[:, :, :left])
    for part in (slice(left, left + 200), *(slice(t, t + 1) for t in range(left + 200, left + 300))):
        step(layer, q[:, :, part], k[:, :, part], v[:, :, part])
    layer.commit()
    assert (layer.keys - k[:, :, : left + 300]).abs().amax() < 0.1


def test_rows_that_move_take_their_choice_along():
    q, k, v = states(500, batch=3)
    layer = make_layer(rule="attention")
    step(layer, q, k, v)
    layer.commit()
    before, twin = layer.held.layout.positions(k.device), copy.deepcopy(layer)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.held.layout.positions(k.device), before[[2, 0, 0]])
    layer.batch_select_indices([0])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.held.layout.positions(k.device), before[[2, 2]])
    assert torch.equal(layer.keys, twin.keys[[2, 2]])
    more = [x[:1, :, :100].repeat(2, 1, 1, 1) for x in (q, k, v)]
    step(layer, *more)
    layer.commit()
    table = layer.held.layout.positions(k.device)
    assert torch.equal(table[0], table[1])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 5}], ids=str)
def test_generation_that_takes_back_or_moves_tokens(options):
    """Prompt lookup gives the tokens of greedy decoding; beams the same through both implementations."""
    model = tiny_model()
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0)).repeat(1, 8)
    outs = []
    for own in ({}, options) if "num_beams" not in options else (options, options):
        model.set_attn_implementation("sdpa" if outs else "logquant")
        cache = LogQuantCache(model.config, rule="attention")
        outs.append(generate(model, ids, cache, max_new_tokens=150, **own))
    assert torch.equal(outs[0], outs[1])


def test_its_bytes_are_counted():
    q, k, v = states(5000)
    layer = make_layer(rule="attention")
    step(layer, q, k, v)
    layer.commit()
    chosen = layer.held.chosen
    assert chosen.nbytes == 2 * layer.rows.packed + 4 * layer.rows.exact * (1 + k.shape[1])
    assert chosen.packed.dtype == torch.int16
    assert layer.nbytes >= chosen.nbytes + layer.held.storage.nbytes


def padded_step(layer: LogQuantLayer, part: slice, real: Tensor, *tensors: Tensor) -> Tensor:
    """An update of positions of which ``real`` ``[B, T]`` hold tokens."""
    q, k, v = (x[:, :, part] for x in tensors)
    keys, _ = layer.update(k, v)
    mask = causal_mask(real[:, : part.stop].long(), part.stop - part.start)
    return keys.kv_view.attend(AttentionCall(q, mask, SCALE))


@pytest.mark.parametrize("rule", RULES)
def test_a_padded_prompt_alone_in_its_batch_is_dequantised(rule):
    q, k, v = states(300)
    real = torch.ones(1, 300, dtype=torch.bool)
    real[0, :50] = False
    layer = make_layer(rule=rule, bits=8)
    padded_step(layer, slice(0, 280), real, q, k, v)
    padded_step(layer, slice(280, 300), real, q, k, v)
    assert (layer.keys[:, :, 50:] - k[:, :, 50:]).abs().amax() < 0.05 and not layer.keys[:, :, :50].any()


def test_positions_are_right_after_padding_in_the_window():
    q, k, v = states(104, batch=2)
    real = torch.ones(2, 104, dtype=torch.bool)
    real[1, 100:102] = False
    layer = make_layer(rule="attention")
    for start, stop in ((0, 90), (90, 91), (91, 102), (102, 103), (103, 104)):
        padded_step(layer, slice(start, stop), real, q, k, v)
    layer.commit()
    assert layer.held.layout.positions(k.device)[1].tolist() == [*range(100), 102, 103, -1, -1]


def test_the_longest_row_may_go():
    q, k, v = states(200, batch=2)
    real = torch.ones(2, 200, dtype=torch.bool)
    real[1, 0] = False
    layer = make_layer(rule="attention", sinks=SINKS)
    padded_step(layer, slice(0, 196), real, q, k, v)
    layer.batch_select_indices([0])
    assert layer.held.layout.positions(k.device).shape == (1, 196)
    step(layer, q[:1, :, 196:], k[:1, :, 196:], v[:1, :, 196:])
    assert layer.get_seq_length() == 200


def test_a_row_that_loses_its_pages_forgets_their_positions():
    q, k, v = states(360, batch=2)
    real = torch.ones(2, 360, dtype=torch.bool)
    real[0, :60] = False
    layer = make_layer(rule="attention", bits=8)
    for start, stop in ((0, 250), (250, 300), (300, 360)):
        padded_step(layer, slice(start, stop), real, q, k, v)
    layer.crop(-73)
    table = layer.held.layout.positions(k.device)
    assert table.amax() == 286 and [(row >= 0).sum().item() for row in table] == [227, 287]
    assert (layer.keys[1] - k[1, :, :287]).abs().amax() < 0.05


@pytest.mark.parametrize("removed", [0, 5])
def test_a_crop_lets_the_rule_run_on_tokens_that_were_held_back(removed):
    q, k, v = states(300)
    layer = make_layer(rule="attention", sinks=SINKS)
    layer.activate_past_recording()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in (slice(0, 190), slice(190, 280), slice(280, 300)):
            step(layer, q[:, :, part], k[:, :, part], v[:, :, part])
        layer.crop(-removed)
    assert layer.rows.packed == 128 and layer.get_seq_length() == 300 - removed


def test_nothing_may_come_first():
    q, k, v = states(300)
    layer = make_layer(rule="attention")
    assert step(layer, q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (1, 4, 0, 64)
    step(layer, q, k, v)
    assert layer.get_seq_length() == 300


def test_the_choice_is_made_in_float32_and_outside_of_any_graph():
    q, k, v = states(300)
    tables = []
    for autocast in (False, True):
        layer = make_layer(rule="attention")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            step(layer, q, k.clone().requires_grad_(), v)
        layer.commit()
        assert not layer.held.chosen.given.requires_grad
        tables.append(layer.held.layout.positions(k.device))
    assert torch.equal(*tables)
