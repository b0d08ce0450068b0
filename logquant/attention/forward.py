"""The attention function that is registered with transformers as ``"logquant"``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import compiled
from .call import AttentionCall
from .exact import exact_attention
from .handle import KVHandle
from .steps import NewToken
from .view import View


def logquant_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function ``"logquant"`` of transformers: fused over a LogQuant cache, exact over plain tensors.

    Raises:
        ValueError: dropout with a softcap, sinks or a cache.
    """
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    view: View | None = key if isinstance(key, NewToken) else key.kv_view if isinstance(key, KVHandle) else None
    if view is None and compiled.is_layer_id(key):
        return compiled.attend_layer(query, key, attention_mask, scale, softcap or 0.0, s_aux, causal), None
    if (view is None or view.plain) and not softcap and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"the logquant attention has no dropout, got {dropout}; call model.eval()")
    if (bias := kwargs.get("position_bias")) is not None:
        attention_mask, causal = create_position_bias_mask(bias, attention_mask, causal, query, key), False
    call = AttentionCall(query, attention_mask, scale, softcap or 0.0, s_aux, causal)
    out = exact_attention(call, key, value) if view is None else view.attend(call)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("logquant", logquant_attention_forward)
# Without this, masks silently become None: padding and causality would be ignored.
AttentionMaskInterface.register("logquant", sdpa_mask)
