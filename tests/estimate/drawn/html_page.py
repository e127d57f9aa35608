"""Read a page as a browser does, and see that it is well formed and needs nothing from elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}


class Parsed(HTMLParser):
    """Opens and closes of a page, its attributes and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed_page(text: str) -> Parsed:
    """Balanced, with a title, and nothing from elsewhere."""
    page = Parsed(text)
    assert not page.open and page.tags["title"] > 0 and page.tags["h1"] == 1
    assert "http://" not in text and "https://" not in text and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not page.tags["script"] and not page.tags["link"] and not page.tags["img"]
    assert all(k not in ("src", "onload", "onclick") for _, k, _ in page.attributes)
    assert all(v.startswith("#") for _, k, v in page.attributes if k in ("href", "xlink:href"))
    labels = [v for t, k, v in page.attributes if (t, k) == ("svg", "aria-label")]
    assert len(labels) == page.tags["svg"] and all(labels)
    return page
