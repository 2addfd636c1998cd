"""Regression on a table: how far diabetes goes on, from ten numbers of each patient.

Halves the learning rate where the validation loss rests, and stops when it has rested for long.

python examples/run/table.py                                     one process, batches of 32
mpiexec -n 2 python examples/run/table.py --batch-size 16        the same on two ranks
"""

import argparse

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rankwise

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--limit", type=int, default=350, help="patients to train on")
parser.add_argument("--patience", type=int, default=10, help="epochs without a better loss until it stops")
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, args.dtype))
diabetes = load_diabetes(scaled=False)
features = torch.tensor(diabetes.data, dtype=torch.get_default_dtype())
targets = torch.tensor(diabetes.target, dtype=torch.get_default_dtype()).unsqueeze(1)
features = (features - features[: args.limit].mean(0)) / features[: args.limit].std(0)
targets = (targets - targets[: args.limit].mean()) / targets[: args.limit].std()
train_set = TensorDataset(features[: args.limit], targets[: args.limit])
test_set = TensorDataset(features[350:], targets[350:])
order = torch.Generator().manual_seed(0)
train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True, generator=order)
test_loader = DataLoader(test_set, batch_size=64)

model = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)


@torch.no_grad()
def loss_on(loader):
    losses = [F.mse_loss(model(x), y, reduction="none") for x, y in loader]
    return torch.cat(losses).mean().item()


best, rested = float("inf"), 0
run = rankwise.Run()
model, train_loader = run.model(model), run.loader(train_loader)
run.keep(optimizer=optimizer, scheduler=scheduler)
for epoch in run.epochs(args.epochs):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    val_loss = run.mean(loss_on(run.shard(test_loader)))
    run.log(val_loss=val_loss)
    scheduler.step(val_loss)
    run.print(f"epoch {epoch + 1}: loss {val_loss:.4f}")
    best, rested = (val_loss, 0) if val_loss < best else (best, rested + 1)
    if rested == args.patience:
        break
