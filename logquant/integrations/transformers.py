"""``logquant.enable(model)``: the LogQuant cache as the one that a model's ``generate`` makes by itself."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, PreTrainedModel

from ..cache.cache import LogQuantCache
from ..compat import CACHE, from_arguments
from ..config import LogQuantConfig

_ATTRIBUTE = "_logquant_enabled"


def enable(model: PreTrainedModel, quantization: LogQuantConfig | None = None, **options: Any) -> None:
    """Make ``model.generate`` use a LogQuant cache wherever it would make a ``DynamicCache``.

    Sets the attention implementation ``"logquant"``, too, if the model can take it, and tells LogQuant caches which
    columns are padding and which are drafts whenever the model is called, so that every attention implementation keeps
    rows apart, and drafts that come with a prompt see what they would after it. A cache given to ``generate``, or
    another ``cache_implementation``, is used as always. Calling it again changes the settings; :func:`disable` undoes
    it.

    Args:
        model: any model of transformers that generates.
        quantization: what to keep exact and how to store the rest.
        **options: fields of :class:`logquant.LogQuantConfig` given directly, as in ``enable(model, bits=4)``.

    Raises:
        TypeError: not a model, ``quantization`` together with ``options``, or an unknown option.
        ValueError: an invalid option, or a head dimension that pages cannot hold; the model is unchanged then.
    """
    if not isinstance(model, PreTrainedModel) or not type(model).can_generate():
        raise TypeError(f"model must be a model of transformers that generates, got {type(model).__name__}")
    settings = LogQuantCache(model.config, quantization, **options).quantization
    disable(model)
    # mypy takes every attribute of a module for a tensor.
    methods: Any = model
    prepare = methods._prepare_cache_for_generation

    def prepare_cache(generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any) -> Any:
        makes_dynamic_cache = (
            model_kwargs.get(CACHE) is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "dynamic")
            and methods._supports_default_dynamic_cache()
        )
        if not makes_dynamic_cache:
            return prepare(generation_config, model_kwargs, *args)
        cache: Any = LogQuantCache(model.config, settings)
        if model.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE] = cache
        return None

    hook = model.register_forward_pre_hook(_tell_cache, with_kwargs=True)
    previous = model.config._attn_implementation
    # A model without interchangeable attention keeps its own: the cache is dequantised for it, with a warning.
    with contextlib.suppress(ValueError, NotImplementedError):
        model.set_attn_implementation("logquant")
    methods._prepare_cache_for_generation = prepare_cache
    setattr(model, _ATTRIBUTE, (hook, previous))


def disable(model: PreTrainedModel) -> None:
    """Undo :func:`enable`; a model without it stays as it is."""
    if not hasattr(model, _ATTRIBUTE):
        return
    hook, previous = getattr(model, _ATTRIBUTE)
    hook.remove()
    del model._prepare_cache_for_generation
    delattr(model, _ATTRIBUTE)
    model.set_attn_implementation(previous)


def _tell_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache, name = from_arguments(kwargs), "attention_mask"
    if isinstance(cache, EncoderDecoderCache):
        cache, name = cache.self_attention_cache, "decoder_attention_mask"
    mask = kwargs.get(name)
    if isinstance(cache, LogQuantCache):
        cache.set_padding(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        # A forward pass that verifies drafts wants the logits of the token before them and of each draft.
        logits = kwargs.get("logits_to_keep")
        cache.set_drafts(logits - 1 if isinstance(logits, int) and logits > 0 else None)
