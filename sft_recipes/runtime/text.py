"""Text of unknown origin: what a terminal would interpret is escaped, nested values get dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def escape_unprintable(text: str, keep: str = "") -> str:
    """Replace unprintable characters, such as terminal control sequences, by `\\xNN`.

    Args:
        keep: characters to leave unchanged, such as newlines.
    """
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)


def flatten(value: Any, prefix: str = "", keep_empty: bool = False) -> dict[str, Any]:
    """Return the values of nested mappings by dotted name; empty mappings only if `keep_empty`."""
    if not isinstance(value, Mapping) or (keep_empty and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key), keep_empty))
    return flat
