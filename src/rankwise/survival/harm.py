"""What a fault does to a rank that does not get over it: to a process, or to a thread."""

from __future__ import annotations

import os
import signal
import threading
from typing import Protocol

from rankwise.comm.threads import Killed
from rankwise.system import machine


class Harm(Protocol):
    """What a fault can do to the rank that it strikes."""

    def kill(self) -> None:
        """End the rank at once; the others find out by themselves."""

    def hang(self) -> None:
        """Stop the rank until it is woken or ended from outside."""

    def drop_host(self) -> None:
        """End all ranks of the rank's host, with what started them, as a loss of power does."""

    def cut_links(self) -> None:
        """Take the links of the rank's host to others down."""


class ProcessHarm:
    """To a rank that is this process."""

    def kill(self) -> None:
        machine.kill_self()

    def hang(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def drop_host(self) -> None:
        machine.drop_host()

    def cut_links(self) -> None:
        machine.cut_links()


class ThreadHarm:
    """To a rank that is a thread of this process, as far as there is such harm: threads have no host."""

    def kill(self) -> None:
        raise Killed

    def hang(self) -> None:
        threading.Event().wait()

    def drop_host(self) -> None:
        raise NotImplementedError("ranks that are threads have no host of their own")

    def cut_links(self) -> None:
        raise NotImplementedError("ranks that are threads have no links")
