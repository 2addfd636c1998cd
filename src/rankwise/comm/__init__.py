"""The world of ranks: the one seam to MPI.

All other rooms talk to `World`. Behind it stands a transport: MPI, or threads of this process, so that
programs and tests run without MPI too. Importing this package starts nothing.
"""

from rankwise.comm.exchanges import BackgroundExchange, Traffic
from rankwise.comm.join import join
from rankwise.comm.subgroup import Ranks, Subgroup
from rankwise.comm.threads import run_in_threads, solo_world
from rankwise.comm.world import World

__all__ = [
    "BackgroundExchange",
    "Ranks",
    "Subgroup",
    "Traffic",
    "World",
    "join",
    "run_in_threads",
    "solo_world",
]
