"""What every page this package writes must be: well-formed, and loading nothing else."""

import re
from html.parser import HTMLParser


class Checker(HTMLParser):
    """Collects addresses and checks that tags close in order."""

    VOID = ("meta", "link", "br", "img", "line", "circle", "polyline", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"


def check_page(page: str) -> None:
    """Assert that tags nest and that nothing is loaded from anywhere."""
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert all(address.startswith(("data:", "#")) for address in checker.addresses)
    text = re.sub(r'"data:[^"]*"', "", page)
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
