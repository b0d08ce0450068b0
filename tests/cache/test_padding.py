"""Padded batches: a row's tokens depend neither on its neighbours nor on its padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from logquant import LogQuantCache
from logquant.attention.call import AttentionCall
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from logquant.rule import RULES
from tests.helpers.layers import feed, make_layer, random_tokens, row_contents
from tests.helpers.masks import causal_mask, pad_mask
from tests.helpers.models import tiny_model

LENGTHS = [400, 131, 7, 399, 250, 192, 64, 1]


def step(layer: LogQuantLayer, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One update, attended to by queries that are the keys."""
    keys, _ = layer.update(k, v)
    return keys.kv_view.attend(AttentionCall(k, mask, 0.1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_a_padded_row_holds_what_it_holds_alone(side, rule):
    """Bit for bit: pages, window, and the number of tokens that the rule saw; through a prompt, steps and a turn."""
    new = [max(LENGTHS), 1, 1, *[1] * 70, 90, 1, 1]
    k, v = random_tokens(sum(new), batch=len(LENGTHS))
    padding = torch.cat([pad_mask(LENGTHS, side), torch.ones(len(LENGTHS), sum(new[1:]), dtype=torch.long)], 1)
    turn = slice(new[0] + 72, new[0] + 162)
    padding[:, turn] = pad_mask([90, 33, 90, 1, 0, 64, 2, 89], side)
    layer = make_layer(rule=rule)
    outputs, first = [], 0
    for n in new:
        part = slice(first, first + n)
        first += n
        outputs.append(step(layer, k[:, :, part], v[:, :, part], causal_mask(padding[:, :first], n)))
    together = torch.cat(outputs, 2)
    for row, real in enumerate(padding.bool()):
        alone, own_k, own_v = make_layer(rule=rule), k[row : row + 1, :, real], v[row : row + 1, :, real]
        ends = real.cumsum(0)[torch.tensor(new).cumsum(0) - 1].tolist()
        own = []
        for start, end in zip([0, *ends], ends, strict=False):
            if end > start:
                mask = torch.ones(end, end, dtype=torch.bool).tril()[None, None, start:]
                own.append(step(alone, own_k[:, :, start:end], own_v[:, :, start:end], mask))
        for got, want in zip(row_contents(layer, row), row_contents(alone, 0), strict=True):
            assert torch.equal(got, want)
        assert torch.allclose(together[row, :, real], torch.cat(own, 2)[0], atol=1e-5)
        dense, want = layer.dense()[0][row], alone.dense()[0][0]
        assert torch.equal(dense[:, real], want) and (dense[:, ~real] == 0).all()


def test_rows_move_and_are_cropped_with_their_own_state():
    padding = pad_mask([300, 200, 100], "left")
    k, v = random_tokens(300, batch=3)
    layer = make_layer()
    step(layer, k, v, causal_mask(padding, 300))
    layer.reorder_cache(torch.tensor([1, 0, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 1, 5, 4]))
    assert [s.tokens for s in layer.rows.slots] == [200, 200, 300, 300] and layer.batch_size == 4
    layer.crop(-50)
    assert [s.tokens for s in layer.rows.slots] == [150, 150, 250, 250] and layer.get_seq_length() == 250
    for row, (source, tokens) in enumerate([(1, 150), (1, 150), (0, 250), (0, 250)]):
        fresh = make_layer()
        fresh.update(k[source : source + 1, :, 250 - tokens : 250], v[source : source + 1, :, 250 - tokens : 250])
        assert torch.equal(row_contents(layer, row)[0], row_contents(fresh, 0)[0])
    layer.batch_select_indices(torch.tensor([2]))
    assert layer.rows.alike, "nothing is left of the padding"
    feed(layer, k[:1], v[:1], [300])
    assert layer.get_seq_length() == 550


def test_padding_that_a_later_mask_shows_is_refused_and_nothing_changes():
    k, v = random_tokens(60, batch=2)
    layer = make_layer()
    step(layer, k[:, :, :50], v[:, :, :50], causal_mask(pad_mask([50, 40], "left"), 50))
    keys, _ = layer.update(k[:, :, 50:51], v[:, :, 50:51])
    for mask in (None, torch.ones(2, 1, 1, 51, dtype=torch.bool)):
        with pytest.raises(ValueError, match="attention_mask must hide position 0 of row 1"):
            keys.kv_view.attend(AttentionCall(k[:, :, 50:51], mask, 1.0))
    layer.commit()
    assert layer.get_seq_length() == 51 and [s.tokens for s in layer.rows.slots] == [51, 41]


@pytest.mark.parametrize("implementation", ["logquant", "sdpa", "eager"])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("rule", ["log", "attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_row_are_those_of_the_row_alone(implementation, bits, rule, side):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    lengths = [300, 170, 64, 290]
    ids = torch.randint(0, 256, (4, 300), generator=torch.Generator().manual_seed(0))
    more = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(1))
    padding = torch.cat([pad_mask(lengths, side), torch.ones(4, 40, dtype=torch.long)], 1)
    positions = (padding.cumsum(1) - 1).clamp_min(0)

    def logits(ids: Tensor, padding: Tensor, positions: Tensor, portions: list[int]) -> Tensor:
        cache, first, out = LogQuantCache(model.config, bits=bits, rule=rule), 0, []
        cache.set_padding(padding if implementation == "eager" else None)
        for n in portions:
            part = slice(first, first := first + n)
            with torch.no_grad():
                out.append(
                    model(
                        ids[:, part],
                        attention_mask=padding[:, :first],
                        position_ids=positions[:, part],
                        **as_argument(cache),
                    ).logits
                )
        return torch.cat(out, 1)

    together = logits(torch.cat([ids, more], 1), padding, positions, [300] + [1] * 30 + [10])
    for row, length in enumerate(lengths):
        own = torch.cat([ids[row, padding[row, :300].bool()], more[row]])[None]
        alone = logits(own, torch.ones_like(own), torch.arange(own.shape[1])[None], [length] + [1] * 30 + [10])
        got = together[row, padding[row].bool()]
        assert (got - alone[0]).abs().max() < 1e-3 * alone.abs().max()


def test_a_custom_mask_of_four_dimensions():
    """Two sequences packed into one row, apart by the mask alone, and a column that nobody sees."""
    model = tiny_model()
    model.set_attn_implementation("logquant")
    ids = torch.randint(0, 256, (1, 250), generator=torch.Generator().manual_seed(0))
    seen = torch.ones(250, 250, dtype=torch.bool).tril()
    seen[120:, :120] = False
    seen[:, 77] = False
    float_mask = torch.zeros(1, 1, 250, 250).masked_fill(~seen, torch.finfo(torch.float32).min)
    results = []
    for make in (LogQuantCache, lambda config, **_: DynamicCache(config=config)):
        cache, out = make(model.config, bits=8), []
        for part in (slice(0, 200), *(slice(i, i + 1) for i in range(200, 240)), slice(240, 250)):
            with torch.no_grad():
                mask = float_mask[:, :, part, : part.stop]
                out.append(model(ids[:, part], attention_mask=mask, **as_argument(cache)).logits)
        results.append(torch.cat(out, 1))
    keep = torch.arange(250) != 77
    assert (results[0] - results[1])[:, keep].abs().mean() < 5e-3 * results[1][:, keep].abs().mean()


def test_padding_that_has_not_been_committed_is_0_and_not_saved():
    padding = pad_mask([300, 200], "left")
    padding = torch.cat([padding, torch.tensor([[1], [0]])], 1)
    k, v = random_tokens(301, batch=2)
    layer = make_layer()
    step(layer, k[:, :, :300], v[:, :, :300], causal_mask(padding[:, :300], 300))
    step(layer, k[:, :, 300:], v[:, :, 300:], causal_mask(padding, 1))
    assert layer.uncommitted is not None
    for x, given in zip(layer.dense(), (k, v), strict=True):
        assert torch.equal(x[0, :, 300], given[0, :, 300]) and not x[1, :, 300].any() and not x[1, :, :100].any()
    tensors, _ = layer.state()
    assert not tensors["window_k"][1, :, layer.rows.slots[1].exact :].any()
    assert not tensors["pages"][1, :, layer.rows.slots[1].packed // 64 :].any()
