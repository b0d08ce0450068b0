"""Caches by name, as the command line takes them: ``logquant``, ``recent:window=128``, ``kivi:bits=4``, ``full``.

A method's own file registers its name (:func:`method`); importing :mod:`logquant.methods` imports all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..config import LogQuantConfig
from .layers.base import Settings


class _Method(NamedTuple):
    """What is registered under a name.

    Attributes:
        settings: makes them from options.
        options: that can be written after the name, and their types, as text.
    """

    settings: Callable[..., Settings]
    options: dict[str, str]


_METHODS: dict[str, _Method] = {}

_MakesSettings = TypeVar("_MakesSettings", bound=Callable[..., Settings])


def method(
    name: str, options: type | None = None, without: Collection[str] = ()
) -> Callable[[_MakesSettings], _MakesSettings]:
    """Register a method: a dataclass derived from :class:`Settings`, or a function that returns one.

    Args:
        name: what the command line calls it.
        options: the dataclass whose fields can be written after the name; by default what is decorated.
        without: fields that cannot.

    Raises:
        ValueError: a name that is taken.
    """

    def register(settings: _MakesSettings) -> _MakesSettings:
        if name in _METHODS:
            raise ValueError(f"method {name!r} is registered twice")
        fields = dataclasses.fields(options or settings)  # type: ignore[arg-type]
        _METHODS[name] = _Method(settings, {f.name: str(f.type) for f in fields if f.name not in without})
        return settings

    return register


def method_names() -> list[str]:
    """The names of all methods, in the order in which they were registered."""
    return list(_METHODS)


@dataclass(frozen=True)
class CacheSpec:
    """A named cache.

    Args:
        name: what it is called in tables and files.
        settings: how it is made.
    """

    name: str
    settings: Settings

    @property
    def quantization(self) -> LogQuantConfig | None:
        """The configuration of a LogQuant cache, None for others."""
        return self.settings.quantization

    @property
    def is_full(self) -> bool:
        """Whether it is the full-precision cache."""
        return self.settings.is_full

    @property
    def is_baseline(self) -> bool:
        """Whether it is neither a LogQuant cache nor the full one."""
        return self.quantization is None and not self.is_full

    def make(self, config: PreTrainedConfig) -> Cache:
        """An empty cache for a model with this configuration; raises as :meth:`Settings.make`."""
        return self.settings.make(config)

    def replace(self, **fields: float | str) -> CacheSpec:
        """The same cache with other settings.

        Raises:
            ValueError: settings that it does not have, or invalid ones.
        """
        if not fields:
            return self
        base, *_ = self.name.partition(":")
        given = settings_given(self.name) | fields
        return parse_cache(base + ":" + ",".join(f"{key}={value}" for key, value in given.items()))


# By the type of an option: how it is read, and what it must be.
_KINDS: dict[str, tuple[Callable[[str], float], str]] = {
    "bool": ({"True": True, "False": False}.__getitem__, "True or False"),
    "float": (float, "a number"),
    "int": (int, "a whole number"),
}


def settings_given(text: str) -> dict[str, float | str]:
    """The settings written after the colon."""
    name, _, settings = text.partition(":")
    options = _METHODS[name].options
    given: dict[str, float | str] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if not options:
            raise ValueError(f"cache {name!r} has no settings, got {key}")
        if key in given:
            raise ValueError(f"cache {text!r}: {key} must be given once")
        if key not in options:
            raise ValueError(f"cache {text!r}: a setting must be one of {', '.join(options)}, got {key!r}")
        if "str" in options[key]:
            given[key] = value
            continue
        read, what = _KINDS[next((kind for kind in _KINDS if kind in options[key]), "int")]
        try:
            given[key] = read(value)
        except (ValueError, KeyError):
            raise ValueError(f"cache {text!r}: {key} must be {what}, got {value!r}") from None
    return given


def parse_cache(text: str) -> CacheSpec:
    """The cache that a name stands for: ``NAME[:KEY=VALUE,...]``, keys being fields of its settings.

    Raises:
        FileNotFoundError: a setting names a file that is not there.
        ImportError: a cache of a package that is not installed.
        ValueError: an unknown name or key, or an invalid setting.
    """
    name, _, _ = text.partition(":")
    if name not in _METHODS:
        raise ValueError(f"cache must be one of {', '.join(_METHODS)}, got {name!r}")
    given = settings_given(text)
    try:
        return CacheSpec(text, _METHODS[name].settings(**given))
    except ValueError as error:
        raise ValueError(f"cache {text!r}: {error}") from None


def parse_caches(text: str) -> list[CacheSpec]:
    """Several caches, separated by commas; ``key=value`` after a comma belongs to the cache before it.

    Raises:
        ValueError: as :func:`parse_cache`, or the same cache twice.
    """
    names: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if "=" in part and ":" not in part and names:
            names[-1] += ("," if ":" in names[-1] else ":") + part
        else:
            names.append(part)
    if not names:
        raise ValueError(f"caches must name at least one of {', '.join(_METHODS)}, got {text!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"caches must differ, got {text!r}")
    return [parse_cache(name) for name in names]
