"""The comparison of logs as one rank makes it for itself with the logs of all: the oracle of the one that
ranks share."""

from __future__ import annotations

import numpy as np

from rankwise.ledger.waits import Log, Split, _hidden, _late, _overlap, _Stage, _until, _wait, _within


def split_alone(log: Log, rank: int) -> Split:
    """Split collective exchanges for one rank; `log` [ranks, exchanges], all ranks took part in all."""
    held_up = _held_up(log)
    mine = [_Stage(*(part[rank] for part in (stage.start, stage.length, stage.cause))) for stage in held_up]
    wait_ns = np.sum([stage.length * (stage.cause != rank) for stage in mine], axis=0)
    stopped_ns = np.sum([stage.length * (stage.cause == rank) for stage in mine], axis=0)
    charged = np.zeros(len(log), np.int64)
    for stage in mine:
        np.add.at(charged, stage.cause, stage.length)
    charged[rank] = 0
    # The parts of each wait in which the late one was held up itself, in the exchange before.
    first = mine[0]
    now, before = np.arange(1, log.shape[1]), np.arange(log.shape[1] - 1)
    by = first.cause[now]
    starts, ends = first.start[now], (first.start + first.length)[now]
    for stage in held_up:
        start, cause = stage.start[by, before], stage.cause[by, before]
        shared = _overlap(starts, ends, start, start + stage.length[by, before])
        shared = np.where((cause != rank) & (by != rank), shared, 0)
        np.subtract.at(charged, by, shared)
        np.add.at(charged, cause, shared)

    longest = np.argmax([stage.length * (stage.cause != rank) for stage in mine], axis=0)
    blamed = np.choose(longest, [stage.cause for stage in mine])
    return Split(
        wait_ns=wait_ns,
        late=np.where(wait_ns > 0, blamed, rank),
        stopped_ns=stopped_ns,
        charged_ns={r: int(ns) for r, ns in enumerate(charged) if ns},
        hidden_ns=int(_hidden(_until(log, held_up[0].cause)[rank], log[rank]).sum()),
    )


def _held_up(log: Log) -> list[_Stage]:
    """What held up each rank in each exchange, one after the other: a rank that it could not do without and
    that had not come yet; one that came even later, though before it could leave; the stall of one."""
    ranks, exchanges = log.shape
    posted, entered, left = log["posted_ns"], log["entered_ns"], log["left_ns"]
    late = _late(log)
    needed = _Stage(entered, _wait(_until(log, late), entered, left), late)

    start = needed.start + needed.length
    latest, until = np.zeros_like(late), start.copy()
    for other in range(ranks):
        later = (posted[other] > until) & (posted[other] <= left)
        latest, until = np.where(later, other, latest), np.where(later, posted[other], until)
    sat_through = _Stage(start, until - start, latest)

    # One stall per exchange, the longest: a rank that sat through it had time for short ones beside it.
    stalled, columns = (log["stall_end_ns"] - log["stall_start_ns"]).argmax(axis=0), np.arange(exchanges)
    start = np.maximum(until, log["stall_start_ns"][stalled, columns])
    length = _overlap(start, left, start, log["stall_end_ns"][stalled, columns])
    stall = _Stage(start, length, np.broadcast_to(stalled, log.shape))
    return list(_within(log["inside_ns"], needed, sat_through, stall))
