"""Giving all ranks what rank 0 holds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.comm import World
from rankwise.errors import ModelError
from rankwise.training.agreement import first_difference


def start_with_rank_0(module: nn.Module, world: World, what: str) -> None:
    """Give all ranks the parameters and buffers of rank 0's `module`; all together. Raises ModelError, one
    line, if the ranks hold different ones: `what` names it."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    mine = [f"{name} {list(its.shape)} of {its.dtype}" for name, its in tensors.items()]
    for rank, theirs in enumerate(world.allgather_object(mine)):
        if (pair := first_difference(mine, theirs)) is not None:
            ours, its = pair
            raise ModelError(
                f"ranks gave different modules to {what}: rank {world.rank} has {ours} where rank {rank} has "
                f"{its}; make it in the same order on each rank"
            )
    with torch.no_grad():
        for tensor in tensors.values():
            _broadcast(tensor, world)


def _broadcast(tensor: Tensor, world: World) -> None:
    if tensor.is_sparse or tensor.is_quantized or not tensor.numel():
        return  # which the replica refuses by name
    dense = tensor.detach().contiguous()
    content = dense.reshape(-1).view(torch.uint8).numpy()
    sent = np.array(content)
    world.broadcast(sent)
    if world.rank:
        tensor.copy_(torch.from_numpy(sent).view(dense.dtype).reshape(dense.shape))
