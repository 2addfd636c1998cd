"""A variational autoencoder of handwritten digits; its loss is a sum over samples and pixels.

python examples/run/vae.py                                     one process, batches of 64
mpiexec -n 2 python examples/run/vae.py --batch-size 32        the same on two ranks
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import rankwise

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--limit", type=int, default=1500, help="images to train on")
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()


class VAE(nn.Module):
    def __init__(self, hidden=128, latent=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, 64))

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(z), mean, log_variance


def loss_of(x):
    logits, mean, log_variance = model(x)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = -0.5 * torch.sum(1 + log_variance - mean.square() - log_variance.exp())
    return reconstruction + divergence


@torch.no_grad()
def loss_per_image(loader):
    return sum(loss_of(x).item() for x in loader) / len(loader.dataset)


torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, args.dtype))
images = torch.tensor(load_digits().data / 16, dtype=torch.get_default_dtype())
order = torch.Generator().manual_seed(0)
train_loader = DataLoader(images[: args.limit], batch_size=args.batch_size, shuffle=True, generator=order)
test_loader = DataLoader(images[1500:], batch_size=64)

model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

run = rankwise.Run()
model, train_loader = run.model(model), run.loader(train_loader)
run.keep(optimizer=optimizer)
for epoch in run.epochs(args.epochs):
    for x in train_loader:
        optimizer.zero_grad()
        loss = loss_of(x)
        run.backward(loss, reduction="sum")
        optimizer.step()
    val_loss = run.mean(loss_per_image(run.shard(test_loader)))
    run.log(val_loss=val_loss)
    run.print(f"epoch {epoch + 1}: loss {val_loss:.2f}")
