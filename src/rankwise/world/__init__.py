"""The world of ranks: the one seam to MPI.

`World` is what everybody else talks to. Behind it stands a transport: MPI, or threads of this
process, so that programs and tests run without MPI too. Importing this package starts nothing.
"""

from rankwise.world.circle import Circle, Ranks
from rankwise.world.join import join
from rankwise.world.threads import run_in_threads, solo_world
from rankwise.world.world import Traffic, World

__all__ = ["Circle", "Ranks", "Traffic", "World", "join", "run_in_threads", "solo_world"]
