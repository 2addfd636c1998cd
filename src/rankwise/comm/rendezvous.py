"""Where the ranks of a world of threads meet."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rankwise.comm.transport import ended_before
from rankwise.errors import RankLost


class Rendezvous:
    """Where the threads of one world meet: it holds what each rank brought to each collective exchange, and
    messages on their way. Of `size` ranks those in `working` take part, and the others stand by. `hosts` are
    the ranks' hosts."""

    def __init__(self, size: int, hosts: Sequence[int] | None = None) -> None:
        self.size = size
        self.hosts = hosts or [0] * size
        self.strength = size
        self.changed = threading.Condition()
        self.brought: dict[int, dict[int, Any]] = defaultdict(dict)
        self.gone: dict[int, int] = defaultdict(int)
        self.messages: dict[tuple[int, int], list[tuple[int, Any]]] = defaultdict(list)
        self.broken = False
        self.live = set(range(size))
        self.ended: dict[int, str] = {}
        self.is_whole = True
        self.aside: set[int] = set()
        self.called_off = False
        self.repairing: dict[int, bool] = {}
        self.repairs = 0
        self.working = list(range(size))
        self.votes: dict[int, bool] = {}
        self.verdict = False

    def bring(self, number: int, rank: int, value: Any) -> None:
        """Bring a value to the collective exchange of this number."""
        with self.changed:
            self.brought[number][rank] = value
            self.changed.notify_all()

    def take(self, number: int, rank: int, needed: range) -> dict[int, Any]:
        """What the needed ranks bring, as soon as they have; each rank takes part once. Raises RankLost."""
        with self.changed:
            members = self.working[needed.start : needed.stop]
            self._until(rank, members, lambda: self.brought[number].keys() >= set(needed))
            found = dict(self.brought[number])
            self.gone[number] += 1
            if self.gone[number] == self.size:
                del self.brought[number], self.gone[number]
            return found

    def post(self, source: int, dest: int, tag: int, value: Any) -> None:
        """Send a message."""
        with self.changed:
            self.messages[dest, tag].append((source, value))
            self.changed.notify_all()

    def fetch(self, rank: int, source: int | None, tag: int, owing: Sequence[int] = ()) -> tuple[int, Any]:
        """The first message for a rank with a tag, from `source` or, if that is None, from any rank, as long
        as none of those `owing` one has ended. Raises RankLost."""
        with self.changed:
            inbox = self.messages[rank, tag]
            senders = self.working[:rank] + self.working[rank + 1 :]
            if source is not None:
                senders = [self.working[source]]
            # As under MPI, a message is not lost because another rank is, until ranks begin to repair.

            def ready() -> bool:
                return any(source in (None, sender) for sender, _ in inbox)

            def lost() -> bool:
                cut = source is None or self.called_off or senders[0] not in self.live
                return cut and not self.is_whole

            self._until(rank, senders, ready, lost, all, owing=[self.working[other] for other in owing])
            place = next(place for place, (sender, _) in enumerate(inbox) if source in (None, sender))
            return inbox.pop(place)

    def leave(self, member: int) -> None:
        """A rank is gone, killed or ended: those that need it find out in an exchange."""
        with self.changed:
            self.live.discard(member)
            self.repairing.pop(member, None)
            self.is_whole = self.is_whole and (member not in self.working or member in self.ended)
            self.changed.notify_all()

    def end(self, member: int, whereabouts: str) -> None:
        """A rank's program comes to its end."""
        with self.changed:
            self.ended[member] = whereabouts

    def set_aside(self, member: int, ranks: int) -> None:
        """The ranks from this number on stand by, once all have come here."""
        with self.changed:
            self.aside.add(member)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.broken or self.aside >= self.live)
            self.strength = ranks
            self.working = list(range(ranks))
            self.size = ranks

    def stand_by(self) -> bool:
        """Wait until a rank calls off what others are in; returns False if no rank is left that could."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.broken or self.called_off or not self.live.intersection(self.working)
            )
            return self.called_off and not self.broken

    def call_off(self) -> None:
        """What ranks are in has failed."""
        with self.changed:
            self.is_whole = False
            self.called_off = True
            self.changed.notify_all()

    def repair(self, member: int, fill: bool) -> list[int]:
        """Meet all that are left; returns those that work from now on. Raises RankLost if ranks are ended."""
        with self.changed:
            self.repairing[member] = fill
            self.changed.notify_all()
            number = self.repairs
            self.changed.wait_for(
                lambda: self.broken or self.repairs > number or self.repairing.keys() >= self.live
            )
            if self.broken:
                raise RankLost("the ranks were ended while they repaired their world")
            if self.repairs == number:  # the first that sees all of them speaks for all
                self.repairs += 1
                others = sorted(self.live.difference(self.working))
                self.working = [rank for rank in self.working if rank in self.live]
                if all(self.repairing.values()):
                    self.working += others[: self.strength - len(self.working)]
                self.size = len(self.working)
                self.brought.clear()
                self.gone.clear()
                self.messages.clear()
                self.repairing.clear()
                self.is_whole = True
                self.called_off = False
                self.changed.notify_all()
            return self.working

    def agree(self, member: int, mine: bool) -> bool:
        """Whether all that are left of those that work say yes, and none was lost. Raises RankLost if ranks
        are ended."""
        with self.changed:
            votes = self.votes
            votes[member] = mine
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: (
                    self.broken
                    or votes is not self.votes
                    or votes.keys() >= self.live.intersection(self.working)
                )
            )
            if self.broken:
                raise RankLost("the ranks were ended while they repaired their world")
            if votes is self.votes:  # the first that sees all of them speaks for all
                self.verdict = self.is_whole and all(votes.values())
                self.votes = {}
                self.changed.notify_all()
            return self.verdict

    def abort(self) -> None:
        """Release all ranks that wait."""
        with self.changed:
            self.broken = True
            self.changed.notify_all()

    def _until(
        self,
        rank: int,
        needed: Sequence[int],
        ready: Callable[[], bool],
        lost: Callable[[], object] | None = None,
        how_many: Callable[[Iterable[object]], bool] = any,
        owing: Sequence[int] = (),
    ) -> None:
        lost = lost or (lambda: not self.is_whole)

        def has_ended(member: int) -> bool:
            return member in self.ended and member not in self.live

        def ended() -> bool:
            return any(map(has_ended, owing)) or how_many(map(has_ended, needed))

        self.changed.wait_for(lambda: self.broken or lost() or ended() or ready())
        # As under MPI an exchange may succeed on one rank and fail on another; but one to which all have come
        # is no longer lost, also where one of them was first out of it and has failed by now.
        if not ready():
            if ended() and not self.broken:
                member = next(member for member in (*owing, *needed) if has_ended(member))
                raise ended_before(self.working.index(member), self.ended[member], rank)
            raise RankLost(f"rank {rank} waited for a rank that has ended")
