"""A plain PyTorch loop, put in step over MPI by the five lines marked below.

python examples/own_loop.py                     one process
mpiexec -n 3 python examples/own_loop.py        three, the first of which averages and evaluates
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import rankwise  # 1

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
train_images, train_labels = images[:1500], labels[:1500]
test_images, test_labels = images[1500:], labels[1500:]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

world = rankwise.join()  # 2
ranks = rankwise.synchronise(model, optimizer, world, samples=len(train_labels), batch_size=16)  # 3

for epoch in range(1, 11):
    for batch in ranks.batches(epoch):  # 4
        loss = F.cross_entropy(model(train_images[batch.indices]), train_labels[batch.indices])
        optimizer.zero_grad()
        loss.backward()
        ranks.step()  # 5, in place of optimizer.step()

if world.rank == 0:
    with torch.inference_mode():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
    print(f"{world.size} ranks, accuracy {accuracy:.1%}")
