"""Which formats there are, and how a file of one comes to stand in its place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import UsageError, one_line, unknown_name
from rankwise.export.csv_table import write_csv
from rankwise.export.extrap_lines import write_extrap
from rankwise.export.mlperf_lines import write_mlperf
from rankwise.export.otf2_archive import ANCHOR, write_otf2
from rankwise.export.run_content import RunContent, read_run
from rankwise.export.talp_json import write_talp
from rankwise.system.files import appearing

Write = Callable[[Sequence[RunContent], Path], list[str]]
"""Writes runs to a path that is not there yet; returns what a reader should know, a line each."""


@dataclass(frozen=True)
class Format:
    """A format: how it is written, whether it takes several runs, what opens it, whether it shows anything of
    timelines, the package that writing it needs (of the extra `export`), and which file of its folder readers
    open."""

    write: Write
    several: bool
    reader: str
    timelines: bool = True
    package: str | None = None
    opened: str | None = None


FORMATS = {
    "talp": Format(write_talp, several=True, reader="talp-pages", timelines=False),
    "extrap": Format(write_extrap, several=True, reader="Extra-P, as JSON lines"),
    "otf2": Format(write_otf2, several=False, reader="what reads OTF2", package="otf2", opened=ANCHOR),
    "mlperf": Format(write_mlperf, several=False, reader="mlperf-logging", timelines=False),
    "csv": Format(write_csv, several=True, reader="any table"),
}


@dataclass(frozen=True)
class Exported:
    """What was written, in a line, and what a reader should know of it, a line each."""

    about: str
    remarks: list[str]


def export(runs: Sequence[Path], format: str, output: Path) -> Exported:
    """Write runs to `output` in a format. Nothing is there until all of it is.

    Raises UsageError, one line: the format is unknown or takes one run, its package is missing, a run is not
    there or has not what the format needs, `output` is there already or cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(unknown_name("format", format, FORMATS))
    chosen = FORMATS[format]
    if not runs:
        raise UsageError("no run was given: give the run folders to export")
    if len(runs) > 1 and not chosen.several:
        raise UsageError(
            f"{format} holds one run, {len(runs)} were given: export each to an --output of its own"
        )
    places = [path.resolve() for path in runs]
    for path, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{path} is given more than once: a run counts once")
    if chosen.package and importlib.util.find_spec(chosen.package) is None:
        raise UsageError(f"--format {format} needs a package that is missing: pip install 'rankwise[export]'")
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} is there already: choose another --output, or remove it")
    contents = [read_run(path) for path in runs]
    try:
        with appearing(output) as place:
            remarks = chosen.write(contents, place)
    except (ValueError, ArithmeticError) as error:
        names = ", ".join(run.name for run in contents)
        raise UsageError(
            f"{names}: a value in the record cannot be right ({one_line(error)[:200]})"
        ) from None
    except OSError as error:
        raise UsageError(
            f"cannot write {output}: {error.strerror or error}; choose another --output"
        ) from None
    number = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    missing = [remark for run in contents for remark in run.remarks] if chosen.timelines else []
    opened = output / chosen.opened if chosen.opened else output
    return Exported(f"{opened}: {number} for {chosen.reader}", [*missing, *remarks])
