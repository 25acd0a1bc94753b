"""Units and how they are printed."""

from __future__ import annotations

GIB = 1024**3
