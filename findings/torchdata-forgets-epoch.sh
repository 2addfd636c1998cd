#!/usr/bin/env bash
# Guessed: a StatefulDataLoader with a StatefulDistributedSampler goes on from its state_dict with the samples
#   that were still to come in that epoch.
# Happens: the state has how many samples the sampler has given, and not the epoch that set_epoch told it. The
#   resumed loader skips so many of epoch 0's order and goes on in that: some samples are trained twice in the
#   epoch, and others not at all. There is no warning. With set_epoch before the state is loaded it is right.
# Versions: torchdata 0.11.0, torch 2.13.0 (CPU).
# Matters: call set_epoch also on resuming, or every run that is resumed in the middle of an epoch after the
#   first has trained on a crooked epoch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torchdata==0.11.0 torch==2.13.0 numpy==2.4.6

cat > "$folder/look.py" <<'EOF'
import sys

from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

SAMPLES, RANKS, EPOCH, BEFORE = 12, 2, 3, 3


def loader(rank, epoch):
    sampler = StatefulDistributedSampler(range(SAMPLES), num_replicas=RANKS, rank=rank, shuffle=True, seed=1)
    if epoch is not None:
        sampler.set_epoch(epoch)
    return StatefulDataLoader(list(range(SAMPLES)), batch_size=1, sampler=sampler)


def train(epoch_on_resuming):
    """What both ranks train in an epoch that is interrupted and resumed."""
    trained = []
    for rank in range(RANKS):
        first = loader(rank, EPOCH)
        batches = iter(first)
        trained += [int(next(batches)) for _ in range(BEFORE)]
        resumed = loader(rank, epoch_on_resuming)
        resumed.load_state_dict(first.state_dict())
        trained += [int(batch) for batch in resumed]
    twice = sorted({its for its in trained if trained.count(its) > 1})
    return twice, sorted(set(range(SAMPLES)) - set(trained))


twice, never = train(None)
print(f"{SAMPLES} samples, 2 ranks, resumed by the state alone: trained twice {twice}, never {never}")
twice_told, never_told = train(EPOCH)
print(f"set_epoch before the state is loaded: trained twice {twice_told}, never {never_told}")
if not (twice and never) or twice_told or never_told:
    sys.exit("changed: the state used to lack the epoch")
EOF
"$folder/venv/bin/python" -W ignore "$folder/look.py"
