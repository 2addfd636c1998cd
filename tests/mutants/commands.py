"""The command line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from tests.mutants import coverage_map
from tests.mutants.catalogue import GROUPS
from tests.mutants.table import reasons, table
from tests.mutants.trial import Trial, load

app = App(
    name="python -m tests.mutants", help="Put small errors into the code, and see which the tests tell of."
)

Tree = Annotated[Path, Parameter(help="A checkout, whose tests run in copies of it.")]
Workers = Annotated[int, Parameter(help="Processes side by side.")]


@app.command(name="map")
def make_map(
    *,
    store: Annotated[Path, Parameter(help="The file to write.")],
    tree: Tree = Path(),
    markers: Annotated[
        str, Parameter(help="Which tests, as for pytest -m.")
    ] = "not mpi and not alone and not full",
    tests: Annotated[tuple[str, ...], Parameter(help="Files of tests, all unless given.")] = (),
    workers: Workers = 2,
) -> None:
    """Run tests under coverage, and store who comes by which line."""
    files = tests or sorted(str(path.relative_to(tree)) for path in tree.glob("tests/**/test_*.py"))
    known = coverage_map.measure(tree.resolve(), markers, files, workers)
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(asdict(known)), "utf-8")


@app.command
def run(
    *,
    map: Annotated[Path, Parameter(help="What `map` has stored of the tree.")],
    store: Annotated[Path, Parameter(help="The file to write, or to go on with.")],
    tree: Tree = Path(),
    seed: int = 0,
    sample: Annotated[int, Parameter(help="How many mutants.")] = 210,
    group: Annotated[tuple[str, ...], Parameter(help="Groups of modules, all unless given.")] = (),
    first: Annotated[
        Path | None, Parameter(help="Results of another suite: what killed a mutant there is tried first.")
    ] = None,
    most_s: Annotated[
        float, Parameter(help="Seconds of tests for a mutant, the shortest first; all unless given.")
    ] = math.inf,
    workers: Workers = 2,
) -> None:
    """Try a sample of this checkout's mutants on a tree's tests. What has a result already is left out."""
    killers = {key: result.by for key, result in load(first)[1].items()} if first else {}
    known = coverage_map.Map(**json.loads(map.read_text("utf-8")))
    trial = Trial(tree.resolve(), known, store, first=killers, workers=workers, most_s=most_s)
    trial.run(seed, sample, group or GROUPS)


@app.command(name="table")
def print_table(new: Path, old: Path | None = None) -> None:
    """Print how many mutants a suite kills, or two of those that both tried, and what survives the new."""
    suites = {"the new suite": new, "the old suite": old} if old else {"the suite": new}
    print("\n".join(table({name: load(path)[1] for name, path in suites.items()}, reasons())))
