#!/bin/bash
# Written by: rankwise submit slurm --nodes 3 --partition long --time-limit 02:00:00 --setup 'module load openmpi/5' --ranks 8 --spares 1 --strategy local-sgd --sync-every 16 --lr 0.05 --fault kill:rank=1,epoch=2 --fault sleep:p=0.1,seconds=2 --nesterov --out '$SCRATCH/first'
#SBATCH --job-name=rankwise
#SBATCH --partition=long
#SBATCH --nodes=3
#SBATCH --ntasks=9
#SBATCH --ntasks-per-node=3
#SBATCH --cpus-per-task=1
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill

set -u
module load openmpi/5
run="$SCRATCH/first"
words=(
    --ranks 8
    --strategy local-sgd
    --lr 0.05
    --nesterov
    --sync-every 16
    --spares 1
    --fault kill:rank=1,epoch=2
    --fault sleep:p=0.1,seconds=2
)

# A job that was put back into the queue goes on from its newest checkpoint.
if [ -e "$run/record.json" ]; then
    words+=(--resume "$run")
fi

# Slurm's notice that time is up, or that others go first: ranks save, and leave.
told=
launcher=
notice() {
    told=yes
    [ -z "$launcher" ] || kill -USR1 "$launcher"
}
trap notice USR1 TERM

# rankwise calls mpirun, which has ranks go on when one dies; started by srun they could not.
rankwise train "${words[@]}" --out "$run" &
launcher=$!
while true; do
    wait "$launcher"
    code=$?
    kill -0 "$launcher" 2>/dev/null || break # else it was the notice that ended the waiting
done
wait "$launcher" 2>/dev/null
last=$?
[ "$last" -eq 127 ] || code=$last

if [ -n "$told" ] && [ "$code" -eq 130 ]; then
    echo "stopped in time: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
