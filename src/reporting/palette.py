"""Colours of reports: one look for each variant, two themes, and the scale of heat maps.

The seven hues of variants stay apart under protan-, deutan- and tritanopia, and have a contrast of at least 3.5 to the paper, in the
light theme and in the dark one. Nothing is told by colour alone: every variant has a marker of its own as well, and from the
eighth on another dash. Figures name colours by tokens ("@v0", "@ink", "@v0/0.2" with opacity), which the page replaces by
those of the theme that is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HUES = {
    "light": ("#0b5c9e", "#d06a00", "#0b8f7a", "#c554a6", "#7a6c00", "#8b70ea", "#3f454c"),
    "dark": ("#3f98f0", "#ffb070", "#2ed3b7", "#d868ba", "#a79c10", "#c9beff", "#e9ebee"),
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "paper": "#fbfaf8",
        "panel": "#ffffff",
        "ink": "#1b1d20",
        "muted": "#5a5f67",
        "line": "#e4e1db",
        "faint": "#f2f0ec",
        "accent": "#0b5c9e",
        "good": "#0a6148",
        "good-paper": "#ddefe6",
        "bad": "#9b2c1a",
        "bad-paper": "#f8e2dc",
        "unsure": "#5d5338",
        "unsure-paper": "#efeadb",
    },
    "dark": {
        "paper": "#15171a",
        "panel": "#1c1f23",
        "ink": "#e8e9eb",
        "muted": "#a3a9b1",
        "line": "#31353b",
        "faint": "#202328",
        "accent": "#6fb2f5",
        "good": "#7fdcb8",
        "good-paper": "#17352b",
        "bad": "#ff9f8d",
        "bad-paper": "#40201a",
        "unsure": "#d9cfae",
        "unsure-paper": "#34301f",
    },
}
for _theme, _hues in HUES.items():
    THEMES[_theme] |= {f"v{i}": hue for i, hue in enumerate(_hues)}

# What lies between low and high in OKLCH (lightness, chroma, hue): from the colour of the paper away from it.
_PATHS = {
    "light": ((0.945, 0.035, 105), (0.80, 0.095, 165), (0.58, 0.095, 220), (0.36, 0.095, 268)),
    "dark": ((0.285, 0.045, 268), (0.47, 0.085, 240), (0.69, 0.105, 195), (0.90, 0.11, 125)),
}
_FROM_OKLAB = np.linalg.inv(
    [
        [0.2104542553, 0.793617785, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ]
)
_FROM_CONES = np.linalg.inv(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)


class Look(NamedTuple):
    """How a variant is drawn."""

    hue: int  # of HUES
    dash: str
    symbol: str

    @property
    def token(self) -> str:
        """The name of its colour in figures."""
        return f"@v{self.hue}"


def looks(groups: Iterable[Iterable[str]]) -> dict[str, Look]:
    """A look for every variant of several sweeps: the same in all of them, and another one for each variant of a sweep.

    Args:
        groups: names of the variants of each sweep.

    Returns:
        Looks by name. A hue is used twice in a sweep, with another dash and marker, only where there are more variants than
        hues, or where some of them have met others elsewhere.
    """
    sweeps = [list(names) for names in groups]
    found: dict[str, Look] = {}
    for name in dict.fromkeys(name for names in sweeps for name in names):
        beside = {other for names in sweeps if name in names for other in names if other in found}
        hues = [found[other].hue for other in beside]
        hue = min(range(len(SYMBOLS)), key=lambda i: (hues.count(i), i))
        taken = {found[other].dash for other in beside if found[other].hue == hue}
        turn = next((i for i, dash in enumerate(DASHES) if dash not in taken), 0)
        found[name] = Look(hue, DASHES[turn], SYMBOLS[(hue + turn) % len(SYMBOLS)])
    return found


@cache
def scale(theme: str, steps: int = 33) -> list[str]:
    """The sequential scale, from low to high: neighbours are equally far apart in OKLab.

    Args:
        theme: light, from pale to deep; or dark, from deep to pale: high values always stand out.
        steps: how many colours.
    """
    # A cubic Bézier curve through OKLab, walked at constant speed.
    points = np.array([(x, c * np.cos(np.radians(h)), c * np.sin(np.radians(h))) for x, c, h in _PATHS[theme]])
    t = np.linspace(0, 1, 2001)[:, None]
    curve = (
        (1 - t) ** 3 * points[0] + 3 * (1 - t) ** 2 * t * points[1] + 3 * (1 - t) * t**2 * points[2] + t**3 * points[3]
    )
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    even = np.linspace(0, length[-1], steps)
    lab = np.stack([np.interp(even, length, curve[:, i]) for i in range(3)], axis=1)
    return [_hex(color) for color in lab]


def on_scale(theme: str, share: float) -> tuple[str, str]:
    """The colour at a share of the scale, and that of text which can be read on it."""
    colors = scale(theme)
    color = colors[round(min(max(share, 0.0), 1.0) * (len(colors) - 1))]
    return color, max(("#000000", "#ffffff"), key=lambda text: contrast(text, color))


def contrast(one: str, other: str) -> float:
    """Contrast of two colours as WCAG defines it, from 1 to 21; text wants 4.5."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _hex(lab: NDArray[np.float64]) -> str:
    linear = np.clip(_FROM_CONES @ (_FROM_OKLAB @ lab) ** 3, 0, 1)
    channels = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(channel * 255):02x}" for channel in channels)
