"""A character-level GPT of about a million parameters.

python examples/run/transformer.py --text plays.txt
mpiexec -n 2 python examples/run/transformer.py --text plays.txt --batch-size 16
"""

import argparse
import math
import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import rankwise

parser = argparse.ArgumentParser()
parser.add_argument("--text", help="a text file; without one a small text is made up")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--limit", type=int, help="characters of the text to use")
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()
BLOCK, LAYERS, HEADS, ACCUMULATE = 64, 5, 4, 2  # gradients of two batches make a step


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(attention), args.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), args.dropout, self.training)


class GPT(nn.Module):
    def __init__(self, letters, width):
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(BLOCK, width)
        blocks = (Block(width) for _ in range(LAYERS))
        self.layers = nn.Sequential(*blocks, nn.LayerNorm(width), nn.Linear(width, letters))

    def forward(self, x):
        return self.layers(self.letters(x) + self.places.weight[: x.shape[1]])


torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, args.dtype))
words = random.Random(0).choices(["to", "be", "or", "not", "that", "is", "the", "question"], k=20000)
text = Path(args.text).read_text(encoding="utf-8") if args.text else " ".join(words)
number_of = {letter: number for number, letter in enumerate(sorted(set(text)))}
windows = torch.tensor([number_of[its] for its in text[: args.limit]]).unfold(0, BLOCK + 1, BLOCK)
train_set, test_set = windows.split([len(windows) * 9 // 10, -(-len(windows) // 10)])
order = torch.Generator().manual_seed(0)
run = rankwise.Run(on_shrink="keep-global-batch")
train_loader = run.loader(DataLoader(train_set, batch_size=args.batch_size, shuffle=True, generator=order))
test_loader = DataLoader(test_set, batch_size=64)

model = run.model(GPT(len(number_of), args.width))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
steps = args.epochs * math.ceil(len(train_loader) / ACCUMULATE)
# cosine, behind a warm-up of a tenth of the steps
scheduler = OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False)


def loss_of(windows):
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(loader):
    model.eval()
    losses = torch.cat([loss_of(windows).expand(len(windows)) for windows in loader])
    model.train()
    return losses.mean().item()


run.keep(optimizer=optimizer, scheduler=scheduler)
for epoch in run.epochs(args.epochs):
    for batch, windows in enumerate(train_loader, start=1):
        batch = run.turn + 1  # enumerate would count a turn twice that is made again
        (loss_of(windows) / ACCUMULATE).backward()
        if batch % ACCUMULATE == 0 or batch == len(train_loader):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    run.log(val_loss=(val_loss := run.mean(held_out_loss(run.shard(test_loader)))))
    run.print(f"epoch {epoch + 1}: perplexity {math.exp(val_loss):.2f}")
