"""The palette: strong enough on its background, and told apart by people with red-green blindness."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import pytest

from lamina.palette import (
    BACKGROUND,
    CONTENT,
    DIFFERENCE,
    DIRTY,
    LAYERS,
    QUIET_TEXT,
    STRUCTURE,
    TEXT,
    Colour,
    content,
    layer,
)

Linear = tuple[float, float, float]
SCHEMES = ("light", "dark")
#: Projections of linear RGB to what is left without the red or the green receptors (Machado, Oliveira and Fernandes 2009).
VISION: Mapping[str, tuple[Linear, Linear, Linear]] = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}
#: What is no more than a background for the others.
FAINT = {"zero", "hole", "reserved", "free", "snapshot data", "unknown"}


def linear(colour: str) -> Linear:
    r, g, b = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return tuple(one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in (r, g, b))  # type: ignore[return-value]


def luminance(colour: str) -> float:
    r, g, b = linear(colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, vision: str) -> Linear:
    """CIE L*a*b* of what is seen of a colour."""
    seen = [max(0.0, min(1.0, sum(a * b for a, b in zip(row, linear(colour), strict=True)))) for row in VISION[vision]]
    x = (0.4124 * seen[0] + 0.3576 * seen[1] + 0.1805 * seen[2]) / 0.9505
    y = 0.2126 * seen[0] + 0.7152 * seen[1] + 0.0722 * seen[2]
    z = (0.0193 * seen[0] + 0.1192 * seen[1] + 0.9505 * seen[2]) / 1.089
    fx, fy, fz = (one ** (1 / 3) if one > 0.008856 else 7.787 * one + 16 / 116 for one in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def distance(one: str, other: str, vision: str) -> float:
    return sum((a - b) ** 2 for a, b in zip(lab(one, vision), lab(other, vision), strict=True)) ** 0.5


def nearest(colours: Iterable[Colour], scheme: str, vision: str) -> tuple[float, str, str]:
    pairs = itertools.combinations([getattr(one, scheme) for one in colours], 2)
    return min((distance(*pair, vision), *pair) for pair in pairs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contrast(scheme: str) -> None:
    background = getattr(BACKGROUND, scheme)
    assert contrast(getattr(TEXT, scheme), background) >= 7
    assert contrast(getattr(QUIET_TEXT, scheme), background) >= 4.5
    strong = {name: one for name, one in {**CONTENT, **STRUCTURE}.items() if name not in FAINT}
    for name, one in [*strong.items(), ("dirty", DIRTY), ("difference", DIFFERENCE)]:
        least = 2.3 if name == "leaked" else 3
        assert contrast(getattr(one, scheme), background) >= least, name
    for one in LAYERS:
        assert contrast(getattr(one, scheme), background) >= 2.6, one


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("colours", [CONTENT.values(), LAYERS, STRUCTURE.values()], ids=["content", "layers", "file"])
def test_colours_differ(colours: Iterable[Colour], scheme: str, vision: str) -> None:
    found = nearest(colours, scheme, vision)
    assert found[0] >= 9, found


def test_distances_are_told() -> None:
    assert distance("#ff0000", "#ff0000", "no green") == 0
    assert distance("#c00000", "#607000", "full") > 60 > 3 * distance("#c00000", "#607000", "no red") / 2


def test_keys() -> None:
    assert content(True, False, True, False) == "data"
    assert content(True, True, True, False) == "reserved"
    assert content(False, True, True, False) == "zero"
    assert content(False, True, False, False) == "hole"
    assert content(True, False, True, True) == "compressed"
    assert layer(len(LAYERS)) == layer(0)
