#!/usr/bin/env bash
# Guessed: torch.distributed over gloo adds up tensors element by element, whatever their strides, or refuses
#   those that are not contiguous.
# Happens: it takes as many numbers as the tensor has from the place in memory where the tensor begins. Of
#   every other element of a row the first ones and what lies between are added up, and the last ones are not.
#   Where ranks differ in memory format (channels-last here, contiguous there), numbers meet those of other
#   elements, in a sum as in a broadcast. There is no error.
# Versions: torch 2.13.0 (CPU).
# Matters: gradients that are exchanged by hand are often views, and a network that is channels-last on some
#   ranks only trains on nonsense. Make tensors contiguous first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$folder/look.py" <<'EOF'
import sys

import torch
from torch import distributed, multiprocessing


def look(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    row = torch.arange(6.0) + 10 * rank
    distributed.all_reduce(row[::2])

    image = torch.arange(8.0).reshape(1, 2, 2, 2)
    if rank:
        image = torch.zeros(1, 2, 2, 2).to(memory_format=torch.channels_last)
    distributed.broadcast(image, 0)

    seen = [None, None]
    distributed.all_gather_object(seen, (row.tolist(), image.flatten().tolist()))
    if rank == 0:
        for number, (numbers, sent) in enumerate(seen):
            print(f"rank {number}: after all_reduce of row[::2] {numbers}, broadcast {sent}")
        right = [[10.0, 1.0, 14.0, 3.0, 18.0, 5.0], [10.0, 11.0, 14.0, 13.0, 18.0, 15.0]]
        print(f"right would be {right[0]} and {right[1]}, and the same broadcast on both")
        wrong = [[10.0, 12.0, 14.0, 3.0, 4.0, 5.0], [10.0, 12.0, 14.0, 13.0, 14.0, 15.0]]
        if [numbers for numbers, _ in seen] != wrong or seen[0][1] == seen[1][1]:
            sys.exit("changed: strides used to be ignored")
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(look, (sys.argv[1],), 2)
EOF
"$folder/venv/bin/python" "$folder/look.py" "$folder"
