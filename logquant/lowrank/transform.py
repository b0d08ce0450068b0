"""The transform of a model, and its file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files import fingerprint, read, write
from .attention import FAMILIES, LowRankAttention
from .factors import factors, root, second_moments
from .ranks import STEP, Share, check_share, cumulated, layer_ranks

KIND, VERSION = "lowrank", 1
FITS = ("weights", "inputs", "outputs")


@dataclass(frozen=True)
class _Place:
    """Where an attention module is: an attribute of a layer of the model."""

    layer: nn.Module
    name: str
    rotary: nn.Module

    @property
    def attention(self) -> Any:
        return getattr(self.layer, self.name)

    def replace(self, by: LowRankAttention) -> None:
        setattr(self.layer, self.name, by.train(self.layer.training))


def _places(model: PreTrainedModel) -> list[_Place]:
    """The attention modules of a model, in order.

    Raises:
        ValueError: a model that has others, or that is compressed already.
    """
    body: Any = model.get_decoder()
    found: list[_Place] = []
    for layer in getattr(body, "layers", ()):
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, LowRankAttention):
            raise ValueError("model must be one that is not compressed yet")
        if type(attention).__name__ in FAMILIES:
            found.append(_Place(layer, "self_attn", body.rotary_emb))
    if not found or len(found) != len(body.layers):
        names = ", ".join(FAMILIES)
        raise ValueError(f"model must have attention of {names} in all layers, got {type(model).__name__}")
    if (dim := found[0].attention.head_dim) % STEP:
        raise ValueError(f"model must have heads of a multiple of {STEP} channels, got {dim}")
    return found


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    values: Share = 0.75,
    keys: Share = 1.0,
    data: Iterable[Tensor] | None = None,
    fit: str | None = None,
) -> PreTrainedModel:
    """Have a model cache fewer channels of values, and of keys; changed in place, for good.

    Values are of low rank for each KV head, and ``o_proj`` absorbs it: attention costs less and stays fused. Keys are
    of low rank for all KV heads of a layer together, and are made of their latents anew in every forward pass, which
    is slow (:class:`.attention.LowRankAttention`). Where all channels stay, a layer is not changed at all.

    Args:
        model: of Llama's family, :data:`.attention.FAMILIES`.
        values: the share of channels that values keep, the same in all layers; or that of the first and of the last
            layer, between which LoRC's progressive ranks go down with the condition numbers of the weights. Rounded to
            the nearest multiple of 16 channels for each KV head, which pages need, and at least that.
        keys: the same for keys.
        data: token ids ``[B, T]`` of texts like those that the model will see, without padding; some thousand tokens.
        fit: what low rank is to be near to: ``"weights"``, as in LoRC (arXiv 2410.03111); ``"inputs"``: what the
            weights make of data, as in SVD-LLM (arXiv 2403.07378); ``"outputs"``, the default with data: for values
            also what ``o_proj`` makes of that. ``"weights"`` is the default without data.

    Returns:
        The model.

    Raises:
        ValueError: another family, a bad share or fit, ``data`` missing or not asked for. The model is unchanged then.
    """
    fit = fit or ("weights" if data is None else "outputs")
    if fit not in FITS:
        raise ValueError(f"fit must be {', '.join(map(repr, FITS))}, got {fit!r}")
    if (data is None) != (fit == "weights"):
        came = "none" if data is None else "some"
        raise ValueError(f"data must be given for fit 'inputs' and 'outputs', and only then; got {came} for {fit!r}")
    check_share("values", values)
    check_share("keys", keys)
    places = _places(model)
    ranks, key_ranks = _ranks(places, values, keys)
    of, moments = fingerprint(model), [None] * len(places)
    if data is not None:
        moments = second_moments(model, [place.attention.v_proj for place in places], data)  # type: ignore[assignment]
    found = [
        _compressed(place, rank, key_rank, None if moment is None else root(moment), by_output=fit == "outputs")
        for place, rank, key_rank, moment in zip(places, ranks, key_ranks, moments, strict=True)
    ]
    _replace(model, places, found, {"model": of, "values": ranks, "keys": key_ranks})
    return model


def _compressed(
    place: _Place, rank: int, key_rank: int | None, inputs: Tensor | None, *, by_output: bool
) -> LowRankAttention:
    """What is to take the place of a layer's attention."""
    full = place.attention
    new = LowRankAttention(full, place.rotary, rank, key_rank, value_bias=full.v_proj.bias is not None)
    if rank < full.head_dim:
        _compress_values(full, new, inputs, by_output=by_output)
    if new.k_up is not None:
        assert key_rank is not None
        up, down = factors(full.k_proj.weight, key_rank, inputs)
        new.k_up.weight.copy_(up)
        new.k_proj.weight.copy_(down)
        if new.k_up.bias is not None:
            new.k_up.bias.copy_(full.k_proj.bias)
    return new


def _replace(
    model: PreTrainedModel, places: list[_Place], found: list[LowRankAttention], described: dict[str, Any]
) -> None:
    """Put those that differ from the original into their places.

    The configuration tells the ranks, so that files of caches know this model from the original.
    """
    changed = [(place, new) for place, new in zip(places, found, strict=True) if _replaced(new)]
    for place, new in changed:
        place.replace(new)
    if changed:
        model.config.get_text_config(decoder=True).lowrank = described


def _ranks(places: list[_Place], values: Share, keys: Share) -> tuple[list[int], list[int | None]]:
    """Of each layer the channels of a value, and the latents of all keys; None where keys are as ever."""
    conditions = [0.0] * len(places)
    if isinstance(values, tuple) or isinstance(keys, tuple):
        conditions = cumulated([(p.attention.k_proj.weight, p.attention.v_proj.weight) for p in places])
    dim = places[0].attention.head_dim
    all_keys = places[0].attention.k_proj.out_features
    ranks = layer_ranks(values, dim, STEP, conditions)
    key_ranks = layer_ranks(keys, all_keys, STEP * all_keys // dim, conditions)
    return ranks, [rank if rank < all_keys else None for rank in key_ranks]


def _compress_values(full: Any, new: LowRankAttention, inputs: Tensor | None, *, by_output: bool) -> None:
    """Set ``v_proj`` and ``o_proj``, one KV head after the other."""
    rank, dim, group = new.rank, full.head_dim, full.num_key_value_groups
    out = full.o_proj.weight.unflatten(1, (-1, group, dim))  # [hidden, H, g, D]
    down = new.v_proj.weight.unflatten(0, (-1, rank))
    absorbed = new.o_proj.weight.unflatten(1, (-1, group, rank))
    for head, weight in enumerate(full.v_proj.weight.unflatten(0, (-1, dim))):
        readers = out[:, head]
        seen = root(torch.einsum("ngi,ngj->ij", *[readers.double()] * 2)) if by_output else None
        up, down[head] = factors(weight, rank, inputs, seen)
        absorbed[:, head] = readers @ up
    if new.o_proj.bias is not None:
        bias = torch.zeros_like(new.o_proj.bias) if full.o_proj.bias is None else full.o_proj.bias.clone()
        if full.v_proj.bias is not None:
            # The weights of attention add up to 1.
            bias += torch.einsum("nhgd,hd->n", out, full.v_proj.bias.unflatten(0, (-1, dim)))
        new.o_proj.bias.copy_(bias)


def _replaced(attention: LowRankAttention) -> list[str]:
    """The parts of an attention module that are not those of the original."""
    values = ["v_proj", "o_proj"] if attention.rank < attention.head_dim else []
    return values + (["k_proj", "k_up"] if attention.key_rank is not None else [])


def save(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Write the weights that :func:`compress` has replaced to a safetensors file, and the ranks.

    Args:
        model: a compressed model.
        path: where to. A file that is there is replaced once the new one is complete.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
        ValueError: a model that is not compressed.
    """
    described = getattr(model.config.get_text_config(decoder=True), "lowrank", None)
    if described is None:
        raise ValueError("model must be compressed by logquant.lowrank.compress, got one that is not")
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(model.get_decoder().layers):
        if isinstance(layer.self_attn, LowRankAttention):
            for part in _replaced(layer.self_attn):
                own = getattr(layer.self_attn, part).state_dict()
                tensors |= {f"layers.{i}.{part}.{name}": t.cpu().contiguous() for name, t in own.items()}
    write(path, KIND, tensors, {"version": VERSION, **described})


@torch.no_grad()
def load(model: PreTrainedModel, path: str | os.PathLike[str]) -> PreTrainedModel:
    """Do to a model what was done to the one that :func:`save` has written; in place.

    Args:
        model: the original, not compressed.
        path: the file.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one of another version, or of another model. The model is unchanged then.
    """
    tensors, described = read(path, KIND, VERSION)
    places = _places(model)
    for part, digest in fingerprint(model).items():
        if described["model"].get(part) != digest:
            raise ValueError(f"{path} was made of another model: its {part} differs from that of the model given")
    found: list[LowRankAttention] = []
    for i, place in enumerate(places):
        rank, key_rank = described["values"][i], described["keys"][i]
        biased = f"layers.{i}.o_proj.bias" in tensors
        new = LowRankAttention(place.attention, place.rotary, rank, key_rank, value_bias=biased)
        for part in _replaced(new):
            prefix = f"layers.{i}.{part}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            getattr(new, part).load_state_dict(own)
        found.append(new)
    _replace(model, places, found, {name: described[name] for name in ("model", "values", "keys")})
    return model
