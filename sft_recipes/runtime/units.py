"""Units, and how durations are printed."""

from __future__ import annotations

GIB = 1024**3


def format_duration(seconds: float) -> str:
    """Format a duration: `0.8 s`, `45 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
