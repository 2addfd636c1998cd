"""Forecasts a time series with an LSTM whose hidden state goes on from batch to batch.

The series is cut into columns, as many as a batch has samples, which are gone through side by side.

python examples/run/recurrent.py                                     one process, batches of 16
mpiexec -n 2 python examples/run/recurrent.py --batch-size 8         the same on two ranks
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rankwise

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--limit", type=int, default=20000, help="points of the series")
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()

STEPS = 25  # through which gradients go back


class Forecaster(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x, state):
        features, state = self.lstm(x, state)
        return self.head(features), state


torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, args.dtype))
time = torch.arange(args.limit + 1, dtype=torch.get_default_dtype()) / 10
series = torch.sin(time) + 0.5 * torch.sin(2.1 * time) * torch.sin(0.3 * time)
run = rankwise.Run(on_shrink="keep-global-batch")
columns = args.batch_size * run.size
pieces = args.limit // (columns * STEPS)
# [piece, column, step]: a batch holds the same piece of all columns
shape = (columns, pieces, STEPS, 1)
inputs = series[: columns * pieces * STEPS].reshape(shape).transpose(0, 1).flatten(0, 1)
targets = series[1 : columns * pieces * STEPS + 1].reshape(shape).transpose(0, 1).flatten(0, 1)
loader = DataLoader(TensorDataset(inputs, targets), batch_size=args.batch_size)

model = Forecaster()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

model, loader = run.model(model), run.loader(loader)
run.keep(optimizer=optimizer)
for epoch in run.epochs(args.epochs):
    state, ranks = None, run.size
    total = 0.0
    for x, y in loader:
        state = state if ranks == (ranks := run.size) else None  # columns are dealt anew
        forecast, state = model(x, state)
        state = tuple(its.detach() for its in state)
        loss = F.mse_loss(forecast, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
    run.print(f"epoch {epoch + 1}: squared error {run.mean(total / len(loader)):.5f}")
