"""Logistic regression by L-BFGS, which calls a closure several times in a step.

python examples/run/lbfgs.py                        one process
mpiexec -n 2 python examples/run/lbfgs.py           two ranks, of which each has half of the data
"""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rankwise

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--limit", type=int, default=500, help="patients to train on")
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, args.dtype))
cancer = load_breast_cancer()
features = torch.tensor(cancer.data, dtype=torch.get_default_dtype())
features = (features - features.mean(0)) / features.std(0)
labels = torch.tensor(cancer.target, dtype=torch.get_default_dtype()).unsqueeze(1)
train_set = TensorDataset(features[: args.limit], labels[: args.limit])
train_loader = DataLoader(train_set, batch_size=len(train_set))  # all in one batch
test_loader = DataLoader(TensorDataset(features[500:], labels[500:]), batch_size=64)

model = nn.Linear(features.shape[1], 1)
optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")


@torch.no_grad()
def accuracy(loader):
    right = torch.cat([(model(x) > 0) == (y > 0) for x, y in loader])
    return right.float().mean().item()


run = rankwise.Run()
model, train_loader = run.model(model), run.loader(train_loader)
run.keep(optimizer=optimizer)
for epoch in run.epochs(args.epochs):
    for x, y in train_loader:

        def closure():
            optimizer.zero_grad()
            penalty = 0.01 * model.weight.square().sum()
            loss = F.binary_cross_entropy_with_logits(model(x), y) + penalty
            loss.backward()
            return loss

        loss = optimizer.step(closure)
    val_accuracy = run.mean(accuracy(run.shard(test_loader)))
    run.log(val_accuracy=val_accuracy)
    run.print(f"epoch {epoch + 1}: loss {loss:.6f}, accuracy {val_accuracy:.1%}")
