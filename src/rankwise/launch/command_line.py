"""The command that starts ranks: what each mpiexec must be told on one host, on several, and in a batch
job."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rankwise.comm.mpi_environment import Mpiexec
from rankwise.launch.hosts import AGENT, is_here, passed_on
from rankwise.system import batch, machine
from rankwise.system.batch import Allocation
from rankwise.system.hosts import Host, share_a_first_name

_KEEPALIVE = {"time": 5, "intvl": 2, "probes": 3}
"""When Open MPI's daemons ask whether another host is there: after `time` silent seconds, then every `intvl`
seconds, and `probes` times until they believe that it is not."""

SURVIVING_BETWEEN_HOSTS = [
    *("--mca", "pml", "ob1", "--mca", "coll", "^han,cuda,hcoll,portals4"),
    *(word for name, s in _KEEPALIVE.items() for word in ("--prtemca", f"oob_tcp_keepalive_{name}", str(s))),
]
"""What survives failures of Open MPI's point-to-point and collective modules, of which others would be chosen
on several hosts (its issues 13915 and 11794); and its daemons find out about a link that was cut within some
ten seconds instead of never."""

_BY_ITSELF = [
    *("--prtemca", "ras", "^" + ",".join(name for system in batch.SYSTEMS for name in system.components)),
    *("--prtemca", "plm", "^slurm"),
]
"""Open MPI shall not count a batch job's slots: a job of one task has one, whatever cores that task has."""


def command_line(
    mpiexec: Mpiexec,
    ranks: int,
    program: list[str],
    *,
    survives: bool = False,
    hosts: Sequence[Host] = (),
) -> list[str]:
    """The command that starts `program` on `ranks` ranks, which with `survives` go on if one dies.

    Ranks of this machine are bound to a NUMA domain, where their memory is near, but not to a core:
    bound to cores, two ranks on two cores lost 7% to whatever else ran there. With more ranks than
    cores the scheduler decides, and ranks yield while they wait. A container's share of the CPUs does
    not say which ones they are, so there no rank is bound. In a batch job of several hosts mpiexec
    knows best, unless it was built without that batch system: then it is told the job's hosts.

    On `hosts` ranks fill one after the other.
    """
    job = batch.allocation()
    if job is not None and not hosts and job.host_count > 1 and not mpiexec.reads_hosts_of(job):
        hosts = job.hosts
    command = [str(mpiexec.path), "-n", str(ranks)]
    if not mpiexec.is_open_mpi:
        return [*command, *_for_others(mpiexec, hosts, job), *program]
    if mpiexec.marks_output:
        command += ["--output", "tag"]  # which tells ranks' lines from its own
    if survives:
        command += ["--with-ft", "ulfm"]
    if hosts:
        command += _on_hosts(hosts, ranks)
    elif job is not None and job.host_count > 1:
        command += SURVIVING_BETWEEN_HOSTS if survives else []
        command += _crowded("slot") if ranks > job.slots else ["--bind-to", "numa:overload-allowed"]
    else:
        command += _here(ranks, job)
    return [*command, *program]


def _on_hosts(hosts: Sequence[Host], ranks: int) -> list[str]:
    # Open MPI takes a name with a user for that of another host, which this one is not.
    named = [Host(host.name, host.slots) if host.user and is_here(host.name) else host for host in hosts]
    words = ["--host", ",".join(map(str, named))]
    if share_a_first_name(hosts):
        words += ["--prtemca", "prte_keep_fqdn_hostnames", "1"]  # or it would take both for one
    crowded = ranks > sum(host.slots for host in hosts)
    words += _crowded("slot") if crowded else ["--map-by", "slot", "--bind-to", "none"]
    words += ["--mca", "btl", "self,sm,tcp", *SURVIVING_BETWEEN_HOSTS]
    for variable in passed_on():
        words += ["-x", variable]
    return words


def _here(ranks: int, job: Allocation | None) -> list[str]:
    # Shared memory alone spares a second of looking at networks.
    words = ["--mca", "pml", "ob1", "--mca", "btl", "self,sm", *(_BY_ITSELF if job else [])]
    if ranks > machine.usable_cores():
        return [*words, *_crowded("")]
    if machine.cpu_quota() is not None:
        return [*words, "--bind-to", "none"]
    return [*words, "--map-by", "numa", "--bind-to", "numa"]


def _crowded(mapping: str) -> list[str]:
    """For more ranks than there is room for."""
    return ["--map-by", f"{mapping}:OVERSUBSCRIBE", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]


def _for_others(mpiexec: Mpiexec, hosts: Sequence[Host], job: Allocation | None) -> list[str]:
    """For MPICH and those made from it, whose launcher is Hydra."""
    words = ["-prepend-rank"] if mpiexec.is_hydra else []
    if hosts:
        words += ["-hosts", ",".join(map(str, hosts)), "-launcher", "ssh"]
        agent = os.environ.get(AGENT)
        return [*words, "-launcher-exec", agent] if agent else words
    alone = job is not None and job.host_count == 1
    return [*words, "-rmk", "user", "-launcher", "fork"] if alone and mpiexec.is_hydra else words
