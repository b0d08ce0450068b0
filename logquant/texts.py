"""Text files in."""

from __future__ import annotations

from pathlib import Path


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        OSError: a file that cannot be read.
        ValueError: one that is not UTF-8, or holds nothing but white space.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{file} must be text in UTF-8, got byte 0x{byte:02x} at {error.start:,}") from None
    if not text.strip():
        raise ValueError(f"{file} must hold text, got none")
    return text
