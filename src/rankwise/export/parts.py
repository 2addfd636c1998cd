"""What a rank did when, as exporters take it: regions, and the messages and collectives that tie them."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.ledger.call_log import Kind
from rankwise.ledger.waits import Pattern
from rankwise.report.exchanges import Exchange


@dataclass(frozen=True)
class Call:
    """Which call a region is, what it waits for, and the line of the program that makes it."""

    name: str
    kind: Kind
    file: str
    line: int


@dataclass(frozen=True)
class Region:
    """A stretch of one rank's time, with a name. Regions of a rank nest; of two that begin and end at the
    same time the one with the smaller `depth` is the outer one. `numbers` tell more of it, by name;
    `exchanges` are this rank's parts in those that are over at its end, and `call` what a program called."""

    rank: int
    name: str
    start_ns: int
    end_ns: int
    depth: int
    numbers: tuple[tuple[str, int], ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    call: Call | None = None


@dataclass(frozen=True)
class Communicator:
    """The ranks of a communicator in its own order. Of those with the same ranks each has another
    `number`."""

    ranks: tuple[int, ...]
    number: int = 0


@dataclass(frozen=True)
class Message:
    """The two ends of one message, the communicator on which it went, and its tag."""

    sent: Exchange
    received: Exchange
    communicator: Communicator
    tag: int = 0


@dataclass(frozen=True)
class Collective:
    """The parts of the ranks that took part in one exchange together, in rank order. Of a rank whose timeline
    is missing, or that kept another step, there is none. `operation` is its common name, None if only the
    pattern is known; `root` a rank, -1 if there is none."""

    pattern: Pattern
    root: int
    parts: tuple[Exchange, ...]
    communicator: Communicator
    operation: str | None = None
