"""Classifies handwritten digits with a compiled network.

python examples/run/compiled.py                                     one process, batches of 64
mpiexec -n 2 python examples/run/compiled.py --batch-size 32        the same on two ranks
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rankwise

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--limit", type=int, default=1500, help="images to train on")
parser.add_argument("--backend", default="inductor", help="of torch.compile")
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, args.dtype))
digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.get_default_dtype())
labels = torch.tensor(digits.target)
train_set = TensorDataset(images[: args.limit], labels[: args.limit])
test_set = TensorDataset(images[1500:], labels[1500:])
order = torch.Generator().manual_seed(0)
train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True, generator=order)
test_loader = DataLoader(test_set, batch_size=64)

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
model = torch.compile(model, backend=args.backend, dynamic=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


@torch.no_grad()
def accuracy(loader):
    right = torch.cat([model(x).argmax(1) == y for x, y in loader])
    return right.float().mean().item()


run = rankwise.Run()
model, train_loader = run.model(model), run.loader(train_loader)
run.keep(optimizer=optimizer)
for epoch in run.epochs(args.epochs):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    val_accuracy = run.mean(accuracy(run.shard(test_loader)))
    run.log(val_accuracy=val_accuracy)
    run.print(f"epoch {epoch + 1}: accuracy {val_accuracy:.1%}")
