"""Which methods of mpi4py's classes communicate, and what each of them waits for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.ledger.call_log import Kind

_SENDS = "Send Ssend Rsend Bsend send ssend bsend"
_POSTED_SENDS = "Isend Issend Irsend Ibsend isend issend ibsend"
_COLLECTIVES = """
    Barrier Bcast Gather Gatherv Scatter Scatterv Allgather Allgatherv Alltoall Alltoallv Alltoallw Reduce
    Allreduce Reduce_scatter Reduce_scatter_block barrier bcast gather scatter allgather alltoall reduce
    allreduce"""
_MAKERS = "Dup Clone Dup_with_info Create Split Split_type Create_intercomm"
"""Calls that make a communicator wait as a barrier does; freeing one waits for nobody."""

MAKERS = frozenset(
    f"""{_MAKERS} Create_cart Create_graph Create_dist_graph Create_dist_graph_adjacent Create_group
    Create_from_group Merge Sub Shrink Accept Connect Spawn Spawn_multiple Join Idup Idup_with_info""".split()
)
"""All that may return a new communicator, alone or with a request."""

BY_KIND: dict[str, dict[Kind, str]] = {
    "Comm": {
        Kind.SEND: _SENDS,
        Kind.RECEIVE: "Recv recv",
        Kind.PROBE: "Probe probe Mprobe mprobe",
        Kind.EXCHANGE: "Sendrecv Sendrecv_replace sendrecv",
        Kind.POST_SEND: _POSTED_SENDS,
        Kind.POST_RECEIVE: "Irecv irecv Isendrecv Isendrecv_replace",
        Kind.COLLECTIVE: f"{_COLLECTIVES} {_MAKERS} Agree Shrink",
        Kind.POST_COLLECTIVE: """
            Ibarrier Ibcast Igather Igatherv Iscatter Iscatterv Iallgather Iallgatherv Ialltoall Ialltoallv
            Ialltoallw Ireduce Iallreduce Ireduce_scatter Ireduce_scatter_block""",
        Kind.PLAIN: "Idup Idup_with_info Iagree Ishrink Free Disconnect",
    },
    "Intracomm": {
        Kind.COLLECTIVE: """
            Scan Exscan scan exscan Create_cart Create_graph Create_dist_graph Create_dist_graph_adjacent
            Create_intercomm Spawn Spawn_multiple""",
        Kind.POST_COLLECTIVE: "Iscan Iexscan",
        Kind.PLAIN: "Create_group Create_from_group Accept Connect",
    },
    "Intercomm": {Kind.COLLECTIVE: "Merge"},
    "Topocomm": {
        Kind.COLLECTIVE: """
            Neighbor_allgather Neighbor_allgatherv Neighbor_alltoall Neighbor_alltoallv Neighbor_alltoallw
            neighbor_allgather neighbor_alltoall""",
        Kind.POST_COLLECTIVE: """
            Ineighbor_allgather Ineighbor_allgatherv Ineighbor_alltoall Ineighbor_alltoallv
            Ineighbor_alltoallw""",
    },
    "Cartcomm": {Kind.COLLECTIVE: "Sub"},
    "Message": {Kind.RECEIVE: "Recv recv", Kind.PROBE: "Probe probe", Kind.POST_RECEIVE: "Irecv irecv"},
    "Win": {
        Kind.PLAIN: """
            Create Allocate Allocate_shared Create_dynamic Free Fence Lock Lock_all Unlock Unlock_all Flush
            Flush_all Flush_local Flush_local_all Start Post Complete Wait Sync Put Get Accumulate
            Get_accumulate Fetch_and_op Compare_and_swap Rput Rget Raccumulate Rget_accumulate""",
    },
    "File": {
        Kind.PLAIN: """
            Open Close Read Read_all Read_at Read_at_all Read_ordered Read_shared Write Write_all Write_at
            Write_at_all Write_ordered Write_shared Read_all_begin Read_all_end Read_at_all_begin
            Read_at_all_end Read_ordered_begin Read_ordered_end Write_all_begin Write_all_end
            Write_at_all_begin Write_at_all_end Write_ordered_begin Write_ordered_end Sync Preallocate
            Set_size Set_view""",
    },
}
"""Calls that are one row from entry to exit, by class."""

POLLS = {"Comm": "Iprobe iprobe Improbe improbe", "Message": "Iprobe iprobe"}
"""Calls that look whether a message has come."""

WAITS = [
    "Wait",
    "wait",
    "Waitall",
    "waitall",
    "Waitany",
    "waitany",
    "Waitsome",
    "waitsome",
    "Test",
    "test",
    "Testall",
    "testall",
    "Testany",
    "testany",
    "Testsome",
    "testsome",
]
"""Calls that bring requests to their end."""

PERSISTENT = {
    Kind.POST_SEND: "Send_init Ssend_init Rsend_init Bsend_init Psend_init",
    Kind.POST_RECEIVE: "Recv_init Precv_init",
    Kind.POST_COLLECTIVE: """
        Barrier_init Bcast_init Gather_init Gatherv_init Scatter_init Scatterv_init Allgather_init
        Allgatherv_init Alltoall_init Alltoallv_init Alltoallw_init Reduce_init Allreduce_init
        Reduce_scatter_init Reduce_scatter_block_init""",
}
"""Calls that make a request which is started later, and what it is then."""

STARTS = ("Start", "Startall")


def methods(table: dict[Kind, str]) -> Iterator[tuple[str, Kind]]:
    """The methods of one class, and their kinds."""
    return ((name, kind) for kind, names in table.items() for name in names.split())


def parameters(docstring: str | None) -> list[str]:
    """The parameters of a method behind its first, in order, as the first line of its docstring has them:
    mpi4py's methods have no signature that Python knows."""
    first = (docstring or "").partition("\n")[0].rpartition(") ->")[0].partition("(")[2]
    flat, before = re.sub(r"\[[^\[\]]*\]", "", first), None
    while flat != before:
        before, flat = flat, re.sub(r"\[[^\[\]]*\]", "", flat)
    return [word.partition(":")[0].strip() for word in flat.split(",")][1:]
