"""A character-level GPT, as the study on language trains it.

It is a program like any user's: rankwise run [options] language_model.py [its own]. Each epoch trains some
windows of the text, drawn anew, and ends with the loss on windows that were held out.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import rankwise
from rankwise.data.text import read_text

HEADS = 4
WARM_UP = 0.1
"""Part of the steps in which the learning rate rises; then it falls along a cosine."""


def main() -> None:
    """Train, and log the held-out loss after each epoch."""
    args = arguments()
    run = rankwise.Run()
    torch.manual_seed(args.seed)
    train_set, held_out, letters = windows_of(read_text(args.text), args)
    order = torch.Generator().manual_seed(args.seed)
    sampler = RandomSampler(train_set, replacement=False, num_samples=args.windows, generator=order)
    loader = run.loader(DataLoader(train_set, batch_size=args.batch_size, sampler=sampler))
    model = run.model(GPT(letters, args.width, args.layers, args.block))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    steps = args.epochs * len(loader)
    scheduler = OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
    )
    run.keep(optimizer=optimizer, scheduler=scheduler)
    for _ in run.epochs(args.epochs):
        for (windows,) in loader:
            optimizer.zero_grad()
            loss = loss_of(model, windows)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            run.log(loss=loss)
        run.log(val_loss=mean_loss(model, run.shard(held_out)))


def arguments() -> argparse.Namespace:
    """What this program is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text file; else the topics of Python's help")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--windows", type=int, default=4096, help="windows an epoch, of all ranks together")
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step, of each rank")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block", type=int, default=64, help="characters of a window that are predicted")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=256, help="windows to evaluate on")
    parser.add_argument("--tuning", action="store_true", help="hold out others, which the last ones are not")
    return parser.parse_args()


def windows_of(text: str, args: argparse.Namespace) -> tuple[TensorDataset, Tensor, int]:
    """The windows to train on and those held out, and how many letters there are. The last tenth of the text
    is held out; for tuning the tenth before it, and the last is not looked at."""
    number_of = {letter: number for number, letter in enumerate(sorted(set(text)))}
    numbers = torch.tensor([number_of[letter] for letter in text])
    windows = numbers.unfold(0, args.block + 1, args.block)
    tenth = len(windows) // 10
    end = len(windows) - tenth * args.tuning
    held_out = windows[end - tenth : end]
    evenly = torch.linspace(0, len(held_out) - 1, min(args.held_out, len(held_out))).long()
    # Tuning and the final runs train on the same windows, of which neither holds any out.
    return TensorDataset(windows[: len(windows) - 2 * tenth]), held_out[evenly], len(number_of)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean loss of a character, in nats."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor) -> float:
    """The same over many windows, some at a time."""
    model.eval()
    sums = [float(loss_of(model, part)) * len(part) for part in torch.split(windows, 64)]
    model.train()
    return math.fsum(sums) / max(len(windows), 1)


class Block(nn.Module):
    """Attention to what was before, and a perceptron, each beside a way past it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attention)
        after: Tensor = x + self.mlp(self.norm2(x))
        return after


class GPT(nn.Module):
    """Scores of the next letter, for each of a window."""

    def __init__(self, letters: int, width: int, layers: int, block: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(block, width)
        blocks = (Block(width) for _ in range(layers))
        self.layers = nn.Sequential(*blocks, nn.LayerNorm(width), nn.Linear(width, letters))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(self.letters(x) + self.places.weight[: x.shape[1]])
        return scores


if __name__ == "__main__":
    main()
