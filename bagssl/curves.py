"""Curves of a training as small SVGs in the colour of the text around them: no axes, from lowest to highest."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]


def points(rows: Sequence[Mapping[str, float]], x: str, y: str) -> list[Point]:
    """What rows of a history say of `y` over `x`, where it is a finite number. Raises for rows that say no numbers."""
    places = [(float(row[x]), float(row[y])) for row in rows if y in row]
    return [place for place in places if math.isfinite(place[1])]


def thinned(places: Sequence[Point], most: int) -> list[Point]:
    """About `most` of so many points, evenly taken; the lowest, the highest and the last stay."""
    if len(places) <= most:
        return list(places)
    by_height = sorted(range(len(places)), key=lambda i: places[i][1])
    stay = {*range(0, len(places), math.ceil(len(places) / most)), len(places) - 1, by_height[0], by_height[-1]}
    return [places[i] for i in sorted(stay)]


def curve(places: Sequence[Point], label: str, width: int = 160, height: int = 48) -> str:
    """An SVG of points, two or more; nothing for fewer."""
    if len(places) < 2:
        return ""
    across, up = zip(*places, strict=True)
    first, low, span, reach = across[0], min(up), (across[-1] - across[0]) or 1, (max(up) - min(up)) or 1
    line = " ".join(f"{width * (x - first) / span:.1f},{height * (1 - (y - low) / reach):.1f}" for x, y in places)
    view = f'viewBox="-2 -2 {width + 4} {height + 4}" role="img" aria-label="{escape(label)}"'
    drawn = f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" {view}>{drawn}</svg>'
