"""Settings within settings: ``name(key=value;key=value)``, as in ``recall=both(pages=0.25;skip=2)``."""

from __future__ import annotations

import re

_CALL = re.compile(r"(\w+)(?:\((.*)\))?")


def parse_nested(text: str) -> tuple[str, dict[str, str]]:
    """The name and what stands in the brackets after it.

    Raises:
        ValueError: another form, or a key that is given twice.
    """
    call = _CALL.fullmatch(text)
    if call is None:
        raise ValueError(f"name or name(key=value;key=value) is needed, got {text!r}")
    given: dict[str, str] = {}
    for setting in filter(None, (call[2] or "").split(";")):
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ValueError(f"{call[1]} needs key=value, got {setting!r}")
        if key in given:
            raise ValueError(f"{key} of {call[1]} must be given once")
        given[key] = value
    return call[1], given
