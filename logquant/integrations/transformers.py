"""``logquant.enable(model)``: the LogQuant cache as the one that a model's ``generate`` makes by itself."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..cache.cache import LogQuantCache
from ..compat import CACHE, from_arguments
from ..config import LogQuantConfig

_ATTRIBUTE = "_logquant_enabled"
IMPLEMENTATION = "logquant"


def enable(
    model: nn.Module,
    quantization: LogQuantConfig | None = None,
    *,
    page_directory: str | os.PathLike[str] | None = None,
    **options: Any,
) -> None:
    """Make ``generate`` use a LogQuant cache wherever it would make a ``DynamicCache``.

    Sets the attention implementation ``"logquant"``, too, if the model can take it, and tells LogQuant caches which
    columns are padding and which are drafts whenever the model is called, so that every attention implementation keeps
    rows apart, and drafts that come with a prompt see what they would after it. A LogQuant cache that the model throws
    away, as Phi-3 does where its text passes the switch of its rotary factors, is emptied and filled again. A cache
    given to ``generate``, or another ``cache_implementation``, is used as always; so is the paged cache of
    ``generate_batch``, with a warning. Calling it again changes the settings; :func:`disable` undoes it. Copies of the
    model, and what pickle makes of it, are enabled, too; ``save_pretrained`` writes nothing of it.

    Args:
        model: a model of transformers that generates, or a module that holds some, as a ``PeftModel`` does or a model
            made of several: all of them are enabled.
        quantization: what to keep exact and how to store the rest.
        page_directory: as of a :class:`logquant.LogQuantCache`.
        **options: fields of :class:`logquant.LogQuantConfig` given directly, as in ``enable(model, bits=4)``.

    Raises:
        TypeError: no model that generates, ``quantization`` together with ``options``, an unknown option, or a
            ``max_length``: these caches grow.
        ValueError: an invalid option, or a head dimension that pages cannot hold; the model is unchanged then.
        NotADirectoryError: no such ``page_directory``.
    """
    if "max_length" in options:
        raise TypeError(
            f"enable makes caches that grow, got max_length={options['max_length']!r}: give generate a "
            "LogQuantCache(model.config, max_length=...)"
        )
    models = list(_generating(model)) if isinstance(model, nn.Module) else []
    if not models:
        raise TypeError(f"model must be a model of transformers that generates, got {type(model).__name__}")
    caches = [LogQuantCache(m.config, quantization, page_directory=page_directory, **options) for m in models]
    disable(model)
    # Before any is changed, since a model may hold another.
    enabled = [_Enabled(m, cache.quantization, page_directory) for m, cache in zip(models, caches, strict=True)]
    for one in enabled:
        one.install()


def disable(model: nn.Module) -> None:
    """Undo :func:`enable`; a model without it stays as it is, and so does an attention implementation set since."""
    for one in _generating(model):
        if hasattr(one, _ATTRIBUTE):
            getattr(one, _ATTRIBUTE).remove()


def _generating(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The models in a module that have transformers' own ``generate``; SpeechT5, for one, has another."""
    return (m for m in module.modules() if isinstance(m, PreTrainedModel) and isinstance(m, GenerationMixin))


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that say which attention a model and its parts use."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: PreTrainedConfig) -> None:
        found[id(config)] = config
        for name in config.sub_configs:
            if isinstance(part := getattr(config, name, None), PreTrainedConfig):
                add(part)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            add(module.config)
    return list(found.values())


class _Enabled:
    """What :func:`enable` changes about one model: a hook, three methods and the attention implementation.

    It is made of what pickles and copies, and goes along where the model does.

    Args:
        model: the model.
        settings, page_directory: of the caches to make.
    """

    def __init__(
        self, model: PreTrainedModel, settings: LogQuantConfig, page_directory: str | os.PathLike[str] | None
    ) -> None:
        self.model, self.settings, self.page_directory = model, settings, page_directory
        self.attention = [(config, config._attn_implementation) for config in _configs(model)]
        # Another library may have replaced a method of this one model before.
        self.replaced: dict[str, Any] = {}

    def install(self) -> None:
        self.hook = self.model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        # A model without interchangeable attention keeps its own: the cache is dequantised for it, with a warning.
        with contextlib.suppress(ValueError, NotImplementedError):
            self.model.set_attn_implementation(IMPLEMENTATION)
        self._replace("_prepare_cache_for_generation", self.prepare_cache)
        self._replace("prepare_inputs_for_generation", self.prepare_inputs)
        self._replace("init_continuous_batching", self.init_continuous_batching)
        setattr(self.model, _ATTRIBUTE, self)

    def remove(self) -> None:
        self.hook.remove()
        for name, before in self.replaced.items():
            vars(self.model).pop(name, None)
            if before is not None:
                setattr(self.model, name, before)
        for config, before in self.attention:
            if config._attn_implementation == IMPLEMENTATION:
                config._attn_implementation = {"": before}  # of this configuration alone, without its parts
        delattr(self.model, _ATTRIBUTE)

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        self.replaced[name] = vars(self.model).get(name)
        # generate looks at the signature of the method that it calls.
        own = functools.update_wrapper(functools.partial(method), getattr(type(self.model), name), updated=())
        own.__wrapped__ = self._original(name)  # type: ignore[attr-defined]
        setattr(self.model, name, own)

    def _original(self, name: str) -> Callable[..., Any]:
        """The method that was in the place of ours."""
        before = self.replaced[name]
        method: Callable[..., Any] = getattr(type(self.model), name).__get__(self.model) if before is None else before
        return method

    def cache(self, inputs: dict[str, Any]) -> LogQuantCache | EncoderDecoderCache:
        """A new cache for a model that is called with these inputs."""
        cache = self._new()
        return self.in_two_parts(cache) if self._has_cross_attention(inputs) else cache

    def _new(self) -> LogQuantCache:
        return LogQuantCache(self.model.config, self.settings, page_directory=self.page_directory)

    def in_two_parts(self, cache: LogQuantCache) -> EncoderDecoderCache:
        """With another cache for cross-attention, whose keys and values never grow."""
        return EncoderDecoderCache(cache, DynamicCache(config=self.model.config.get_text_config(decoder=True)))

    def _has_cross_attention(self, inputs: dict[str, Any]) -> bool:
        return self.model.config.is_encoder_decoder or inputs.get("encoder_outputs") is not None

    # -------------------------------------------------------------------------------------------------- in their place
    def prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = from_arguments(model_kwargs)
        if isinstance(given, LogQuantCache) and self._has_cross_attention(model_kwargs):
            # Whisper would throw away a cache that is not of two parts; others would mix them.
            model_kwargs[CACHE] = self.in_two_parts(given)
        result = self._original("_prepare_cache_for_generation")(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE)
        if given is not None or generation_config.cache_implementation not in (None, "dynamic"):
            return result
        if isinstance(made, EncoderDecoderCache) and type(made.self_attention_cache) is DynamicCache:
            made.self_attention_cache = self._new()
        elif type(made) is DynamicCache:
            made = model_kwargs[CACHE] = self.cache(model_kwargs)
        else:
            return result
        if generation_config.is_assistant:
            made.activate_past_recording()
        return result

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inputs of the next forward pass; a LogQuant cache that is thrown away is filled again instead."""
        prepare = self._original("prepare_inputs_for_generation")
        given = from_arguments(kwargs)
        cache = _self_attention(given)
        if not isinstance(cache, LogQuantCache):
            return prepare(*args, **kwargs)  # type: ignore[no-any-return]
        with cache.left_behind.expected():
            inputs: dict[str, Any] = prepare(*args, **kwargs)
        if from_arguments(inputs) is not None:
            return inputs
        # All of the text comes again, with its images; some models would go on with the newest token alone.
        again = {"next_sequence_length": None, "is_first_iteration": kwargs.get("inputs_embeds") is None}
        inputs = prepare(*args, **{name: value for name, value in kwargs.items() if value is not given} | again)
        speculative = any(getattr(layer, "record_past", False) for layer in cache.layers)
        cache.reset()
        if speculative:
            cache.activate_past_recording()
        return inputs | {CACHE: given}

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What ``generate_batch`` begins with: it has a paged cache of its own, and attention that knows pages."""
        warnings.warn(
            "continuous batching (generate_batch) keeps keys and values in a paged cache of its own, in full "
            "precision: logquant.enable(model) has no effect on it",
            RuntimeWarning,
            stacklevel=2,
        )
        begin = self._original("init_continuous_batching")
        model = self.model
        if model.config._attn_implementation != IMPLEMENTATION:
            return begin(*args, **kwargs)
        before = next(name for config, name in self.attention if config is model.config)
        model.set_attn_implementation("sdpa" if before in (None, IMPLEMENTATION) else before)
        try:
            manager = begin(*args, **kwargs)
        except BaseException:
            model.set_attn_implementation(IMPLEMENTATION)
            raise
        manager._original_attn_impl = IMPLEMENTATION  # which it sets again when it stops
        return manager

    # ------------------------------------------------------------------------------------------------------- the hook
    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Tell a LogQuant cache what comes, or give one to a forward pass that is to make a cache by itself."""
        cache, name = from_arguments(kwargs), "attention_mask"
        if cache is None and self._makes_a_cache(args, kwargs):
            cache = self.cache(kwargs)
            kwargs = {key: value for key, value in kwargs.items() if key != "past_key_values"} | {CACHE: cache}
        if isinstance(cache, EncoderDecoderCache):
            name = "decoder_attention_mask"
        mask, own = kwargs.get(name), _self_attention(cache)
        if not isinstance(own, LogQuantCache):
            return None
        own.set_padding(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        # A forward pass that verifies drafts wants the logits of the token before them and of each draft.
        logits = kwargs.get("logits_to_keep")
        own.set_drafts(logits - 1 if isinstance(logits, int) and logits > 0 else None)
        return args, kwargs

    def _makes_a_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a forward pass without a cache will make a ``DynamicCache``, as for ``guidance_scale``."""
        model: Any = self.model
        if kwargs.get("use_cache") is not True or model.training or not model._supports_default_dynamic_cache():
            return False
        names = list(inspect.signature(model.forward).parameters)
        return CACHE in names and names.index(CACHE) >= len(args)


def _self_attention(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
