"""What a recorded motion may look like instead: colours, surfaces, light and camera placement, drawn at random.

A look is a function of its generator and of what it may vary, and its plain form, which the metadata of a variant
hold, is all that is needed to show it again.
"""

import colorsys
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PAINTED = ("object", "object2", "goal", "fixture")
"""Elements that get colours of their own, no two the same."""
SURFACES = ("table", "background")
"""Elements that get patterns."""
PATTERNS = ("plain", "checker", "stripes", "clouds")
EVERYTHING = ("objects", "surfaces", "lights", "view")
VARY = ("element", *EVERYTHING)
"""What may differ from the original: the colour of one thing or of all, the patterns of table and background, all
lights, the place of both cameras."""
_HUES = {
    "red": 0.0,
    "orange": 0.075,
    "yellow": 0.15,
    "green": 0.34,
    "cyan": 0.5,
    "blue": 0.62,
    "purple": 0.77,
    "pink": 0.9,
}
_PALE = {"pink": 0.45}
_OTHERS = {"white": (0.0, 0.0, 0.97), "black": (0.0, 0.0, 0.1), "brown": (0.06, 0.65, 0.4)}
COLOURS = (*_HUES, *_OTHERS)
"""Names that an instruction can call a thing by."""
_COLOUR_WORD = re.compile(rf"\b({'|'.join(COLOURS)})\b")


@dataclass(frozen=True)
class Paint:
    """One colour with its name."""

    name: str
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Pattern:
    """Two colours on a surface."""

    kind: str
    rgb: tuple[tuple[float, float, float], tuple[float, float, float]]
    cells: int  # along each side of a texture
    seed: int  # of what is irregular in it


@dataclass(frozen=True)
class Light:
    """Changes to all lights together."""

    diffuse: tuple[float, float, float]  # factor by channel
    ambient: float  # factor
    turn: float  # degrees about the vertical
    tilt: float  # degrees about x, before that


@dataclass(frozen=True)
class View:
    """Changes to the place of both cameras."""

    azimuth: float  # degrees about the vertical through the front camera's target
    elevation: float  # degrees
    distance: float  # factor on the distance from that target
    front_fovy: float  # degrees more
    offset: tuple[float, float, float]  # metres, of the wrist camera in the frame of its body
    rotation: tuple[float, float, float]  # degrees about the wrist camera's own axes
    wrist_fovy: float  # degrees more


@dataclass(frozen=True)
class Look:
    """Everything that a variant changes; what it leaves out stays as it was."""

    colours: dict[str, Paint]
    surfaces: dict[str, Pattern]
    light: Light | None
    view: View | None

    def plain(self) -> dict[str, Any]:
        """The look as values that JSON holds."""
        return asdict(self)

    def changed(self, shown: Sequence[str]) -> list[str]:
        """Which of the elements in `shown` have other colours than before, whatever the place of the cameras."""
        if self.light is not None:
            return list(shown)
        return [element for element in shown if element in self.colours or element in self.surfaces]


def draw_look(
    rng: np.random.Generator,
    vary: Sequence[str] = EVERYTHING,
    *,
    shown: Sequence[str] = PAINTED,
    taken: Sequence[str] = (),
) -> Look:
    """A look that changes what `vary`, names of `VARY`, lists, and is the same in it whatever else is listed.

    Args:
        rng: all that is drawn.
        vary: what the look changes.
        shown: elements of `PAINTED` that `element` chooses from.
        taken: names of colours that `element` does not give, for things that have them already.
    """
    names = rng.permutation(len(COLOURS))[: len(PAINTED)]
    colours = {element: _paint(COLOURS[name], rng) for element, name in zip(PAINTED, names, strict=True)}
    surfaces = {element: _pattern(rng) for element in SURFACES}
    light = Light(
        diffuse=_floats(rng.uniform(0.7, 1.4) * rng.uniform(0.85, 1.15, 3)),
        ambient=_float(rng.uniform(0.6, 1.3)),
        turn=_float(rng.uniform(-180.0, 180.0)),
        tilt=_float(rng.uniform(-20.0, 20.0)),
    )
    view = View(
        azimuth=_float(rng.uniform(-20.0, 20.0)),
        elevation=_float(rng.uniform(-8.0, 12.0)),
        distance=_float(rng.uniform(0.92, 1.12)),
        front_fovy=_float(rng.uniform(-3.0, 3.0)),
        offset=_floats(rng.uniform(-0.01, 0.01, 3)),
        rotation=_floats(rng.uniform(-5.0, 5.0, 3)),
        wrist_fovy=_float(rng.uniform(-4.0, 4.0)),
    )
    if "element" in vary:
        one = shown[rng.integers(len(shown))]
        paints = (colours[one], *colours.values())
        colours = {one: next(paint for paint in paints if paint.name not in taken)}
    return Look(
        colours if {"element", "objects"} & set(vary) else {},
        surfaces if "surfaces" in vary else {},
        light if "lights" in vary else None,
        view if "view" in vary else None,
    )


def renamed(instruction: str, coloured: Sequence[str], look: Look) -> str:
    """`instruction` with its colour words, which are of the elements `coloured` in that order, as `look` has them."""
    elements = iter(coloured)

    def word(match: re.Match[str]) -> str:
        paint = look.colours.get(next(elements))
        return match[0] if paint is None else paint.name

    return _COLOUR_WORD.sub(word, instruction)


def named_colours(instruction: str) -> list[str]:
    """The colour words of an instruction in their order."""
    return _COLOUR_WORD.findall(instruction)


def texture(pattern: Pattern, side: int) -> np.ndarray:
    """(side, side, 3) uint8 image of a pattern."""
    place = (np.arange(side) + 0.5) / side * pattern.cells
    if pattern.kind == "plain":
        share = np.zeros((side, side))
    elif pattern.kind == "checker":
        share = (np.floor(place)[:, None] + np.floor(place)) % 2
    elif pattern.kind == "stripes":
        share = np.broadcast_to(np.floor(place) % 2, (side, side))
    else:
        share = _clouds(pattern, place)
    one, two = np.array(pattern.rgb)
    return ((one + (two - one) * share[..., None]) * 255).round().astype(np.uint8)


def _clouds(pattern: Pattern, place: np.ndarray) -> np.ndarray:
    """Random values at the corners of the cells, blended between them; the last cell meets the first."""
    corners = np.random.default_rng(pattern.seed).random((pattern.cells, pattern.cells))
    low = np.floor(place).astype(int) % pattern.cells
    high, part = (low + 1) % pattern.cells, place % 1
    rows = corners[low] * (1 - part)[:, None] + corners[high] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, high] * part


def _paint(name: str, rng: np.random.Generator) -> Paint:
    jitter = rng.uniform(-1.0, 1.0, 3)
    if name in _HUES:
        hue, saturation, value = _HUES[name], _PALE.get(name, 0.9), 0.88
        jitter = jitter * (0.015, 0.1, 0.1)
    else:
        hue, saturation, value = _OTHERS[name]
        jitter = jitter * (0.01, 0.0, 0.03)
    rgb = colorsys.hsv_to_rgb((hue + jitter[0]) % 1.0, saturation + jitter[1], value + jitter[2])
    return Paint(name, _floats(rgb))


def _pattern(rng: np.random.Generator) -> Pattern:
    """Muted colours, so that what stands before them is seen."""
    kind = PATTERNS[rng.integers(len(PATTERNS))]
    drawn = [(rng.random(), rng.uniform(0.0, 0.5), rng.uniform(0.3, 0.9)) for _ in range(2)]
    one, two = (_floats(colorsys.hsv_to_rgb(*hsv)) for hsv in drawn)
    return Pattern(kind, (one, two), int(rng.integers(2, 9)), int(rng.integers(2**31)))


def _float(value: float) -> float:
    # Six digits are exact in JSON and the same on every machine.
    return round(float(value), 6)


def _floats(values: Any) -> Any:
    return tuple(_float(value) for value in values)
