"""What a page about runs says in numbers and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rankwise.report import words
from rankwise.report.charts.scaling import strategy
from rankwise.report.page import Cell, Number, Numbers, Table
from rankwise.report.runs import Run
from rankwise.report.words import duration, percent
from rankwise.runs.record import Fault, Record, RegionTimes, Target

EFFICIENCIES = {
    "parallel": "Useful time of all ranks, training and evaluation, over all their time since start-up, a "
    "master's included; the product of the other three.",
    "load_balance": "The mean useful time of a rank over that of the busiest one.",
    "serialization": "What remains when ranks wait for each other's work, however fast the network is.",
    "transfer": "What remains when messages take their time.",
}
"""What each of POP's efficiencies says."""

MOST_WAITED_FOR = 8


def numbers(record: Record) -> Numbers:
    """The few numbers of a run that come first."""
    found = [Number("wall time", f"{record.wall_s:,.1f} s", "start-up included")]
    if record.evaluated:
        best = record.best
        where = f"in epoch {best.epoch} of {record.epochs[-1].epoch}"
        found.insert(0, Number("best accuracy", f"{best.val_accuracy:.2%}", where))
    if record.epochs:
        found.append(
            Number("samples a second", f"{record.median_samples_per_s:,.0f}", "median of the epochs")
        )
    if record.target:
        found.append(_time_to(record.target))
    if record.efficiency.parallel is not None:
        efficiency = percent(record.efficiency.parallel)
        found.append(Number("parallel efficiency", efficiency, "useful time of all ranks"))
    if record.efficiency.goodput is not None and record.efficiency.goodput < 1:
        found.append(Number("goodput", percent(record.efficiency.goodput), "time that no fault cost"))
    if record.cpu_percent:
        found.append(Number("CPU use", f"{record.cpu_percent:.0f}%", "of all cores of the hosts"))
    found.append(_samples(record))
    return Numbers(tuple(found))


def _time_to(target: Target) -> Number:
    label = f"time to {target.accuracy:.2%}"
    if not target.reached or target.from_launch_s is None:
        return Number(label, "unknown" if target.reached else "not reached", "--target-accuracy")
    return Number(label, duration(target.from_launch_s), words.target(target))


def overview(runs: Sequence[Run]) -> Table:
    """A row a run."""
    columns = ("run", "strategy", "ranks", "outcome", "best accuracy", "wall, s", "an epoch, s", "samples/s")
    rows = []
    for run in runs:
        record = run.record
        trained = bool(record.epochs)
        rows.append(
            (
                run.name,
                strategy(record),
                len(record.ranks),
                record.outcome,
                f"{record.best.val_accuracy:.2%}" if record.evaluated else None,
                record.wall_s,
                record.median_epoch_s if trained else None,
                record.median_samples_per_s if trained else None,
                _known(record.efficiency.parallel, percent),
            )
        )
    return Table((*columns, "parallel efficiency"), tuple(rows))


def efficiencies(runs: Sequence[Run]) -> Table:
    """POP's efficiencies of each run, and what each of them says."""
    values = [run.record.efficiency.model_dump() for run in runs]
    rows = tuple(
        (name.replace("_", " "), *(_known(value[name], percent) for value in values), about)
        for name, about in EFFICIENCIES.items()
    )
    return Table(("POP efficiency", *_headings(runs), "what it says"), rows)


def goodput(runs: Sequence[Run]) -> Iterable[Table]:
    """What faults and stops cost each run, if they cost any of them anything."""
    found = [run.record.efficiency for run in runs]
    if any(its.goodput_lost and its.goodput is not None and its.goodput < 1 for its in found):
        rows = (
            ("goodput", *(_known(its.goodput, percent) for its in found)),
            *(
                (f"lost to {name}", *(_known(its.goodput_lost.get(cause), percent) for its in found))
                for cause, name in words.CAUSES.items()
            ),
            ("mean time to recovery", *(_known(its.mean_recovery_s, words.duration) for its in found)),
        )
        yield Table(("faults and stops", *_headings(runs)), rows)


def stopwatches(record: Record) -> Iterable[Table]:
    """What a barrier or a strategy measured beside the ledger, where one did."""
    if any(row.barrier_wait_ns is not None for row in record.ranks):
        rows = tuple(
            (row.rank, row.phases_ns["wait"] / 1e9, _known(row.barrier_wait_ns, lambda ns: ns / 1e9))
            for row in record.ranks
        )
        yield Table(("rank", "waiting, s", "at barriers, s"), rows, "Waiting by the ledger and by barriers")
    names = tuple(dict.fromkeys(name for row in record.ranks for name in row.measured))
    if names:
        measured = tuple((row.rank, *(row.measured.get(name) for name in names)) for row in record.ranks)
        yield Table(("rank", *names), measured, "What the strategy measured itself")


def regions(record: Record) -> Iterable[Table]:
    """What the program named, over all ranks, if it named anything."""
    by_path: dict[tuple[str, ...], list[RegionTimes]] = {}
    for row in record.ranks:
        for one in row.regions:
            by_path.setdefault(tuple(one.path), []).append(one)
    if by_path:
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (
                " > ".join(path),
                sum(one.count for one in its),
                sum(one.wall_ns for one in its) / len(its) / 1e9,
                max(one.wall_ns for one in its) / 1e9,
                *(
                    sum(one.phases_ns.get(phase, 0) for one in its) / len(its) / 1e9
                    for phase in ("wait", "transfer")
                ),
            )
            for path, its in sorted(by_path.items())
        )
        columns = ("region", "times", "mean of ranks, s", "most, s", "waiting, s", "transfer, s")
        yield Table(columns, rows, "Regions that the program named; those inside are included")


def waited_for(record: Record) -> Table:
    """The ranks that the others waited for most."""
    by_rank_ns: Counter[str] = Counter()
    for row in record.ranks:
        by_rank_ns.update(row.wait_on_ns)
    all_ns = by_rank_ns.total() + sum(row.wait_on_others_ns for row in record.ranks)
    most = by_rank_ns.most_common(MOST_WAITED_FOR)
    rows = tuple((int(rank), ns / 1e9, percent(ns / all_ns)) for rank, ns in most)
    return Table(("rank waited for", "seconds", "part"), rows)


def faults(record: Record) -> Iterable[Table]:
    """What befell the ranks of a run, if anything did."""
    if record.faults:
        known = (key for fault in record.faults for key, value in fault if value is not None)
        columns = tuple(sorted(set(known), key=[*Fault.model_fields].index))
        rows = tuple(tuple(_text(getattr(fault, key)) for key in columns) for fault in record.faults)
        yield Table(columns, rows, "Faults")


def generations(record: Record) -> Iterable[Table]:
    """The ranks of each start of a run, one after the other, if there was more than one."""
    if not record.earlier:
        return
    columns = ("generation", "ranks", "began (UTC)", "seconds", "pause before, s", "waiting", "hosts")
    rows = []
    for each in record.as_earlier():
        wall_ns = sum(row.wall_ns for row in each.ranks)
        waited_ns = sum(row.phases_ns["wait"] for row in each.ranks)
        rows.append(
            (
                *(each.number, len(each.ranks), each.started_at),
                max((row.wall_ns for row in each.ranks), default=0) / 1e9,
                each.pause_s,
                percent(waited_ns / max(wall_ns, 1)),
                ", ".join(sorted({row.host for row in each.ranks})),
            )
        )
    yield Table(columns, tuple(rows), "Generations of ranks")


def options(runs: Sequence[Run]) -> Table:
    """Every option of each run."""
    names = dict.fromkeys(name for run in runs for name in run.record.config)
    rows = tuple((name, *(_text(run.record.config.get(name)) for run in runs)) for name in names)
    return Table(("option", *_headings(runs)), rows, "All options", folded=True)


def differences(runs: Sequence[Run]) -> Table:
    """The options in which the runs differ, but for their folders."""
    every = options(runs)
    rows = tuple(row for row in every.rows if len(set(row[1:])) > 1 and row[0] != "out")
    return Table(every.columns, rows, "Options that differ")


def environments(runs: Sequence[Run]) -> tuple[Table, Table]:
    """Versions and clocks, and hosts."""
    facts = [_facts(run.record) for run in runs]
    rows = tuple((name, *(fact[name] for fact in facts)) for name in facts[0])
    hosts = tuple(
        (run.name, host.name, host.cores, host.ranks, host.cpu_model)
        for run in runs
        for host in run.record.environment.hosts
    )
    return (
        Table(("environment", *_headings(runs)), rows),
        Table(("run", "host", "cores", "ranks", "processor"), hosts),
    )


def _facts(record: Record) -> dict[str, Cell]:
    versions = record.environment
    return {
        "rankwise": record.rankwise_version,
        "Python": versions.python,
        "torch": versions.torch,
        "mpi4py": versions.mpi4py,
        "MPI": versions.mpi,
        "git commit": versions.git_commit and versions.git_commit[:12],
        "clocks agree to, ns": str(record.clock.error_bound_ns),
        "clock violations": str(record.clock.violations),
    }


def _samples(record: Record) -> Number:
    samples = record.samples
    if samples.lost or samples.duplicated:
        amiss = f"{samples.lost:,} lost, {samples.duplicated:,} twice"
        return Number("samples", amiss, f"{samples.trained:,} of {samples.expected:,} trained")
    return Number("samples", f"{samples.trained:,}", "none lost, none trained twice")


def _headings(runs: Sequence[Run]) -> tuple[str, ...]:
    return ("",) if len(runs) == 1 else tuple(run.name for run in runs)


def _text(value: Any) -> str | None:
    """A value as it is written in a configuration: no digit of it is rounded away."""
    return None if value is None else str(value)


def _known(value: float | None, told: Callable[[float], Cell]) -> Cell:
    return None if value is None else told(value)
