"""The world of ranks: the one seam to MPI.

`World` is what everybody else talks to. Behind it stands a transport: MPI, or threads of this
process, so that programs and tests run without MPI too. Importing this package starts nothing.
"""

from rankwise.comm.join import join
from rankwise.comm.subgroup import Ranks, Subgroup
from rankwise.comm.threads import run_in_threads, solo_world
from rankwise.comm.world import Traffic, World

__all__ = ["Ranks", "Subgroup", "Traffic", "World", "join", "run_in_threads", "solo_world"]
