"""A program of known delays: in each function one rank is late by half a second, and another waits for it in
a call of MPI, of as many bytes as the second argument says; those behind it name the functions, all without
one. Each rank writes down when it came to that call and when it left it, and who is late when it was that no
more, by a clock that they share."""

import contextlib
import json
import sys
import time

import numpy as np
from mpi4py import MPI
from mpi4py.futures import MPICommExecutor

LATE_S = 0.5

comm = MPI.COMM_WORLD
rank, last = comm.Get_rank(), comm.Get_size() - 1
middle = 0 < rank < last
pair = comm.Split(1 if middle else 0, rank)
sides = None if middle or not last else MPI.COMM_SELF.Create_intercomm(0, comm, last - rank)
numbers = int(sys.argv[2]) // 8 if __name__ == "__main__" else 1
large, small = np.zeros(125_000), np.zeros(numbers)
total = np.zeros(numbers)
sums = np.zeros(numbers * (last + 1))
seen: dict[str, tuple[float, float]] = {}
came: dict[str, float] = {}


@contextlib.contextmanager
def timed(name):
    """Keep when a call was made, and when it was over."""
    before = time.monotonic()
    yield
    seen[name] = before, time.monotonic()


def late(who):
    if rank == who:
        time.sleep(LATE_S)
        came[sys._getframe(1).f_code.co_name] = time.monotonic()


def late_sender():
    late(0)
    if rank == 0:
        comm.Send(small, last)
    elif rank == last:
        with timed("late_sender"):
            comm.Recv(small, source=0)


def late_receiver():
    late(0)
    if rank == 0:
        comm.Recv(large, last)
    elif rank == last:
        with timed("late_receiver"):
            comm.Send(large, 0)


def barrier():
    late(0)
    with timed("barrier"):
        comm.Barrier()


def allreduce():
    late(last)
    with timed("allreduce"):
        comm.Allreduce(small, total)


def broadcast():
    late(0)
    with timed("broadcast"):
        comm.Bcast(small)


def gather():
    late(last)
    with timed("gather"):
        comm.Gather(small, sums if rank == 0 else None)


def lower_broadcast():
    late(0)
    with timed("lower_broadcast"):
        comm.bcast([1, 2])


def lower_gather():
    late(last)
    with timed("lower_gather"):
        comm.gather("text")


def lower_message():
    late(0)
    if rank == 0:
        comm.send({"text": 1}, last)
    elif rank == last:
        with timed("lower_message"):
            comm.recv()


def all_requests():
    late(0)
    if rank == 0:
        comm.Send(small, last, tag=3)
        comm.Recv(small, last)
    elif rank == last:
        requests = [comm.Irecv(small), comm.Isend(total, 0)]
        with timed("all_requests"):
            MPI.Request.Waitall(requests)


def both_ways():
    late(0)
    if not middle:
        with timed("both_ways"):
            comm.Sendrecv(small, last - rank, recvbuf=total, source=last - rank)


def part_of_all():
    late(0)
    with timed("part_of_all"):
        pair.Barrier()


def any_source():
    late(last)
    if rank == last:
        comm.Send(small, 0)
    elif rank == 0:
        with timed("any_source"):
            comm.Recv(small, source=MPI.ANY_SOURCE)


def scan():
    late(0)
    with timed("scan"):
        comm.Scan(small, total)


def reduce():
    late(last)
    with timed("reduce"):
        comm.Reduce(small, total)


def scatter():
    late(0)
    with timed("scatter"):
        comm.Scatter(sums if rank == 0 else None, total)


def synchronous_send():
    late(0)
    if rank == 0:
        comm.Recv(total, last)
    elif rank == last:
        with timed("synchronous_send"):
            comm.Ssend(small, 0)


def in_background():
    late(last)
    request = comm.Iallreduce(small, total)
    with timed("in_background"):
        request.Wait()


def persistent():
    late(0)
    if rank == 0:
        request = comm.Send_init(small, last)
        request.Start()
        request.Wait()
        request.Free()
    elif rank == last:
        request = comm.Recv_init(total, 0)
        request.Start()
        with timed("persistent"):
            request.Wait()
        request.Free()


def probe():
    late(0)
    if rank == 0:
        comm.Send(small, last)
    elif rank == last:
        with timed("probe"):
            comm.Probe(source=0)
        comm.Recv(total, 0)


def matched_probe():
    late(0)
    if rank == 0:
        comm.send("text", last)
    elif rank == last:
        with timed("matched_probe"):
            message = comm.mprobe(source=0)
        message.recv()


def polls():
    late(0)
    if rank == 0:
        comm.send("text", last)
    elif rank == last:
        with timed("polls"):
            while not comm.iprobe(source=0):
                time.sleep(0.01)
        comm.recv(source=0)


def all_from_any():
    late(0)
    if rank == 0:
        comm.Send(small, last, tag=1)
    elif rank == last:
        requests = [comm.Irecv(total, MPI.ANY_SOURCE, 1), comm.Irecv(total.copy(), MPI.ANY_SOURCE, 2)]
        requests.append(comm.Isend(small, last, tag=2))
        with timed("all_from_any"):
            MPI.Request.Waitall(requests)


def two_sides():
    late(0)
    if rank == 0:
        sides.Send(small, 0)
    elif rank == last:
        with timed("two_sides"):
            sides.Recv(total, 0)


def new_communicator():
    late(0)
    with timed("new_communicator"):
        twin = comm.Dup()
    twin.Free()


def pool():
    if middle:
        return
    with timed("pool"), MPICommExecutor(pair, root=0) as executor:
        if executor is not None:
            late(0)
            executor.submit(abs, -1).result()


def pickled():
    """Nobody is late: half a second goes into the pickle itself."""
    if rank == 0:
        comm.send(Slow(), last)
    elif rank == last:
        comm.recv(source=0)


class Slow:
    def __reduce__(self):
        with timed("pickled"):
            time.sleep(LATE_S)
        return Slow, ()


CASES = (
    *(late_sender, late_receiver, barrier, allreduce, broadcast, gather, lower_broadcast, lower_gather),
    *(lower_message, all_requests, both_ways, part_of_all, any_source, scan, reduce, scatter),
    *(synchronous_send, in_background, persistent, probe, matched_probe, polls, all_from_any, two_sides),
    *(new_communicator, pool, pickled),
)

if __name__ == "__main__":
    for case in CASES:
        if case.__name__ in sys.argv[3:] or not sys.argv[3:]:
            comm.Barrier()
            case()
    with open(f"{sys.argv[1]}-{rank}.json", "w") as file:
        json.dump({"seen": seen, "came": came}, file)
