"""Records and run folders made by hand: valid, with phases that add up, for whatever reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.config import TrainConfig
from rankwise.ledger.phases import PHASES, TRAINING, Ledger
from rankwise.ledger.timeline import EXCHANGE, Timeline
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import (
    SCHEMA_VERSION,
    Clock,
    Efficiency,
    Environment,
    Epoch,
    Evaluated,
    Host,
    Rank,
    Record,
    Samples,
)
from rankwise.studies.folder import StudyFolder
from rankwise.studies.runner import Run

MS = 1_000_000

WORK_S = {"startup": 4.0, "data": 0.5, "forward": 4.0, "backward": 5.0, "optimizer": 0.5, "transfer": 0.25}
"""What a rank does unless a test says otherwise, in seconds."""


def rank(
    number: int,
    *,
    role: str = "worker",
    wait_on_s: Mapping[int, float] | None = None,
    host: str = "node-1",
    threads: int = 1,
    phases_s: Mapping[str, float] = WORK_S,
    **more: Any,
) -> Rank:
    """One rank: its phases are those given, its waiting the sum of `wait_on_s`, its wall time their sum."""
    wait_on_ns = {str(other): round(s * 1e9) for other, s in (wait_on_s or {}).items()}
    phases_ns = dict.fromkeys(PHASES, 0) | {name: round(s * 1e9) for name, s in phases_s.items()}
    phases_ns["wait"] += sum(wait_on_ns.values())
    wall_ns = sum(phases_ns.values())
    cpu_s = sum(phases_ns[phase] for phase in TRAINING) / 1e9
    values: dict[str, Any] = {
        "rank": number,
        "role": role,
        "host": host,
        "threads": threads,
        "wall_ns": wall_ns,
        "phases_ns": phases_ns,
        "wait_on_ns": wait_on_ns,
        "hidden_ns": 0,
        "cpu_s": cpu_s,
        "cpu_percent": 100e9 * cpu_s / max(wall_ns, 1),
        "bytes_sent": 1_000_000,
        "bytes_received": 1_000_000,
        "messages_sent": 10,
        "max_rss_bytes": 400_000_000,
        "died_at_s": None,
    }
    return Rank(**values | more)


def epochs(count: int, *, train_samples: int = 10_000, wall_s: float = 2.0) -> list[Epoch]:
    """Epochs that learn: loss falls and accuracy rises from one to the next."""
    return [
        Evaluated(
            epoch=number,
            train_loss=2.0 / number,
            val_loss=2.1 / number,
            val_accuracy=1 - 0.8 / number,
            train_samples=train_samples,
            steps=100,
            learning_rate=0.02,
            wall_s=wall_s,
            train_s=0.75 * wall_s,
        )
        for number in range(1, count + 1)
    ]


def record(
    ranks: int | Iterable[Rank] = 3,
    *,
    epochs: list[Epoch] = epochs(3),  # noqa: B008
    cores: int = 8,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> Record:
    """A record of some ranks (a number makes workers that are alike), each on its host with `cores` cores."""
    rows = [rank(number) for number in range(ranks)] if isinstance(ranks, int) else list(ranks)
    several = len(rows) > 1
    options = {
        "ranks": max(len(rows), 1),
        "dataset": "digits",
        "strategy": "parameter-averaging" if several else "single",
        "topology": "allreduce" if several else None,
        "epochs": max(len(epochs), 1),
        "lr": 0.02,
    }
    names = dict.fromkeys(row.host for row in rows)
    trained = sum(row.train_samples for row in epochs)
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "rankwise_version": "0.1.0",
        "started_at": "2026-11-22T16:18:02+00:00",
        "wall_s": rows[0].wall_ns / 1e9 if rows else 0.0,
        "outcome": "completed",
        "message": None,
        "resumed_from_epoch": None,
        "config": TrainConfig(**options | dict(config or {})).model_dump(mode="json"),
        "environment": Environment(
            python="3.11.7",
            torch="2.13.0+cpu",
            mpi4py="4.1.2",
            mpi="Open MPI v5.0.11",
            git_commit=None,
            hosts=[
                Host(
                    name=name, cores=cores, ranks=sum(row.host == name for row in rows), cpu_model="AMD EPYC"
                )
                for name in names
            ],
        ),
        "epochs": epochs,
        "ranks": rows,
        "clock": Clock(error_bound_ns=0, violations=0),
        "efficiency": Efficiency(parallel=0.684, load_balance=0.9, serialization=0.8, transfer=0.95),
        "cpu_percent": 71.5,
        "samples": Samples(expected=trained, trained=trained, duplicated=0, lost=0),
        "faults": [],
    }
    return Record(**values | more)


def trained(run: Run, folder: StudyFolder, epochs: list[Epoch] = epochs(3)) -> Record:  # noqa: B008
    """What a run of a study might have come to: for tests of what stands around the training."""
    config = run.config.model_dump(mode="json", include=run.config.model_fields_set)
    return record(run.config.ranks, epochs=epochs, config=config | {"out": str(folder.run(run.name).path)})


def run_folder(path: Path, content: Record, *, steps: int = 0) -> RunFolder:
    """A run folder that holds a record and its metrics, and timelines of some steps if asked for."""
    folder = RunFolder(path)
    folder.create()
    folder.write(content)
    folder.keep_metrics(content.epochs)
    for row in content.ranks if steps else ():
        _write_timeline(folder, row, content.ranks, steps)
    return folder


def compute_ms(number: int, step: int) -> int:
    """How long a rank of `run_folder` computes in a step, before all meet in an allreduce of 1 ms."""
    return 3 + (number + step) % 3


def _write_timeline(folder: RunFolder, row: Rank, ranks: list[Rank], steps: int) -> None:
    """One epoch of one rank. What it shows: data 1 ms, forward, wait for the latest, transfer, save 2 ms."""
    now_ns = 0
    ledger = Ledger(clock=lambda: now_ns, start_ns=0, cpu_clock=lambda: now_ns)
    timeline = Timeline(ledger)
    exchanges = []
    for step in range(1, steps + 1):
        ledger.enter("data")
        now_ns += MS
        ledger.enter("forward")
        entered_ns = now_ns + compute_ms(row.rank, step) * MS
        late = max(ranks, key=lambda other: compute_ms(other.rank, step)).rank
        late_ns = now_ns + compute_ms(late, step) * MS
        now_ns = entered_ns
        ledger.enter("transfer")
        now_ns = late_ns + MS
        wait_ns = late_ns - entered_ns
        exchanges.append((0, step, -1, entered_ns, entered_ns, now_ns, wait_ns, late, 1000))
        ledger.enter("other")
        timeline.step(1, samples=16)
    timeline.add_exchanges(np.array(exchanges, EXCHANGE))
    ledger.enter("checkpoint")
    now_ns += 2 * MS
    timeline.epoch(1)
    timeline.save(
        folder.timeline_of(row.rank), rank=row.rank, role=row.role, host=row.host, to_common=lambda ns: ns
    )
