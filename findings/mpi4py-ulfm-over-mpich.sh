#!/usr/bin/env bash
# Guessed: where mpi4py cannot use the calls by which ranks survive the death of another (User-Level Failure
#   Mitigation), all of them say so. MPICH has them, so they would work.
# Happens: mpi4py's build for MPICH does not look for them, though the library has them. Agree, Shrink,
#   Get_failed and Is_revoked answer all the same, by what mpi4py does in their place, which knows of no
#   failures; only Revoke raises NotImplementedError.
# Versions: mpi4py 4.1.2 (wheel), MPICH 5.0.2 (wheel).
# Matters: a program that tries Agree or Get_failed to find out whether ranks can survive is told that they
#   can, and learns the truth when one dies. Try Revoke, on a duplicate of the communicator.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check mpich==5.0.2 mpi4py==4.1.2

cat > "$folder/look.py" <<'EOF'
import ctypes
import sys

from mpi4py import MPI

library = ctypes.CDLL(sys.argv[1])
world = MPI.COMM_WORLD.Dup()
calls = {
    "Agree": lambda: world.Agree(6 if world.rank else 3),
    "Shrink": lambda: world.Shrink().Get_size(),
    "Get_failed": lambda: world.Get_failed().Get_size(),
    "Is_revoked": lambda: world.Is_revoked(),
    "Revoke": lambda: world.Revoke(),
}
seen = {}
for name, call in calls.items():
    try:
        seen[name] = call()
    except NotImplementedError as error:
        seen[name] = type(error).__name__
if world.rank == 0:
    exports = hasattr(library, "MPIX_Comm_revoke") and hasattr(library, "MPIX_Comm_agree")
    print(" ".join(MPI.Get_library_version().split()[:3]), "has MPIX_Comm_revoke and MPIX_Comm_agree:", exports)
    for name, answer in seen.items():
        print(f"{name}: {answer}")
    expected = {"Agree": 2, "Shrink": 2, "Get_failed": 0, "Is_revoked": False, "Revoke": "NotImplementedError"}
    if not exports or seen != expected:
        sys.exit(f"changed: expected {expected}")
EOF
"$folder/venv/bin/mpiexec" -n 2 "$folder/venv/bin/python" "$folder/look.py" "$folder/venv/lib/libmpi.so.12"
