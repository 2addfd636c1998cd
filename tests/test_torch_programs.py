"""The ledger of a PyTorch program: its calls of `torch.distributed`, and the backward pass of DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankwise.ledger.call_log import read_logs
from rankwise.runs.folder import RunFolder

from .conftest import Command
from .effort import daily

LATE_S = 0.3

PROGRAM = """
import sys, time, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
last = size - 1
x = torch.ones(4)
def late(who):
    time.sleep(LATE_S if rank == who else 0)
def summed():
    late(0); dist.all_reduce(x)
def spread():
    late(0); dist.broadcast(x, 0)
def met():
    late(last); dist.barrier()
def gathered():
    late(last); dist.all_gather([torch.empty(4) for _ in range(size)], x)
def scattered():
    late(0); dist.reduce_scatter(x.clone(), [x.clone() for _ in range(size)])
def message():
    if rank == 0:
        late(0); dist.send(x, last)
    elif rank == last:
        dist.recv(x, 0)
def anybody():
    if rank == 0:
        late(0); dist.isend(x, last).wait()
    elif rank == last:
        dist.irecv(x).wait()
def later():
    late(0); dist.all_reduce(x, async_op=True).wait()
def objects():
    late(0); dist.all_gather_object([None] * size, rank)
for case in (summed, spread, met, gathered, scattered, message, anybody, later, objects):
    dist.barrier()
    case()
some = dist.new_group([0, last])
def of_two():
    if rank in (0, last):
        late(0); dist.all_reduce(x, group=some)
of_two()
def rooted():
    dist.reduce(x.clone(), last)
    dist.gather(x, [torch.empty(4) for _ in range(size)] if rank == 0 else None)
    dist.scatter(x.clone(), [x.clone() for _ in range(size)] if rank == last else None, src=last)
    dist.broadcast_object_list([rank], src=last)
    if rank in (0, last):
        dist.broadcast(x, last, group=some)
rooted()
torch.manual_seed(0)
def trained(late_s=0.0, **options):
    torch.manual_seed(7)
    net = torch.nn.Sequential(torch.nn.Linear(8, 900), torch.nn.Tanh(), torch.nn.Linear(900, 3))
    model = DDP(net, bucket_cap_mb=0.01, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(rank)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 8)).square().sum()
        time.sleep(late_s if rank == 0 else 0)
        loss.backward()
        optimizer.step()
    return [its.detach().clone() for its in net.parameters()]
torch.save([trained(LATE_S), trained(gradient_as_bucket_view=True)], f"{sys.argv[1]}-{rank}.pt")
dist.destroy_process_group()
""".replace("LATE_S", str(LATE_S))

EXPECTED = {
    "summed": "last for 0",
    "spread": "last for 0",
    "met": "0 for last",
    "gathered": "0 for last",
    "scattered": "last for 0",
    "message": "last for 0",
    "anybody": "last for 0",
    "later": "last for 0",
    "objects": "last for 0",
    "of_two": "last for 0",
}


@pytest.mark.mpi
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", daily([2, 3], [2]))
def test_a_pytorch_program_has_its_ledger(command: Command, tmp_path: Path, ranks: int) -> None:
    """Who waited for whom in each kind of call of `torch.distributed`, in groups and in the background, and
    in the backward pass of DDP, by line; each rank's time closes; roots are told; and what DDP computes is
    what it computes where rankwise leaves it alone, to the bit on two ranks."""
    (tmp_path / "torches.py").write_text(PROGRAM)
    done = command.rankwise("run", "--ranks", str(ranks), "--out", "run", "torches.py", "net")
    assert done.code == 0, done
    run = RunFolder(tmp_path / "run").read()
    assert all(sum(row.phases_ns.values()) == row.wall_ns for row in run.ranks)
    assert run.environment.mpi.startswith("gloo of torch")
    numbers = {"0": 0, "last": ranks - 1}
    for case, words in EXPECTED.items():
        waiter, late = (numbers[word] for word in words.split(" for "))
        waits = sum(
            site.wait_on_ns.get(str(late), 0)
            for site in run.call_sites
            if (site.rank, site.function) == (waiter, case)
        )
        assert waits / 1e9 == pytest.approx(LATE_S, rel=0.1, abs=0.08), case
    line = PROGRAM.splitlines().index("        loss.backward()") + 1
    (backward,) = (site for site in run.call_sites if (site.rank, site.line) == (ranks - 1, line))
    assert backward.call == "DistributedDataParallel"
    assert backward.wait_on_ns["0"] / 1e9 == pytest.approx(2 * LATE_S, rel=0.2, abs=0.15)
    for log in read_logs(RunFolder(tmp_path / "run").calls):
        roots = [
            int(row["peer"])
            for row in log.rows
            if row["site"] >= 0 and log.sites[row["site"]].function == "rooted"
        ]
        of_group = [1] if log.rank in (0, ranks - 1) else []
        assert roots == [ranks - 1, 0, ranks - 1, ranks - 1, *of_group]
    for rank in range(ranks):
        hooked, alone = torch.load(tmp_path / f"net-{rank}.pt")
        for one, other in zip(hooked, alone, strict=True):
            assert torch.equal(one, other) if ranks == 2 else torch.allclose(one, other, rtol=1e-5)
