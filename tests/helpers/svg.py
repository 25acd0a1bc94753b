"""Read matplotlib's SVGs: the texts, and the curves and bars with their numbers of points."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

_NAMESPACE = "{http://www.w3.org/2000/svg}"
_SHAPES = ("line2d", "patch", "LineCollection", "PathCollection", "PolyCollection", "FillBetweenPolyCollection")


def texts(path: Path) -> list[str]:
    """Titles, axis labels, tick labels and legend entries, in the order of the file."""
    return ["".join(text.itertext()).strip() for text in ElementTree.parse(path).getroot().iter(f"{_NAMESPACE}text")]


def shapes(path: Path) -> list[tuple[str, int]]:
    """Kind and number of points of each curve, bar and collection inside the axes; ticks and legends are left out."""
    found = []
    for axes in ElementTree.parse(path).getroot().iter(f"{_NAMESPACE}g"):
        if not axes.get("id", "").startswith("axes_"):
            continue
        for group in axes:
            kind = re.sub(r"_\d+$", "", group.get("id", ""))
            if kind in _SHAPES:
                points = sum(len(re.findall("[ML]", shape.get("d", ""))) for shape in group.iter(f"{_NAMESPACE}path"))
                found.append((kind, points + sum(1 for _ in group.iter(f"{_NAMESPACE}use"))))
    return found
