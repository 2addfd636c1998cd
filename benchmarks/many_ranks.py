"""What the ledger costs on many ranks: simulated, with the code that compares logs on real ones.

    python benchmarks/many_ranks.py [--ranks 64 256 1024 4096] [--exchanges 1024]

Logs are of exchanges of 4 ms each, one after the other, with lateness by chance: of all with all, or, in the
rows *messages*, a message of each rank to another one, with an exchange of all after each 64th. *before* is
the comparison of all logs with all by each rank, which the tests keep as their oracle, with the replay of all
logs; *after* is each rank's share of it. Both are processor time of the slowest of some ranks, as a share of
the run, 4 ms an exchange; what ranks send each other for it is counted in bytes, exchanges of all, and
numbers that one rank hands another, one for each message; the time that MPI takes for that is not in it. The
last columns are of a record of as many ranks: its size, and how long its page takes to be made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rankwise.ledger.ideal_time import MESSAGE, IdealTime, Replay, in_segments
from rankwise.ledger.messages import MessageMatcher
from rankwise.ledger.shares import Asked, Collect, Give, Highest, Swap, Take, compare_shares
from rankwise.ledger.waits import ENTRY, Log, Pattern, Times, summed
from rankwise.report.run_page import write_report
from rankwise.runs.record import longest_waits

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import records
from tests.comparison_oracle import MatcherOfAll, OneChain, split_alone

EXCHANGE_NS = 4_000_000
BEFORE_MOST, BEFORE_MOST_MESSAGES = 256, 64
"""Ranks up to which the comparison of all with all is made: it takes memory for all logs, several times."""

MEET_EACH = 64
"""Messages of a rank between two exchanges of all."""

NO_MESSAGES = np.zeros(0, ENTRY)

LOOKED_AT = 3
"""Ranks whose computing is timed."""


def log_of(ranks: int, exchanges: int) -> Log:
    """The logs [ranks, exchanges] of a run in which each exchange has another late rank."""
    late_ns = np.random.default_rng(0).integers(0, EXCHANGE_NS // 2, (ranks, exchanges))
    log = np.zeros((ranks, exchanges), ENTRY)
    log["peer"], log["number"], log["bytes"] = -1, np.arange(exchanges), 1_000_000
    start_ns = np.arange(exchanges) * EXCHANGE_NS
    log["posted_ns"] = log["entered_ns"] = start_ns + late_ns
    log["left_ns"] = start_ns + EXCHANGE_NS - 1000
    log["inside_ns"] = log["left_ns"] - log["entered_ns"]
    log["posted_busy_ns"] = log["entered_busy_ns"] = np.cumsum(late_ns, axis=1)
    return log


def messages_of(ranks: int, count: int) -> tuple[Log, Log, Log]:
    """The logs of a run of messages: exchanges of all [ranks, count / MEET_EACH], what is sent and what is
    received [ranks, count]. Partners are a power of two apart, another one in each turn."""
    late_ns = np.random.default_rng(0).integers(0, EXCHANGE_NS // 2, (ranks, count))
    turns, powers = np.arange(count), max(1, (ranks - 1).bit_length())
    apart = 2 ** (turns % powers)
    me = np.arange(ranks)[:, None]
    sent, received = np.zeros((ranks, count), ENTRY), np.zeros((ranks, count), ENTRY)
    sent["pattern"], received["pattern"] = Pattern.SEND, Pattern.RECEIVE
    sent["peer"], received["peer"] = (me + apart) % ranks, (me - apart) % ranks
    came_ns, busy_ns = turns * EXCHANGE_NS + late_ns, np.cumsum(late_ns, axis=1)
    for log, begin_ns in ((sent, came_ns), (received, came_ns + 1000)):
        log["number"], log["bytes"] = turns // powers, 1_000_000
        log["posted_ns"] = log["entered_ns"] = begin_ns
        log["posted_busy_ns"] = log["entered_busy_ns"] = busy_ns
    sent["left_ns"] = came_ns + 1000
    received["left_ns"] = np.maximum(came_ns[received["peer"], turns], came_ns) + 10_000
    met = log_of(ranks, count)[:, MEET_EACH - 1 :: MEET_EACH]
    met["number"] = np.arange(met.shape[1])
    for name in ("posted_ns", "entered_ns", "left_ns"):
        met[name] += EXCHANGE_NS * 3 // 4
    for log in (sent, received, met):
        log["inside_ns"] = log["left_ns"] - log["entered_ns"]
    return met, sent, received


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def before_s(log: Log, messages: list[Log]) -> float:
    """What one rank computes that compares all logs with all."""
    ranks = len(log)

    def work() -> None:
        split_alone(log, 0)
        MatcherOfAll(0).split(messages)
        OneChain(ranks).add(log, messages)

    return timed(work)[0]


class Looked:
    """One rank that compares its share; the others are their rows."""

    def __init__(self, log: Log, rank: int) -> None:
        self._log, self.rank = log, rank
        self.seconds, self.sent, self.exchanges, self.numbers = 0.0, 0, 0, 0

    def compare(self, sent: Log | None = None, received: Log | None = None) -> None:
        """Go through it, and time what this rank computes."""
        ranks, rank = len(self._log), self.rank
        row = self._log[rank].copy()
        found = self._go_through(compare_shares(rank, ranks, row))
        replay = None
        if sent is not None and received is not None:
            self._given = self._messages_to(sent, received)
            mine = np.concatenate([sent[rank], received[rank]])
            took, mine = timed(lambda: in_segments(mine, row))
            _, *others = self._go_through(MessageMatcher(rank).compare(mine, ranks))
            self.seconds += took
            replay = Replay(mine, *others)
        ideal_time = IdealTime(ranks)
        self._go_through(ideal_time.add_own(row, rank, len(row), replay))
        self.seconds += timed(lambda: summed(found))[0]

    def _messages_to(self, sent: Log, received: Log) -> list[tuple[Times, Log]]:
        """What the others have for this rank when messages are dealt: how many rows each, and these."""
        parts = []
        for other in range(len(self._log)):
            mine = np.concatenate([log[other][log[other]["peer"] == self.rank] for log in (sent, received)])
            parts.append(in_segments(mine, self._log[other]))
        counts = np.array([len(part) for part in parts])
        return [(counts, np.concatenate(parts))]

    def _go_through(self, asks: Any) -> Any:
        answer = None
        while True:
            try:
                took, asked = timed(lambda answer=answer: asks.send(answer))
            except StopIteration as ending:
                return ending.value
            self.seconds += took
            answer = self._answer(asked)

    def _answer(self, asked: Asked) -> Any:
        """What the others would have for this rank."""
        match asked:
            case Give():
                self.numbers += 1
                return None
            case Take():
                return 0  # as good as any other
            case _:
                self.exchanges += 1
        match asked:
            case Swap(rows, counts, counts_in) if rows.dtype == ENTRY:
                self.sent += rows.nbytes
                begins = int(counts[: self.rank].sum())
                numbers = rows["number"][begins : begins + counts[self.rank]]
                return self._log[:, numbers].ravel()
            case Swap(rows) if rows.dtype == np.int64:  # of rows that are dealt, for which these are counts
                self.sent += rows.nbytes
                return self._given[0][0] if self._given else rows.copy()
            case Swap(rows) if rows.dtype == MESSAGE:
                self.sent += rows.nbytes
                return self._given.pop()[1]
            case Swap(rows, counts, counts_in):
                self.sent += rows.nbytes
                # As many rows as there would be: what is in them costs nothing.
                return (
                    np.resize(rows, counts_in.sum()) if len(rows) else np.zeros(counts_in.sum(), rows.dtype)
                )
            case Highest(values):
                self.sent += values.nbytes
                return values.copy()
            case Collect(values):
                self.sent += values.nbytes
                return np.stack([values] * len(self._log))


def record_of(ranks: int) -> Any:
    """A record in which each rank waited for each other one."""
    waits = [
        {other: (rank * other) % 1009 + 1 for other in range(ranks) if other != rank} for rank in range(ranks)
    ]
    rows = []
    for rank, wait_ns in enumerate(waits):
        row = records.rank(rank, wait_on_s={0: sum(wait_ns.values()) / 1e9})
        rows.append(row.model_copy(update=longest_waits(wait_ns)))
    return records.record(rows)


def page_of(ranks: int) -> tuple[float, float, float]:
    """MB of the record and of its page, and seconds in which the page is made of the record's file."""
    with tempfile.TemporaryDirectory() as place:
        folder = records.run_folder(Path(place) / "run", record_of(ranks))

        page = Path(place) / "page.html"
        took, _ = timed(lambda: write_report([folder.path], page))
        text = page.read_bytes()
        size = next(Path(place).rglob("record.json")).stat().st_size
    return size / 1e6, len(text) / 1e6, took


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    run_s = arguments.exchanges * EXCHANGE_NS / 1e9
    for ranks in arguments.ranks:
        for what in ("all with all", "messages"):
            most = BEFORE_MOST
            log, ends, ends_of = log_of(ranks, arguments.exchanges), (), [NO_MESSAGES] * ranks
            if what == "messages":
                log, *ends = messages_of(ranks, arguments.exchanges)
                most = BEFORE_MOST_MESSAGES
                if ranks <= most:
                    ends_of = [np.concatenate([its[rank] for its in ends]) for rank in range(ranks)]
            before = f"{before_s(log, ends_of) / run_s:.2%}" if ranks <= most else "-"
            looked = [Looked(log, rank) for rank in np.linspace(0, ranks - 1, LOOKED_AT).astype(int).tolist()]
            for one in looked:
                one.compare(*ends)
            slowest = max(looked, key=lambda one: one.seconds)
            sizes: tuple[float, ...] = page_of(ranks) if what == "all with all" else ()
            yield (
                *(str(ranks), what, before, f"{slowest.seconds / run_s:.2%}"),
                *(f"{slowest.sent / 1e6:.2f}", str(slowest.exchanges), str(slowest.numbers)),
                *(f"{size:.2f}" for size in sizes),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--exchanges", type=int, default=1024)
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.exchanges} exchanges of {EXCHANGE_NS / 1e6:.0f} ms each")
    for name in (
        "ranks",
        "",
        "before",
        "after",
        "MB sent",
        "exchanges",
        "numbers",
        "record, MB",
        "page, MB",
        "page made, s",
    ):
        table.add_column(name, justify="right")
    for row in rows(arguments):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
