"""Settings within settings: ``name(key=value;key=value)``, as in ``recall=both(pages=0.25;skip=2)``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CALL = re.compile(r"([\w-]+)(?:\((.*)\))?")


def parse_nested(what: str, text: str) -> tuple[str, dict[str, str]]:
    """The name and what stands in the brackets after it.

    Args:
        what: whose settings they are, for messages.
        text: the setting.

    Raises:
        ValueError: another form, or a key that is given twice.
    """
    call = _CALL.fullmatch(text)
    if call is None:
        raise ValueError(f"{what} must be name or name(key=value;key=value), got {text!r}")
    given: dict[str, str] = {}
    for setting in filter(None, (call[2] or "").split(";")):
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ValueError(f"{call[1]} needs key=value, got {setting!r}")
        if key in given:
            raise ValueError(f"{key} of {call[1]} must be given once")
        given[key] = value
    return call[1], given


def read_settings(what: str, given: Mapping[str, str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """Settings as what they are.

    Args:
        what: whose they are, for messages.
        given: what :func:`parse_nested` found in the brackets.
        kinds: of each setting that there is: ``float``, ``int`` or ``str``.

    Raises:
        ValueError: a setting that there is not, or a value of another kind.
    """
    if unknown := sorted(given.keys() - kinds):
        known = f"must be one of {', '.join(kinds)}" if kinds else "is not needed"
        raise ValueError(f"a setting of {what} {known}, got {', '.join(unknown)}")
    found: dict[str, Any] = {}
    for name, value in given.items():
        try:
            found[name] = kinds[name](value)
        except ValueError:
            kind = "number" if kinds[name] is float else "whole number"
            raise ValueError(f"{name} of {what} must be a {kind}, got {value!r}") from None
    return found
