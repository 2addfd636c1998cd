"""Reports in a real browser: quiet, self-contained, readable at any width, and with the record's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise.report.charts.times import LABELS
from rankwise.report.run_page import write_report
from rankwise.report.summary import group_seconds
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Efficiency, Record
from rankwise.studies.language import Task
from rankwise.studies.language_page import judge as judge_language
from rankwise.studies.language_page import language_page
from rankwise.studies.strategy_comparison import COURSES
from rankwise.studies.strategy_comparison_page import contest_page, judge
from tests import effort, test_language
from tests.records import epochs, rank, record, run_folder
from tests.test_strategy_comparison import VAL_SAMPLES, made, scored

from .browser import DESKTOP, PHONE, Browser, find_or_install

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(700),  # the first test may have to install Chromium
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this file."""
    found = find_or_install()
    if not found:
        pytest.skip("no Chromium with its chromedriver here, and they cannot be installed")
    browser = Browser(*found)
    yield browser
    browser.quit()


def waiting_run() -> Record:
    """A master and two workers, each of which waited for another."""
    master = rank(0, role="master", phases_s={"startup": 2, "evaluation": 1.5}, wait_on_s={1: 6.25, 2: 4.5})
    workers = [rank(1, wait_on_s={0: 1.25}), rank(2, wait_on_s={0: 0.5, 1: 0.75})]
    return record([master, *workers], epochs=epochs(5), config={"topology": "master"})


def contest_of_all(base: Path) -> Path:
    """The page on which all strategies stand beside each other."""
    finals = {one.name: [made([0.3, 0.5 + n / 100])] for n, one in enumerate(COURSES[0].entrants)}
    scores = scored(finals)
    path = base / "contest.html"
    contest_page({COURSES[0]: scores}, judge(scores, VAL_SAMPLES), "cifar10", "command", False).write(path)
    return path


def language_of_all(base: Path) -> Path:
    """The page on which all take part that train a language model, here and over a link."""
    task = Task()
    runs = {
        one.name: [test_language.made([3.0, 2.0 + n / 100])] * 2
        for n, one in enumerate(task.entrants, start=1)
    }
    scores = test_language.scored(runs, {name: its[0] for name, its in runs.items()})
    path = base / "language.html"
    language_page(task, scores, judge_language(scores, quick=False), "command", quick=False).write(path)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind."""
    base = tmp_path_factory.mktemp("pages")
    many = [rank(n, host=f"node-{n // 8}", wait_on_s={} if n == 5 else {5: 2.0 + n / 64}) for n in range(64)]
    runs = {
        "one": run_folder(base / "one", waiting_run(), steps=8),
        "single": run_folder(base / "single", record(1), steps=8),
        "failed": run_folder(
            base / "failed",
            record(2, epochs=[], outcome="failed", message="rank 1 failed", efficiency=Efficiency()),
        ),
        "many": run_folder(base / "many", record(many), steps=8),
    }
    chosen: dict[str, list[RunFolder]] = {name: [folder] for name, folder in runs.items()}
    chosen["several"] = [runs["single"], runs["one"], runs["failed"]]
    for name, folders in chosen.items():
        write_report([folder.path for folder in folders], base / f"{name}.html")
    found = {"contest": contest_of_all(base), "language": language_of_all(base)}
    return {name: base / f"{name}.html" for name in chosen} | found


def chart(browser: Browser, caption: str, then: str) -> Any:
    """An expression about the chart with that caption: `figure` and `rows`, the data that it draws."""
    script = """
        const figure = [...document.querySelectorAll("figure")]
            .find(one => one.querySelector("figcaption").textContent.startsWith(arguments[0]));
        const rows = figure.view.data("data_0").map(row => Object.fromEntries(Object.entries(row)));
    """
    return browser.run(f"{script} return {then};", caption)


KINDS = ["one", "single", "failed", "many", "several", "contest", "language"]
LOOKS = [(PHONE, False), (DESKTOP, True)]
# Pages that are made each in its own way, on a telephone and on a screen in turn.
EVERY_DAY = [
    (kind, *LOOKS[turn % 2]) for turn, kind in enumerate(["one", "failed", "many", "several", "language"])
]


@pytest.mark.parametrize(
    ("kind", "width", "dark"),
    effort.daily([(kind, *look) for kind in KINDS for look in LOOKS], EVERY_DAY),
)
def test_a_page_is_quiet_and_fits(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, dark: bool
) -> None:
    """No word on the console, no request but for the page itself, nothing wider than the window."""
    browser.open(pages[kind], width=width, dark=dark)
    assert browser.went_on() == ([], {pages[kind].as_uri()})
    assert browser.run("return document.documentElement.scrollWidth") <= width
    widths = browser.run(
        "return [...document.querySelectorAll('svg.marks')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(widths) == browser.run("return document.querySelectorAll('figure').length")
    assert all(width / 4 < drawn <= width for drawn in widths)


def test_nothing_in_a_chart_is_cut_off(browser: Browser, pages: dict[str, Path]) -> None:
    """On a phone all that a chart draws, its legend too, lies inside its picture."""
    browser.open(pages["one"], width=PHONE)
    outside = browser.run("""
        const inside = (box, frame) => box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1
            && box.left >= frame.left - 1 && box.right <= frame.right + 1;
        return [...document.querySelectorAll("svg.marks")].flatMap(svg =>
            [...svg.querySelectorAll("text")]
                .filter(text => getComputedStyle(text).opacity != 0)
                .filter(text => !inside(text.getBoundingClientRect(), svg.getBoundingClientRect()))
                .map(text => text.textContent));
    """)
    assert outside == []


def test_bars_show_the_records_seconds(browser: Browser, pages: dict[str, Path]) -> None:
    """The bars that are drawn, by data and by pixels, are the seconds of each rank in the record."""
    content = waiting_run()
    browser.open(pages["one"])
    rows = chart(browser, "Seconds of each rank", "rows")
    expected = [group_seconds(row)[group] for row in content.ranks for group in LABELS]
    assert [row["seconds"] for row in rows] == expected
    pixels_per_s = chart(
        browser, "Seconds of each rank", "figure.view.scale('x')(1) - figure.view.scale('x')(0)"
    )
    widths = chart(
        browser,
        "Seconds of each rank",
        "[...figure.querySelectorAll('.mark-rect path')].map(bar => bar.getBBox().width)",
    )
    assert widths == pytest.approx([seconds * pixels_per_s for seconds in expected], abs=0.6)


def test_curves_and_waits_are_the_records(browser: Browser, pages: dict[str, Path]) -> None:
    """Accuracy, waiting and the steps that are drawn have the numbers of the record and the timelines."""
    content = waiting_run()
    browser.open(pages["one"])
    accuracy = chart(browser, "Accuracy", "rows.map(row => row.accuracy)")
    assert accuracy == [epoch.val_accuracy for epoch in content.epochs]
    cells = chart(browser, "Seconds that the rank", "rows.map(row => [row.waiting, row.for, row.seconds])")
    waits = {(waiting[0], other[0]): seconds for waiting, other, seconds in cells if seconds}
    assert waits == {
        (str(row.rank), other): ns / 1e9 for row in content.ranks for other, ns in row.wait_on_ns.items()
    }
    transfers = chart(
        browser, "The last steps", "rows.filter(row => row.phase == 'transfer').map(row => row.ms)"
    )
    assert transfers == pytest.approx([1.0] * 3 * 8)


def test_a_click_on_the_legend_shows_a_part_alone(browser: Browser, pages: dict[str, Path]) -> None:
    """A reader can look at waiting alone, and compare the ranks from a common line."""
    browser.open(pages["one"])
    browser.run("""
        const label = [...document.querySelectorAll("svg .role-legend-label text")]
            .find(text => text.textContent == "waiting");
        label.dispatchEvent(new MouseEvent("click", {bubbles: true}));
    """)
    parts = browser.run("""
        const figure = [...document.querySelectorAll("figure")]
            .find(one => one.querySelector("figcaption").textContent.startsWith("Seconds of each rank"));
        return figure.view.runAsync().then(view => [...new Set(view.data("data_0").map(row => row.part))]);
    """)
    assert parts == ["waiting"]


def test_charts_follow_light_and_dark(browser: Browser, pages: dict[str, Path]) -> None:
    """Words in a chart have the page's own colour, which is dark on light or light on dark."""
    inks = []
    for dark in (False, True):
        browser.open(pages["one"], dark=dark)
        ink, words = browser.run("""
            const colour = (element, name) => getComputedStyle(element)[name];
            const texts = [...document.querySelectorAll("svg .role-axis-label text")];
            return [colour(document.body, "color"), texts.map(text => colour(text, "fill"))];
        """)
        assert set(words) == {ink}
        inks.append(ink)
    assert inks[0] != inks[1]


def test_a_page_in_print(browser: Browser, pages: dict[str, Path]) -> None:
    """On paper charts fit the sheet and stay whole, on white even if the screen is dark."""
    browser.open(pages["one"], width=700, dark=True, media="print")
    assert browser.run("return document.documentElement.scrollWidth") <= 700
    assert browser.run("return getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    red, green, blue = browser.run(
        "return getComputedStyle(document.body).color.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    assert max(red, green, blue) < 80
