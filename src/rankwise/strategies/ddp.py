"""PyTorch's DistributedDataParallel under the same loop, launch and ledger, as a peer to compare with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import ConfigError, Interrupted, one_line
from rankwise.strategies.base import State, Strategy
from rankwise.system import machine

if TYPE_CHECKING:
    from torch import Tensor

    from rankwise.models.replica import Replica

ASK_EVERY = 16
"""Steps between two questions whether somebody wishes to stop: DDP has no place for a flag."""


@dataclass(frozen=True)
class PeerState(State):
    """`seen` holds a blank image of what the wrapped model is called with, once it was."""

    seen: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class DDP(Strategy):
    """DDP over gloo. Its exchange happens inside the backward pass, and the ledger has it there.

    As in DDP the mean over ranks is not weighted by samples; a rank whose shard has run out takes part with
    gradients of zero. Ranks must be processes of their own.
    """

    shares_optimizer: ClassVar = True
    sends_gradients: ClassVar = True
    survives: ClassVar = False

    def init(self, replica: Replica, world: World) -> State:
        import torch
        from torch.nn.parallel import DistributedDataParallel

        if world.in_threads:
            raise ConfigError("--strategy ddp needs ranks that are processes: start them by mpiexec")
        try:
            _start_gloo(world)
            replica.module = DistributedDataParallel(replica.module)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"--strategy ddp cannot start gloo: {one_line(error)}") from error
        state = PeerState()

        def look(_: Any, inputs: tuple[Any, ...]) -> None:
            if not state.seen:
                state.seen.append(torch.zeros_like(inputs[0][:1]))

        replica.module.register_forward_pre_hook(look)
        return state

    def train(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        assert isinstance(state, PeerState)
        if not state.seen:
            raise RuntimeError("--strategy ddp wraps the model: call the synchroniser's `model` in your loop")
        if not len(batch):
            with world.ledger.phase("backward"):
                _take_part_with_nothing(replica, state.seen[0])
        return state.trained(len(batch))

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> None:
        """DDP has averaged the gradients in the backward pass; what is left is the wish to stop."""
        if state.rounds % ASK_EVERY == ASK_EVERY - 1:
            stops = np.array([float(world.stopping)])
            world.allreduce(stops, op="max")
            if stops[0]:
                raise Interrupted(f"stopped in epoch {batch.epoch}")

    def commit(self, state: State, replica: Replica, prepared: None, world: World) -> State:
        with world.ledger.phase("optimizer"):
            replica.step()
        return state.commit()


def _take_part_with_nothing(replica: Replica, blank: Tensor) -> None:
    """A backward pass whose gradients are zeros, which the other ranks wait for."""
    replica.model.eval()  # so that running statistics do not see the blank image
    replica.optimizer.zero_grad()
    (0 * replica.module(blank).sum()).backward()
    replica.model.train()


def _start_gloo(world: World) -> None:
    """Join a process group of all ranks, over the loopback device if they are on one host."""
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__, but documented

    names = world.allgather_object(machine.host_name())
    on_one_host = len(set(names)) == 1
    if on_one_host:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host = "127.0.0.1" if on_one_host else names[0]
    store = None
    if world.rank == 0:
        store = TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False)
    port = world.allgather_object(store.port if store else 0)[0]
    store = store or TCPStore(host, port, world.size, is_master=False, wait_for_workers=False)
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
