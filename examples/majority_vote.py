"""A strategy of your own: signSGD with majority vote (Bernstein et al. 2018, arXiv:1810.05291).

rankwise train --ranks 3 --dataset digits --model mlp --strategy majority_vote:MajorityVote --lr 0.001

Each rank votes on the sign of every gradient; all step in the direction of the majority.
"""

from dataclasses import dataclass

import numpy as np
import torch

from rankwise.errors import Interrupted
from rankwise.strategies import Collective, State, Strategy, Traffic


@dataclass(frozen=True)
class MajorityVote(Strategy):
    """Fields named like options of `rankwise train` would be filled from them; this one needs none."""

    def init(self, replica, world):
        return State()

    def train(self, state, replica, batch, world):
        return state.trained(len(batch))  # nothing happens before the vote

    def prepare(self, state, replica, batch, world):
        with world.ledger.phase("pack"):
            votes = np.zeros(replica.size + 1, np.float32)  # one place more, for the wish to stop
            if len(batch):  # a rank whose samples have run out abstains
                gradients = [parameter.grad.flatten() for parameter in replica.parameters]
                votes[:-1] = torch.cat(gradients).sign().numpy()
            votes[-1] = world.stopping
        world.allreduce(votes)  # transfer and wait are the ledger's business
        if votes[-1]:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        return np.sign(votes[:-1])

    def commit(self, state, replica, prepared, world):
        with world.ledger.phase("optimizer"):
            sizes = [parameter.numel() for parameter in replica.parameters]
            pieces = torch.from_numpy(prepared).split(sizes)
            for parameter, piece in zip(replica.parameters, pieces, strict=True):
                parameter.grad = torch.empty_like(parameter).copy_(piece.view(parameter.shape))
            replica.step()
        return state.commit()

    def traffic(self, model, hosts):
        size = 4 * (model.parameters + 1)  # bytes of the votes, for `rankwise predict`
        return Traffic(each_round=(Collective("allreduce", size),), payload_bytes=size)
