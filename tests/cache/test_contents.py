"""What a layer can be asked, which of its rows are kept, and that nothing can be written past it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from logquant import LogQuantCache
from logquant.attention.call import AttentionCall
from tests.helpers.layers import make_layer, random_tokens
from tests.helpers.masks import causal_mask, pad_mask
from tests.helpers.models import family_config

SELECTIONS = {
    "tuple": (0, 2),
    "list": [2, 0],
    "slice": slice(0, 2),
    "step": slice(None, None, 2),
    "int": 1,
    "negative": -1,
    "tensor": torch.tensor([2, 2, 1]),
    "mask": torch.tensor([True, False, True]),
    "list of bools": [False, True, False],
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_rows_are_selected_as_a_dynamic_layer_selects_them(selection, padded):
    k, v = random_tokens(250, batch=3)
    layer, dense = make_layer(bits=8), DynamicLayer()
    keys, _ = layer.update(k, v)
    if padded:
        mask = causal_mask(pad_mask([250, 240, 230], "left"), 250)
        keys.kv_view.attend(AttentionCall(k, mask, 1.0))
    layer.commit()
    dense.update(layer.keys.clone(), layer.values.clone())
    layer.batch_select_indices(selection)
    dense.batch_select_indices(selection)
    want = dense.keys if dense.keys.dim() == 4 else dense.keys[None]
    assert torch.equal(layer.keys, want) and layer.batch_size == len(want)


@pytest.mark.parametrize("nothing", [[], (), slice(0, 0), torch.tensor([], dtype=torch.long)], ids=str)
def test_a_layer_without_rows_is_empty(nothing):
    k, v = random_tokens(250, batch=3)
    layer = make_layer()
    layer.update(k, v)
    layer.batch_select_indices(nothing)
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    layer.update(k[:2], v[:2])
    assert layer.get_seq_length() == 250 and layer.batch_size == 2


WRITES = {
    "assignment": lambda layer: setattr(layer, "keys", layer.keys.clone()),
    "assignment of values": lambda layer: setattr(layer, "values", layer.values.clone()),
    "an element": lambda layer: layer.keys.__setitem__(0, 1.0),
    "in place": lambda layer: layer.keys.mul_(2),
    "operator": lambda layer: layer.values.__iadd__(1.0),
    "out": lambda layer: torch.add(layer.keys, 1.0, out=layer.keys),
    "a view": lambda layer: layer.keys[0, :, :10].zero_(),
    "a view of parts": lambda layer: layer.values.unbind(1)[0].copy_(layer.values[:, 0]),
    "functional": lambda layer: torch.nn.functional.relu(layer.keys, inplace=True),
    "data": lambda layer: layer.keys.data.zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_that_would_be_lost_is_refused(write):
    k, v = random_tokens(250)
    layer = make_layer()
    layer.update(k, v)
    before = layer.keys.clone()
    with pytest.raises(RuntimeError, match=r"cannot be written: use update\(\), crop\(\)"):
        write(layer)
    assert torch.equal(layer.keys, before)


def test_what_is_read_from_a_layer_is_a_plain_tensor_as_soon_as_it_is_ones_own():
    k, v = random_tokens(250)
    layer = make_layer()
    layer.update(k, v)
    for own in (layer.keys.clone(), layer.keys + 1, torch.cat([layer.keys, layer.keys]), copy.deepcopy(layer.keys)):
        own.mul_(2)
        own[0] = 0
        assert not own[0].any()
    other = torch.zeros_like(k)
    other.copy_(layer.keys)
    other += layer.keys
    assert torch.equal(other, 2 * layer.keys) and type(layer.keys.mean()) is torch.Tensor


def test_a_model_without_full_attention_is_told_that_nothing_is_saved():
    with pytest.warns(UserWarning, match="no layer of this model has full attention") as warned:
        LogQuantCache(family_config("mistral"))
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LogQuantCache(family_config("gemma3_text"))
