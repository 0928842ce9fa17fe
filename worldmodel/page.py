"""The frame of every page this package writes: one HTML file that loads nothing, for light, dark, phone and paper."""

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template


def compose(
    title: str,
    verdict: str,
    cards: Iterable[tuple[str, str]],
    sections: Mapping[str, tuple[str, str]],
    footer: str,
) -> str:
    """Put a page together.

    `title`, `verdict`, `footer` and the cards (figure, what it is) are plain text; `sections` maps a heading to the
    name of its anchor and its HTML, which must be escaped already.
    """
    template = Template(files("worldmodel").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        verdict=escape(verdict),
        cards="".join(f'<div class="card"><b>{escape(b)}</b><span>{escape(text)}</span></div>' for b, text in cards),
        navigation="".join(f'<a href="#{name}">{escape(head)}</a>' for head, (name, _) in sections.items()),
        sections="".join(
            f'<section><h2 id="{name}">{escape(head)}</h2>{html}</section>' for head, (name, html) in sections.items()
        ),
        footer=escape(footer),
    )
