"""A generative adversarial network of handwritten digits: two models, two optimisers.

python examples/run/gan.py                                     one process, batches of 64
mpiexec -n 2 python examples/run/gan.py --batch-size 32        the same on two ranks
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
parser.add_argument("--limit", type=int, help="images to train on")
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()

LATENT = 16
torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, args.dtype))
images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.get_default_dtype())
order = torch.Generator().manual_seed(0)
loader = DataLoader(images[: args.limit], batch_size=args.batch_size, shuffle=True, generator=order)

generator = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())
discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))


def loss_of(images, is_real):
    logits = discriminator(images)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))


run = rankwise.Run()
generator, discriminator = run.model(generator), run.model(discriminator)
run.keep(g_optimizer=g_optimizer, d_optimizer=d_optimizer)
loader = run.loader(loader)
for epoch in run.epochs(args.epochs):
    for real in loader:
        fake = generator(torch.randn(len(real), LATENT))

        d_optimizer.zero_grad()
        d_loss_real = loss_of(real, is_real=True)
        d_loss_real.backward()
        d_loss_fake = loss_of(fake.detach(), is_real=False)
        d_loss_fake.backward()
        d_optimizer.step()

        g_optimizer.zero_grad()
        g_loss = loss_of(fake, is_real=True)
        g_loss.backward()
        g_optimizer.step()
        run.log(d_loss_real=d_loss_real, d_loss_fake=d_loss_fake, g_loss=g_loss)
    run.print(f"epoch {epoch + 1}: losses {d_loss_real:.3f}, {d_loss_fake:.3f}, {g_loss:.3f}")
