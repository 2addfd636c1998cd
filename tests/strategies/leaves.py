"""One rank of a small training whose loop does what it is told: ``HOW WHO [options as JSON]``.

WHO is a rank, or ``all``. HOW says what it does in epoch 2, step 3 of a loop, or after epoch 2.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn
from torch.nn import functional as F

import rankwise

how, who, *options = sys.argv[1:]
world = rankwise.join()
mine = how if who in ("all", str(world.rank)) else ""


def train() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(60, 6), torch.randint(0, 3, (60,))
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    its = rankwise.synchronise(
        model, optimizer, world, samples=60, batch_size=5, **json.loads("".join(options) or "{}")
    )
    for epoch in range(1, 5):
        for step, batch in enumerate(its.batches(epoch), start=1):
            word = mine if (epoch, step) == (2, 3) else ""
            if word == "break":
                break
            if word == "return":
                return
            if word == "exit":
                sys.exit(0)
            if word == "raise":
                raise ValueError("on purpose")
            optimizer.zero_grad()
            F.cross_entropy(its.model(images[batch.indices]), labels[batch.indices]).backward()
            its.step()
        if mine == "stop-early" and epoch == 2:
            break


train()
print("done", flush=True)
