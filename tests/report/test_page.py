"""Pages as documents, without a browser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rankwise.errors import UsageError
from rankwise.report.page import Chart, Link, Notice, Number, Numbers, Page, Paragraph, Row, Section, Table

HOSTILE = '</script><img src=x onerror=alert(1)> & "quotes"'
SPEC = {"data": {"values": [{"x": 1, "y": 0.5}, {"x": 2, "y": None}]}, "mark": "line"}


class Elements(HTMLParser):
    """The tags, attributes and texts of a document."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def page(*blocks: object) -> Elements:
    return Elements(Page("title", "lead", (Section("section", blocks),)).to_html())  # type: ignore[arg-type]


def test_text_from_outside_is_never_html() -> None:
    """Whatever stands in a record stays text, in every kind of block: no tag of it becomes an element."""
    blocks = (
        Paragraph((HOSTILE, Link(HOSTILE, "https://example.org/?" + HOSTILE)), lead=HOSTILE),
        Notice(HOSTILE),
        Numbers((Number(HOSTILE, HOSTILE, HOSTILE),)),
        Table((HOSTILE,), ((HOSTILE,), (Link(HOSTILE, "file.html"),)), HOSTILE, folded=True),
        Row((Chart({"data": {"values": [{HOSTILE: HOSTILE}]}, "mark": "bar"}, HOSTILE, HOSTILE),)),
    )
    html = Page(HOSTILE, HOSTILE, (Section(HOSTILE, blocks),)).to_html()
    found = Elements(html)
    assert "img" not in found.tags
    assert found.texts.count(HOSTILE) == 18
    assert all(name != "onerror" for name, _ in found.attributes)


def test_a_chart_reaches_the_page_as_it_is() -> None:
    """The specification in the page is the chart's own, with its data, in the page's look."""
    found = page(Chart(SPEC, "caption", "what is seen"))
    written = json.loads(next(text for text in found.texts if text.startswith("{")))
    assert written["data"] == SPEC["data"]
    assert written["description"] == "what is seen"
    assert written["width"] == "container"


def test_a_charts_numbers_stand_in_a_table() -> None:
    """The rows of a chart's data can be read without JavaScript, and a missing one is marked."""
    found = page(Chart(SPEC, "caption", "alt"))
    start = found.texts.index("The numbers of this chart")
    assert [text for text in found.texts[start + 1 :] if text][:6] == ["x", "y", "1", "0.5", "2", "–"]


def test_a_page_refuses_what_no_browser_can_read() -> None:
    """A number that JSON does not know is an error here, not a chart that stays empty there."""
    with pytest.raises(ValueError, match="JSON"):
        page(Chart({"data": {"values": [{"x": float("nan")}]}, "mark": "bar"}, "caption", "alt"))


@pytest.mark.parametrize("href", ["javascript:alert(1)", "data:text/html,x", "JavaScript:x"])
def test_links_lead_only_to_pages(href: str) -> None:
    """A link cannot run a program."""
    with pytest.raises(ValueError, match="a link leads"):
        Link("text", href)


def test_links_may_lead_to_the_web_and_to_neighbours() -> None:
    """Addresses of the web, files beside the page and places in it are fine."""
    for href in ("https://example.org", "http://example.org/a:b", "other.html", "a/b:c.html", "#section-1"):
        assert Link("text", href).href == href


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A folder that is not there, or a folder in the file's place, is wrong use and leaves nothing behind."""
    short = Page("title", "lead")
    for path in (tmp_path / "missing" / "page.html", tmp_path):
        with pytest.raises(UsageError, match=r"cannot write .*; choose another --output"):
            short.write(path)
    assert list(tmp_path.iterdir()) == []
