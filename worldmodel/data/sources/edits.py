"""A change of looks in words: the instruction that asks for it."""

import colorsys
from collections.abc import Mapping, Sequence

from worldmodel.data.sources.looks import Look, Pattern

_WORDS = {"object2": "second object", "goal": "target"}
"""What elements are called whose task has no word of its own for them, where other than their names."""
_LAST_HUE = {"red": 15, "orange": 45, "yellow": 70, "green": 160, "cyan": 195, "blue": 255, "purple": 300, "pink": 340}
"""Degrees of hue up to which a colour has its name; beyond the last it is red again."""
_GREY = 0.12
"""Saturation below which a colour has no hue to speak of."""
_KINDS = {"checker": "checks", "stripes": "stripes", "clouds": "clouds"}


def edit_words(look: Look, changed: Sequence[str], things: Mapping[str, str]) -> str:
    """What to ask for to get `look` from the original: one sentence for things, surfaces, lights and view each.

    Args:
        look: with all that changes.
        changed: elements that are seen to change; others are not mentioned.
        things: what elements are called in this task.
    """

    def the(element: str) -> str:
        return f"the {things.get(element, _WORDS.get(element, element))}"

    sentences = []
    if painted := [element for element in changed if element in look.colours]:
        sentences.append(f"Make {_listed([f'{the(each)} {look.colours[each].name}' for each in painted])}.")
    if covered := [element for element in changed if element in look.surfaces]:
        parts = [f"{the(each)} by {pattern_words(look.surfaces[each])}" for each in covered]
        sentences.append(f"Replace {_listed(parts)}.")
    if look.light is not None:
        sentences.append("Change the lights.")
    if look.view is not None:
        sentences.append("Look from another place.")
    return " ".join(sentences)


def pattern_words(pattern: Pattern) -> str:
    """A pattern with the names of its colours, for example `orange and grey stripes`."""
    one, two = (colour_name(rgb) for rgb in pattern.rgb)
    if pattern.kind == "plain":
        return f"plain {one}"
    return f"{one if one == two else f'{one} and {two}'} {_KINDS[pattern.kind]}"


def colour_name(rgb: tuple[float, float, float]) -> str:
    """The everyday name of a colour, by its hue, or grey."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*rgb)
    if saturation < _GREY:
        return "grey"
    return next((name for name, last in _LAST_HUE.items() if 360 * hue <= last), "red")


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
