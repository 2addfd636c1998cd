"""What a rank did when: totals of every epoch, and a few steps in full. Bounded, however long a run is.

The last RECENT steps are kept, and of those before every n-th, where n doubles whenever there would be
more than SAMPLED of them.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import TimelineError, one_line
from rankwise.ledger.phases import PHASES, Ledger
from rankwise.ledger.regions import Stretch
from rankwise.system.files import write_atomically

Rows = NDArray[Any]

RECENT = 64
SAMPLED = 128

STEP = np.dtype([(name, "i8") for name in ("epoch", "step", "start_ns", "end_ns", "samples")])
SPAN = np.dtype([("phase", "u1"), ("start_ns", "i8"), ("end_ns", "i8")])
EPOCH = np.dtype([(name, "i8") for name in ("epoch", "start_ns", "end_ns", "samples", *PHASES)])
REGION = np.dtype([(name, "i8") for name in ("path", "start_ns", "end_ns")])
"""A region of the program's own: the number of its path, and when it was."""

EXCHANGE = np.dtype(
    [
        ("pattern", "u1"),
        ("number", "i8"),
        ("peer", "i4"),
        ("posted_ns", "i8"),
        ("entered_ns", "i8"),
        ("left_ns", "i8"),
        ("wait_ns", "i8"),
        ("late", "i4"),
        ("bytes", "i8"),
    ]
)
"""An exchange as one rank saw it. `pattern` is one of `rankwise.ledger.waits.Pattern`; `number` is the same
on all ranks for one collective exchange, and counts the messages from one rank to another; `peer` is the
root, or the other rank of a message, or -1; `wait_ns` of it, from `entered_ns` on, was waiting for `late`."""


@dataclass(frozen=True)
class RankTimeline:
    """A rank's timeline as it is read. All times are in ns since the start of rank 0's process.

    `kept` says which steps are in `steps`; `spans` (in order of time) and `exchanges` are those of the kept
    steps. Step 0 of an epoch is what came after its last step: evaluation, checkpoint, bookkeeping.
    A span in phase ``transfer`` is a whole exchange, its waiting included. `regions` are the last that ended.
    """

    rank: int
    role: str
    host: str
    kept: str
    epochs: Rows
    steps: Rows
    spans: Rows
    exchanges: Rows
    regions: Rows = field(default_factory=lambda: np.zeros(0, REGION))
    region_paths: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class _Epoch:
    """An epoch that is over, on the rank's own clock: a period of its ledger."""

    epoch: int
    start_ns: int
    end_ns: int
    samples: int
    period: int


@dataclass(frozen=True)
class _Step:
    """A step that is kept, on the rank's own clock."""

    epoch: int
    step: int
    start_ns: int
    end_ns: int
    samples: int
    spans: Iterable[tuple[str, int, int]]


class Timeline:
    """Collects what one rank does, from its ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._recent: deque[_Step] = deque()
        self._sampled: list[_Step] = []
        self._stride = 1
        self._seen = 0
        self._exchanges = np.empty(0, EXCHANGE)
        self._epochs: list[_Epoch] = []
        self.begin()

    def begin(self) -> None:
        """Training begins now: what was before belongs to no epoch."""
        self._ledger.begin_period()
        self._ledger.take_spans()
        self._epoch_start_ns = self._step_start_ns = self._ledger.mark_ns
        self._step = self._samples = 0

    def step(self, epoch: int, samples: int) -> None:
        """A step in which this rank trained `samples` ends now."""
        self._step += 1
        self._samples += samples
        self._keep(epoch, self._step, samples)

    def epoch(self, epoch: int) -> None:
        """An epoch ends now."""
        period = self._ledger.begin_period()
        self._keep(epoch, 0, 0)
        self._epochs.append(_Epoch(epoch, self._epoch_start_ns, self._step_start_ns, self._samples, period))
        self._epoch_start_ns = self._step_start_ns
        self._step = self._samples = 0

    def epochs(self) -> Rows:
        """The epochs so far (EPOCH, on the rank's own clock). Waiting that is found only later, as that in
        the exchange with which an epoch ends, is then added to the epoch in which it was."""
        rows = [
            (its.epoch, its.start_ns, its.end_ns, its.samples, *self._ledger.phases_of(its.period).values())
            for its in self._epochs
        ]
        return np.array(rows, EPOCH)

    def add_exchanges(self, rows: Rows) -> None:
        """Take exchanges whose waiting is known (EXCHANGE, in order of `left_ns`, on the rank's own
        clock)."""
        self._exchanges = self._of_kept_steps(np.concatenate([self._exchanges, rows]))

    def save(
        self,
        path: Path,
        *,
        rank: int,
        role: str,
        host: str,
        to_common: Callable[[Rows], Rows],
        regions: Iterable[Stretch] = (),
    ) -> None:
        """Write all that is kept, and `regions`, to `path`, their times put through `to_common`. Raises
        StorageError."""
        regions = [*regions]
        paths = list(dict.fromkeys(stretch.path for stretch in regions))
        steps = [*self._sampled, *self._recent]
        tables = {
            "epochs": self.epochs(),
            "steps": np.array([(s.epoch, s.step, s.start_ns, s.end_ns, s.samples) for s in steps], STEP),
            "spans": np.array(
                [(_NUMBER[name], start, end) for s in steps for name, start, end in s.spans], SPAN
            ),
            "exchanges": self._of_kept_steps(self._exchanges),
            "regions": np.array([(paths.index(r.path), r.start_ns, r.end_ns) for r in regions], REGION),
        }
        for table in tables.values():
            for column in table.dtype.names or ():
                if column in _TIMES:
                    table[column] = to_common(table[column])
        about = {"rank": rank, "role": role, "host": host, "kept": self._kept(), "regions": paths}
        content = io.BytesIO()
        np.savez(content, about=np.array(json.dumps(about)), **tables)  # type: ignore[arg-type]
        write_atomically(path, content.getvalue())

    def _keep(self, epoch: int, step: int, samples: int) -> None:
        spans = self._ledger.take_spans()
        end_ns = self._ledger.mark_ns
        self._recent.append(_Step(epoch, step, self._step_start_ns, end_ns, samples, spans))
        self._step_start_ns = end_ns
        if len(self._recent) <= RECENT:
            return
        oldest = self._recent.popleft()
        if self._seen % self._stride == 0:
            self._sampled.append(oldest)
        self._seen += 1
        if len(self._sampled) > SAMPLED:
            self._sampled = self._sampled[::2]
            self._stride *= 2

    def _of_kept_steps(self, rows: Rows) -> Rows:
        """The exchanges that ended in a kept step, or after the last."""
        steps = [*self._sampled, *self._recent]
        starts = np.array([s.start_ns for s in steps] + [self._step_start_ns])
        ends = np.array([s.end_ns for s in steps] + [np.iinfo(np.int64).max])
        place = np.searchsorted(starts, rows["left_ns"]) - 1
        return rows[(place >= 0) & (rows["left_ns"] <= ends[place])]

    def _kept(self) -> str:
        every = "" if self._stride == 1 else f"{self._stride}th "
        before = f", and every {every}step before" if self._sampled else ""
        return f"the last {len(self._recent)} steps{before}"


MOST_BYTES = 1_000_000_000
"""What a timeline may unpack to: those that are written are a thousand times smaller."""


def read_timeline(path: Path) -> RankTimeline:
    """A rank's timeline. Raises TimelineError, one line, if it is missing, cut short or something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"it would unpack to {size:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            tables = {name: file[name] for name in _TABLES if name in file or name != "regions"}
    except FileNotFoundError:
        raise TimelineError(f"there is no timeline {path}") from None
    except Exception as error:  # numpy and zipfile raise nearly anything for bytes that are not theirs
        raise TimelineError(f"the timeline {path} is damaged or cut short: {one_line(error)[:200]}") from None
    tables.setdefault("regions", np.zeros(0, REGION))  # of an older rankwise
    wrong = [name for name, dtype in _TABLES.items() if (tables[name].dtype, tables[name].ndim) != (dtype, 1)]
    complete = isinstance(about, dict) and not {"role", "host", "kept"} - about.keys()
    if wrong or not (complete and isinstance(about.get("rank"), int)):
        raise TimelineError(f"the timeline {path} has another layout than this rankwise writes")
    return RankTimeline(
        rank=about["rank"],
        role=str(about["role"]),
        host=str(about["host"]),
        kept=str(about["kept"]),
        region_paths=tuple(tuple(map(str, path)) for path in about.get("regions", ())),
        **tables,
    )


_TABLES = {"epochs": EPOCH, "steps": STEP, "spans": SPAN, "exchanges": EXCHANGE, "regions": REGION}
_TIMES = {"start_ns", "end_ns", "posted_ns", "entered_ns", "left_ns"}
_NUMBER = {phase: number for number, phase in enumerate(PHASES)}
