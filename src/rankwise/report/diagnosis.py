"""What holds a run back, in plain words with figures, from its record alone.

Shares are of the time of all ranks that train, together, from the end of each one's start-up on, unless
a sentence names another whole. The rules are fixed: the same record always gives the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from rankwise.ledger.phases import TRAINING
from rankwise.report.words import count, duration, percent
from rankwise.runs.record import Rank, Record

WORTH_TELLING = 0.02
"""The smallest share of the time that a diagnosis reports."""

HEALTHY = 0.9
"""With this share of the time in training, and on a core, nothing much holds a run back."""

COMPUTING = ("forward", "backward", "optimizer")
"""Phases that need nothing but a core."""

SINGLE_PHASES = {
    "evaluation": (WORTH_TELLING, "Evaluation takes", "The ranks evaluate for {s} in the mean."),
    "checkpoint": (
        WORTH_TELLING,
        "Saving checkpoints takes",
        "It is {s} a rank in the mean; --checkpoint-every saves less often.",
    ),
    "recovery": (
        0.0,
        "Recovering from lost ranks takes",
        "It is {s} a rank in the mean, the wait for dead ranks included.",
    ),
    "data": (
        0.1,
        "Preparing batches takes",
        "It is {s} a rank in the mean; images are cut, flipped and copied there.",
    ),
    "other": (0.05, "Work between the phases takes", "It is {s} a rank in the mean."),
    "instrument": (WORTH_TELLING, "Measuring itself takes", "It is {s} a rank in the mean."),
}
"""Phases that are a finding by themselves: from which share on, and what is said then."""


@dataclass(frozen=True)
class Finding:
    """One thing that holds a run back: its share of the time (fraction), a sentence, and what is behind."""

    share: float
    headline: str
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """The answer in two sentences, and the findings behind it, the biggest first."""

    summary: str
    findings: tuple[Finding, ...]


def diagnose(record: Record) -> Diagnosis:
    """Say what holds a run back."""
    ranks = [row for row in record.ranks if row.role == "worker" and _time_ns(row) > 0]
    if not record.epochs or not ranks:
        return Diagnosis("No epoch was completed: that is too little time to judge.", ())
    rules = (
        *_waiting(record, ranks),
        *_exchange(record, ranks),
        *_off_cpu(record, ranks),
        *_single_phases(ranks),
        *_start(record),
        *_master(record),
    )
    findings = tuple(sorted(rules, key=lambda finding: finding.share, reverse=True))
    useful = _share(ranks, TRAINING)
    summary = f"{useful:.0%} of the {_who(record).lower()}' time after start-up went into training. "
    if useful - _off_cpu_share(ranks) >= HEALTHY:
        return Diagnosis(summary + "Nothing much holds this run back.", findings)
    return Diagnosis(summary + (findings[0].headline if findings else "The rest is spread thin."), findings)


def _waiting(record: Record, ranks: Sequence[Rank]) -> Iterable[Finding]:
    share = _share(ranks, ("wait",))
    if share < WORTH_TELLING:
        return
    waited_ns: Counter[int] = Counter()
    for row in ranks:
        waited_ns.update({int(other): ns for other, ns in row.wait_on_ns.items()})
    begin = f"{_who(record)} wait {percent(share)} of the time"
    if not waited_ns:
        yield Finding(share, f"{begin}; for whom is not known.", "The clocks of its hosts were not compared.")
        return
    all_ns = sum(waited_ns.values()) + sum(row.wait_on_others_ns for row in ranks)
    masters = [row for row in record.ranks if row.role == "master"]
    for_master_ns = sum(waited_ns[row.rank] for row in masters)
    number, most_ns = waited_ns.most_common(1)[0]
    if for_master_ns > all_ns / 2:
        rank = masters[0].rank
        headline = f"{begin}, {for_master_ns / all_ns:.0%} of it for rank {rank}, the master: serial work."
        yield Finding(share, headline, _serial_work(masters[0]))
    elif _stands_out(most_ns / all_ns, ranks):
        headline = f"{begin}, {most_ns / all_ns:.0%} of it for rank {number}: load balance."
        late = next(row for row in record.ranks if row.rank == number)
        yield Finding(share, headline, _why_late(late, [row for row in ranks if row is not late]))
    else:
        text = (
            f"Now one rank is late and now another; the one most waited for is rank {number}, with "
            f"{most_ns / all_ns:.0%}. {_advice(record)}{_crowding(record)}"
        )
        yield Finding(share, f"{begin}, most of it for one another in turn: uneven steps.", text.strip())


def _serial_work(master: Rank) -> str:
    """What the master does while its workers wait, the longest first."""
    phases = {
        "evaluates": ("evaluation",),
        "saves": ("checkpoint",),
        "packs and sends": ("pack", "transfer"),
        "averages": ("optimizer", "other"),
    }
    spent = {verb: sum(master.phases_ns[phase] for phase in names) for verb, names in phases.items()}
    told = sorted(
        ((ns, verb) for verb, ns in spent.items() if ns >= 0.01 * max(spent.values())), reverse=True
    )
    return "Meanwhile the master " + ", ".join(f"{verb} ({duration(ns / 1e9)})" for ns, verb in told) + "."


def _why_late(late: Rank, others: Sequence[Rank]) -> str:
    """Compare the rank that the others wait for with them."""
    own_s, mean_s = _seconds(late, TRAINING), mean(_seconds(row, TRAINING) for row in others)
    without_core_s = _off_cpu_s(late)
    text = f"Rank {late.rank} trains for {duration(own_s)}, the others for {duration(mean_s)} in the mean."
    if without_core_s > 0.5 * max(own_s - mean_s, 0) and without_core_s > WORTH_TELLING * own_s:
        return (
            f"{text} It was without a core for {duration(without_core_s)} of that: stopped, or crowded out."
        )
    if own_s > 1.05 * mean_s:
        return f"{text} It has more to do, or a slower core."
    return f"{text} So it is not its training that makes it late, but its steps' order or what lies between."


def _exchange(record: Record, ranks: Sequence[Rank]) -> Iterable[Finding]:
    share = _share(ranks, ("pack", "transfer"))
    if share < WORTH_TELLING:
        return
    sent_mb = mean(row.bytes_sent for row in ranks) / 1e6
    messages = mean(row.messages_sent for row in ranks)
    pack_s, transfer_s = (mean(_seconds(row, (phase,)) for row in ranks) for phase in ("pack", "transfer"))
    hosts = len({row.host for row in ranks})
    yield Finding(
        share,
        f"Exchange takes {percent(share)} of the time.",
        f"In the mean a rank packs for {duration(pack_s)} and is in transfer for {duration(transfer_s)}, "
        f"with {messages:,.0f} messages and {sent_mb:,.1f} MB that it sends "
        f"{f'between {hosts} hosts' if hosts > 1 else 'within one host'}. {_advice(record)}".strip(),
    )


def _off_cpu(record: Record, ranks: Sequence[Rank]) -> Iterable[Finding]:
    lost_s = {row.rank: _off_cpu_s(row) for row in ranks}
    share = _off_cpu_share(ranks)
    if share < WORTH_TELLING:
        return
    begin = f"{_who(record)} were without a core for {percent(share)} of the time while they computed"
    most = max(lost_s, key=lambda rank: lost_s[rank])
    part = lost_s[most] / sum(lost_s.values())
    crowding = _crowding(record)
    if _stands_out(part, ranks):
        text = (
            f"Rank {most} lost {duration(lost_s[most])}: it was stopped, or something else ran on its core."
        )
        yield Finding(share, f"{begin}, {part:.0%} of it rank {most}.", text)
    elif crowding:
        yield Finding(share, f"{begin}: more threads than cores.", crowding)
    else:
        text = "The hosts have cores enough for all threads of the run, so other programs took them."
        yield Finding(share, f"{begin}: other programs ran.", text)


def _single_phases(ranks: Sequence[Rank]) -> Iterable[Finding]:
    for phase, (least, verb, text) in SINGLE_PHASES.items():
        share = _share(ranks, (phase,))
        if share > 0 and share >= least:
            mean_s = mean(_seconds(row, (phase,)) for row in ranks)
            yield Finding(share, f"{verb} {percent(share)} of the time.", text.format(s=duration(mean_s)))


def _start(record: Record) -> Iterable[Finding]:
    start_s = sum(_seconds(row, ("startup",)) for row in record.ranks)
    share = start_s * 1e9 / sum(row.wall_ns for row in record.ranks)
    if share < 0.2:
        return
    yield Finding(
        share,
        f"Start-up takes {share:.0%} of the wall time.",
        f"It is {duration(start_s / len(record.ranks))} a rank in the mean, most of it to import libraries, "
        "and does not grow with the number of epochs.",
    )


def _master(record: Record) -> Iterable[Finding]:
    """A master that waits is a loss where its core could train, and none where workers fill the host."""
    total_ns = sum(map(_time_ns, record.ranks))
    for row in record.ranks:
        if row.role != "master" or not _time_ns(row):
            continue
        idle = row.phases_ns["wait"] / _time_ns(row)
        headline = f"Rank {row.rank}, the master, trains nothing and waits {idle:.0%} of its own time."
        cores = {host.name: host.cores for host in record.environment.hosts}.get(row.host, 0)
        threads = _threads(record, row.host)
        has = f"{row.host} has {count(cores, 'core')} for {count(threads, 'thread')} of its workers"
        if cores > threads:
            text = f"{has}, so there is one left: with --topology allreduce, where it can be, it trains too."
            yield Finding(row.phases_ns["wait"] / total_ns, headline, text)
        else:
            yield Finding(0.0, headline, f"That costs no core: {has}, and a waiting rank sleeps.")


def _stands_out(part: float, ranks: Sequence[Rank]) -> bool:
    """Whether one of the ranks has so much of something that it is not by chance."""
    return len(ranks) > 1 and part >= max(0.5, 1.5 / len(ranks))


def _advice(record: Record) -> str:
    """What evens out steps and saves exchanges, where it can be had."""
    every = record.config.get("sync_every")
    if not isinstance(every, int):
        return ""
    return f"With fewer synchronisations than one every {count(every, 'step')} it is less. "


def _crowding(record: Record) -> str:
    """Which hosts have fewer cores than threads that train; nothing if all have enough."""
    crowded = [
        f"{host.name} has {count(host.cores, 'core')} for {count(_threads(record, host.name), 'thread')}"
        for host in record.environment.hosts
        if _threads(record, host.name) > host.cores
    ]
    return f"{'; '.join(crowded)} that train, so they take turns." if crowded else ""


def _who(record: Record) -> str:
    """The ranks that train, by the word that tells them from a master."""
    return "Workers" if any(row.role == "master" for row in record.ranks) else "Ranks"


def _threads(record: Record, host: str) -> int:
    """Arithmetic threads of the ranks that train on a host."""
    return sum(row.threads for row in record.ranks if row.host == host and row.role == "worker")


def _time_ns(row: Rank) -> int:
    return row.wall_ns - row.phases_ns["startup"]


def _seconds(row: Rank, phases: Iterable[str]) -> float:
    return sum(row.phases_ns[phase] for phase in phases) / 1e9


def _share(ranks: Sequence[Rank], phases: Iterable[str]) -> float:
    """The share of phases in the time of some ranks, as a fraction; 0 without ranks."""
    names = tuple(phases)
    return sum(_seconds(row, names) for row in ranks) * 1e9 / max(sum(map(_time_ns, ranks)), 1)


def _off_cpu_s(row: Rank) -> float:
    """Seconds in which a rank should have computed and had no core."""
    return sum(row.off_cpu_ns.get(phase, 0) for phase in COMPUTING) / 1e9


def _off_cpu_share(ranks: Sequence[Rank]) -> float:
    return sum(map(_off_cpu_s, ranks)) * 1e9 / max(sum(map(_time_ns, ranks)), 1)
