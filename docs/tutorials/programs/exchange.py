"""A master that takes the mean of what its workers send."""

import time

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD


def work() -> np.ndarray:
    time.sleep(0.05 * comm.rank)  # the higher its number, the slower a rank
    return np.ones(100_000)


for _ in range(5):
    if comm.rank == 0:
        parts = [comm.recv(source=rank) for rank in range(1, comm.size)]
        mean = sum(parts) / len(parts)
    else:
        comm.send(work(), dest=0)
        mean = None
    mean = comm.bcast(mean)
