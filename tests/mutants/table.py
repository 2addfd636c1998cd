"""What came of a sample, as Markdown: one suite, or two side by side, and what survives."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.mutants.catalogue import GROUPS, places
from tests.mutants.trial import Result


def reasons() -> dict[str, str]:
    """Why mutants survive, by their keys, as far as somebody has written it down."""
    words = tomllib.loads(Path(__file__).with_name("survivors.toml").read_text("utf-8"))
    return {key: str(entry["why"]) for key, entry in words.items()}


def table(suites: Mapping[str, Mapping[str, Result]], why: Mapping[str, str]) -> Iterator[str]:
    """The lines of a page: how many mutants each suite kills of those that all have tried, and what survives
    the first. Places are where a mutant can be."""
    newest, *others = suites.values()
    both = [key for key in newest if all(key in s and s[key].outcome != "absent" for s in suites.values())]
    yield "| | places | mutants | " + " | ".join(f"killed by {name}" for name in suites) + " |"
    yield "|---|---:|---:|" + "---:|" * len(suites)
    for title, groups in (*((group, (group,)) for group in GROUPS), ("all", tuple(GROUPS))):
        keys = [key for key in both if newest[key].group in groups]
        sites = sum(len(places(Path(), group)) for group in groups)
        killed = [sum(results[key].killed for key in keys) for results in suites.values()]
        cells = [title, sites, len(keys), *(f"{count} ({count / max(1, len(keys)):.0%})" for count in killed)]
        yield f"| {' | '.join(map(str, cells))} |"
    left = {key: newest[key] for key in both if not newest[key].killed}
    for group in GROUPS:
        mine = sorted((r for r in left.values() if r.group == group), key=lambda r: (r.module, r.line))
        yield from ("", f"### {group}: {len(mine)} survive") if mine else ()
        for result in mine:
            some = f" the {result.tried} shortest of {result.tests} tests" * (result.tried < result.tests)
            words = [
                result.outcome + some,
                *("killed by the old suite" for s in others if s[result.key].killed),
            ]
            yield from ("", f"`{result.module}:{result.line}`, {', '.join(words)} (`{result.key}`)")
            yield from ("", "```diff", f"- {result.gone}", f"+ {result.new}".rstrip(), "```")
            yield from ("", why.get(result.key, "No reason is written down."))
    if stale := why.keys() & newest.keys() - left.keys():
        yield from ("", f"`survivors.toml` speaks of what does not survive: {', '.join(sorted(stale))}")
