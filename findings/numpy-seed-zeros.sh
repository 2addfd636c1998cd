#!/usr/bin/env bash
# Guessed: numpy.random.default_rng([seed, rank]) gives every rank a stream of its own, which is not that of
#   default_rng(seed).
# Happens: a seed of up to four words is filled up with zeros, so zeros at its end do not count: seed, [seed],
#   [seed, 0] and [seed, 0, 0] are one stream. From the fifth word on they count, and [seed, 0, 0, 0, 0] is the
#   first of the streams that SeedSequence(seed).spawn gives.
# Versions: numpy 2.4.6.
# Matters: rank 0's augmentation by [seed, rank] draws the same numbers as the shuffle by seed that all ranks
#   share, and epoch 0 of a rank, [seed, rank, 0], as whatever is seeded by [seed, rank]. Put a number that
#   says what for behind the seed, from 1, and seed by lists of one length, or use SeedSequence.spawn.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6

cat > "$folder/look.py" <<'EOF'
import sys

import numpy as np


def draws(seed):
    return np.random.default_rng(seed).integers(1000, size=4).tolist()


alone = draws(7)
same = {str(seed): draws(seed) for seed in ([7], [7, 0], [7, 0, 0], [7, 0, 0, 0])}
others = {str(seed): draws(seed) for seed in ([7, 1], [0, 7], [7, 0, 0, 0, 0])}
print(f"7: {alone}")
for seed, its in (same | others).items():
    print(f"{seed}: {its}{', the same' if its == alone else ''}")
spawned = [np.random.default_rng(its).integers(1000, size=4).tolist() for its in np.random.SeedSequence(7).spawn(2)]
print(f"spawned from 7: {spawned[0]} and {spawned[1]}")
if any(its != alone for its in same.values()) or alone in [*others.values(), *spawned]:
    sys.exit("changed: zeros at the end used not to count, up to four words")
EOF
"$folder/venv/bin/python" "$folder/look.py"
