"""Runs on several hosts: what may be asked for, what is checked before, and hosts that are lost."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.comm.mpi_environment import Mpiexec, find_mpiexec, mpi_environment
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, LaunchError, SupersededError, TrainingError
from rankwise.launch import command_line as commands
from rankwise.launch import hosts as launching
from rankwise.launch.command_line import command_line
from rankwise.launch.hosts import fit
from rankwise.plan import resolve
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.submit.kubernetes import SETTINGS
from rankwise.system.hosts import Host, parse_hosts, read_hostfile

from .effort import only_in_full
from .hosts import Hosts, why_not
from .processes import wait_for
from .test_cli import call
from .test_mpi import closes

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}(\.[a-z0-9]{1,5})?", fullmatch=True)
HOSTS = st.dictionaries(NAMES, st.integers(1, 128), min_size=1, max_size=5)


@given(HOSTS)
def test_hosts_are_read_as_they_were_written(asked: dict[str, int]) -> None:
    """On the command line and in a file, the same hosts in the same order."""
    expected = tuple(Host(name, slots) for name, slots in asked.items())
    assert parse_hosts(",".join(f"{name}:{slots}" for name, slots in asked.items())) == expected
    assert parse_hosts(",".join(map(str, expected))) == expected


def test_a_hostfile_is_that_of_mpiexec(tmp_path: Path) -> None:
    """Names, slots, comments and what else mpiexec allows on a line; a host without slots has one."""
    path = tmp_path / "hosts"
    path.write_text("# all of them\nnode1 slots=4 max_slots=8\n\n10.0.0.2\tslots=2 # the old one\nnode3\n")
    assert read_hostfile(path) == (Host("node1", 4), Host("10.0.0.2", 2), Host("node3", 1))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("me@a:2,you@a:3", "host a was given as me@a and as you@a: give it one user"),
        ("me@:2", "'me@' is no name of a host"),
        ("@a:2", "'@a' is no name of a host"),
        ("-x@a:2", "'-x' is no name of a user"),
        ("a:0", "host a has '0' slots, expected a number of 1 or more"),
        ("a:two", "'two' slots"),
        ("a:2,,b:2", "'' is no name of a host"),
        ("", "'' is no name of a host"),  # of a variable that nobody has set
        ("-oProxyCommand=x:1", "is no name of a host"),
    ],
)
def test_what_are_no_hosts_is_told_in_one_line(text: str, told: str) -> None:
    """A host as two users, no slots, no name, and names that ssh would take for an option."""
    with pytest.raises(ConfigError) as error:
        resolve(TrainConfig(hosts=text))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "hosts"),
    [
        ("n1\nn1\nn2\nn1\n", "n1:3,n2:1"),  # PBS, LSF: a line for each slot
        ("n1:4\nn2:2  # fast\nn3\n", "n1:4,n2:2,n3:1"),  # MPICH
        ("n1 user=me slots = 2\nyou@n2:3 binding=user:0\n", "me@n1:2,you@n2:3"),
        ("n1 4 all.q@n1 UNDEFINED\nn2 2 all.q@n2 <NULL>\n", "n1:4,n2:2"),  # Grid Engine
        ("n1 cpu=2 max-slots=3\n", "n1:2"),
    ],
)
def test_hostfiles_of_all_kinds(tmp_path: Path, written: str, hosts: str) -> None:
    """What PBS, LSF, Grid Engine, MPICH and Open MPI write says the same hosts and slots as to mpiexec."""
    path = tmp_path / "hosts"
    path.write_text(written)
    assert ",".join(map(str, read_hostfile(path))) == hosts


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("n1 slot2=4\n", "unknown word 'slot2=4': did you mean 'slots=N'?"),
        ("n1 slots=2\nn1\n", "line 2: host n1 stands in several lines, some with a number of slots"),
        ("n1 user=-o\n", "'-o' is no name of a user"),
    ],
)
def test_a_wrong_line_of_a_hostfile_is_named(tmp_path: Path, written: str, told: str) -> None:
    """A word wrong by a letter, and a host with slots in one line and a line for each slot, which mpiexec
    refuses, too."""
    path = tmp_path / "hosts"
    path.write_text(written)
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@given(st.lists(st.tuples(NAMES, st.integers(1, 9)), min_size=1, max_size=8))
def test_slots_add_up(asked: list[tuple[str, int]]) -> None:
    """A host that was given several times has the sum of its slots, as for mpiexec, in the order of its first
    place."""
    found = parse_hosts(",".join(f"{name}:{slots}" for name, slots in asked))
    assert [host.name for host in found] == list(dict.fromkeys(name for name, _ in asked))
    assert {host.name: host.slots for host in found} == {
        name: sum(slots for other, slots in asked if other == name) for name, _ in asked
    }
    assert parse_hosts("a,a,b") == (Host("a", 2), Host("b", 1))


def test_hosts_of_one_first_name_stay_two() -> None:
    """Open MPI, which looks at names up to the first dot, is told to look at all of them where two hosts
    would be one; addresses are no names."""
    mpiexec = Mpiexec(Path("/bin/mpiexec"), "mpiexec (Open MPI) 5.0.11")
    for text, told in (("n.rack1:1,n.rack2:1", True), ("n1.a:1,n2.a:1", False), ("10.0.0.1,10.0.0.2", False)):
        words = command_line(mpiexec, 2, ["program"], hosts=parse_hosts(text))
        assert ("prte_keep_fqdn_hostnames" in words) == told, text


def test_a_user_of_another_host_goes_to_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    """`user@host` reaches mpiexec and ssh as it was given; of this host the user is left out, since no ssh
    goes there."""
    monkeypatch.setattr(commands, "is_here", lambda name: name == "here")
    hosts = parse_hosts("me@here:2,me@there:1")
    words = command_line(Mpiexec(Path("m"), "mpiexec (Open MPI) 5.0.11"), 3, ["program"], hosts=hosts)
    assert words[words.index("--host") + 1] == "here:2,me@there:1"
    words = command_line(Mpiexec(Path("m"), "HYDRA build details: Version: 5.0.2"), 3, ["p"], hosts=hosts)
    assert words == [
        *("m", "-n", "3", "-prepend-rank", "-hosts", "me@here:2,me@there:1", "-launcher", "ssh", "p")
    ]


def test_two_machines_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Machines that call themselves the same would be one for MPI: one line with both. One machine under two
    names is none of that."""
    for machine, refused in (("other", True), ("", False)):
        answers(monkeypatch, machine=machine)
        if not refused:
            assert launching.check([Host("a", 1), Host("b", 1)], tmp_path) == {"a": "me", "b": "me"}
            continue
        with pytest.raises(LaunchError) as error:
            launching.check([Host("a", 1), Host("b", 1)], tmp_path)
        assert str(error.value).startswith(
            "hosts a and b both call themselves me, so that MPI would take them"
        )


@pytest.mark.parametrize("content", [None, "", "# nobody\n", "node1 slots=many\n"])
def test_what_is_no_hostfile_is_told_in_one_line(tmp_path: Path, content: str | None) -> None:
    """One that is missing or empty, or has a line that says nothing."""
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        resolve(TrainConfig(hostfile=path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_ranks_fill_the_slots() -> None:
    """As many ranks as there are slots, less the spares, unless their number was given."""
    assert resolve(TrainConfig(hosts="a:4,b:3")).ranks == 7
    assert resolve(TrainConfig(hosts="a:4,b:3", spares=2)).ranks == 5
    assert resolve(TrainConfig(hosts="a:4,b:3", ranks=2)).ranks == 2
    with pytest.raises(ConfigError, match="leaves none to train"):
        resolve(TrainConfig(hosts="a:1", spares=1))


def test_what_is_left_takes_fewer_ranks() -> None:
    """On fewer hosts a run goes on with the ranks that fit, then with spares; with too few it does not."""
    config = resolve(TrainConfig(hosts="a:2,b:2,c:2", spares=1, min_ranks=3))
    assert config.ranks == 5
    left = fit(config, [Host("a", 2), Host("c", 2)])
    assert (left.ranks, left.spares, left.hosts) == (4, 0, "a:2,c:2")
    with pytest.raises(TrainingError, match="room for 2 ranks"):
        fit(config, [Host("c", 2)])
    with pytest.raises(TrainingError, match="room for 0 ranks"):
        fit(config, [])


def test_flags_for_several_hosts() -> None:
    """What Open MPI needs to survive on several hosts, and to see a link that was cut."""
    mpiexec = Mpiexec(Path("/bin/mpiexec"), "mpiexec (Open MPI) 5.0.11")
    words = command_line(mpiexec, 5, ["program"], survives=True, hosts=[Host("a", 2), Host("b", 2)])
    line = " ".join(words)
    assert line.startswith(
        "/bin/mpiexec -n 5 --output tag --with-ft ulfm --host a:2,b:2 --map-by slot:OVERSUBSCRIBE "
    )
    assert "--mca coll ^han,cuda,hcoll,portals4" in line
    assert "--mca btl self,sm,tcp" in line
    assert "oob_tcp_keepalive_time" in line
    assert words[-1] == "program"


def answers(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Every host answers as this one does, but for the changes."""
    mine = launching.Answer("me", tuple(launching.versions_here()), sees_folder=True)
    other = launching.Answer(**{**vars(mine), **changes})  # type: ignore[arg-type]
    monkeypatch.setattr(launching, "_ask", lambda host, folder: mine if host.name == "a" else other)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trouble": "no answer within 10 s"}, "host b cannot be used: no answer within 10 s"),
        ({"sees_folder": False}, "host b does not see the run folder"),
        (
            {"versions": (("python", "2.7"), ("rankwise", "0"), ("mpi4py", "0"), ("torch", "0"))},
            "host b has python 2.7",
        ),
    ],
)
def test_hosts_that_do_not_fit_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    """A host that does not answer, has other versions, or does not see the run folder ends it before a rank
    is started."""
    answers(monkeypatch, **changes)
    with pytest.raises(LaunchError) as error:
        launching.check([Host("a", 1), Host("b", 1)], tmp_path)
    assert told in str(error.value)


def test_a_host_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named in one line when the time for an answer is over, with code 2, and nothing is left."""
    agent = tmp_path / "agent"
    agent.write_text("#!/bin/sh\nexec sleep 60\n")
    agent.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", str(agent))
    assert launching.ANSWER_S == 10
    monkeypatch.setattr(launching, "ANSWER_S", 0.6)
    started_s = time.monotonic()
    words = ["--dataset", "digits", "--hosts", "nowhere.invalid:1,localhost:1", "--out", "run"]
    assert call("train", *words) == 2
    out, err = capsys.readouterr()
    assert "host nowhere.invalid cannot be used: no answer within 0.6 s" in err
    assert out == ""
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started_s < 50


def test_only_the_last_start_writes(tmp_path: Path) -> None:
    """Ranks that a new start has left behind may not write the record, metrics or checkpoints any more, so
    that of two halves of a run one goes on."""
    folder, behind = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    folder.create()
    folder.begin()
    behind.take_part()
    behind.keep_metrics([])
    folder.begin()
    folder.take_part()
    folder.keep_metrics([])
    folder.require_part()
    for write in (lambda: behind.keep_metrics([]), behind.require_part):
        with pytest.raises(SupersededError):
            write()


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Hosts on this machine, with these rates."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Hosts(*request.param) as made:
        yield made


def train(hosts: Hosts, slots: int, tmp_path: Path, *words: str) -> tuple[Record, str]:
    """Train on all hosts; returns the record, and what the user was told. No process is left behind."""
    where = ",".join(f"{address}:{slots}" for address in hosts.addresses)
    small = ["--dataset", "digits", "--model", "mlp", "--lr", "0.01"]
    program = [sys.executable, "-m", "rankwise", "train", *small, "--hosts", where, "--out", "run", *words]
    process = hosts.start(*program, cwd=tmp_path)
    try:
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, err
    folder = RunFolder(tmp_path / "run")
    record = folder.read()
    assert record.outcome == "completed", record.message
    assert record.samples.trained == record.samples.expected > 0
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert closes(record)
    assert [row["epoch"] for row in folder.read_metrics()] == list(range(1, record.config["epochs"] + 1))
    # A host's own server ends a moment after its last rank.
    wait_for(lambda: not any(hosts.processes(host) for host in range(len(hosts.names))), 10)
    return record, err


@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.parametrize("hosts", [(None, None, "100mbit")], indirect=True, ids=["three"])
def test_three_hosts_lose_ranks(hosts: Hosts, tmp_path: Path) -> None:
    """On three hosts, one of them behind a link of 100 Mbit/s, in two levels: a leader that is killed and a
    rank that is stopped cost nothing, and the others go on in place."""
    faults = ["--fault", "kill:rank=2,epoch=2,step=2", "--fault", "hang:rank=5,epoch=3,step=2"]
    record, err = train(
        hosts, 2, tmp_path, "--sync-across-hosts", "4", "--epochs", "4", "--hang-timeout", "3", *faults
    )
    assert [host.name for host in record.environment.hosts] == hosts.names
    assert [host.ranks for host in record.environment.hosts] == [2, 2, 2]
    found = [(fault.rank, fault.kind, fault.action) for fault in record.faults]
    assert found == [(2, "kill", "continue"), (5, "hang", "continue")]
    assert "no sign of life" in err


@only_in_full
@pytest.mark.mpi
@pytest.mark.parametrize("hosts", [(None, None)], indirect=True, ids=["two"])
def test_a_host_is_dropped(hosts: Hosts, tmp_path: Path) -> None:
    """A host that loses all its processes, the one that started them included, ends the ranks; as it answers,
    all are started again on both, from the newest checkpoint."""
    words = ["--strategy", "local-sgd", "--epochs", "4", "--fault", "drop-host:rank=1,epoch=3,step=2"]
    record, err = train(hosts, 1, tmp_path, *words)
    assert (1, "drop-host", "restart") in [(fault.rank, fault.kind, fault.action) for fault in record.faults]
    assert {fault.action for fault in record.faults} == {"restart"}
    assert len(record.ranks) == 2
    assert f"host {hosts.names[1]} was lost; starting again" in err


CALLS_BACK = "Hydra's proxies come back to a host by its own name for itself, which no other knows here"


def hostnames(made: Hosts, words: Sequence[str], cwd: Path, **environment: str) -> list[str]:
    """On which hosts the ranks of a command were that print it."""
    process = made.start(*words, environment=mpi_environment() | environment, cwd=cwd)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return sorted(line.split()[-1].strip("\0") for line in out.splitlines())


@pytest.mark.mpi
def test_hosts_of_one_first_name_get_a_rank_each(tmp_path: Path) -> None:
    """Two hosts that differ behind the first dot only are two for Open MPI, as another user, too."""
    if reason := why_not():
        pytest.skip(reason)
    if not find_mpiexec().is_open_mpi:
        pytest.skip(CALLS_BACK)
    names = ["n1.rack1", "n1.rack2"]
    with Hosts(None, None, called=names) as made:
        for asked in (",".join(names), f"{names[0]}:1,root@{names[1]}:1"):
            words = command_line(find_mpiexec(), 2, ["hostname"], hosts=parse_hosts(asked))
            assert hostnames(made, words, tmp_path) == names


@pytest.mark.mpi
def test_pods_get_a_rank_each(tmp_path: Path) -> None:
    """Pods, which call themselves by the first part of their names: by rankwise with the hostfile that an
    operator writes, and by an mpirun of one's own with the settings that the launcher gets."""
    if reason := why_not():
        pytest.skip(reason)
    if not find_mpiexec().is_open_mpi:
        pytest.skip(CALLS_BACK)
    names = ["job-0", "job-1"]
    with Hosts(None, None, called=names, domain=".job.ns.svc") as made:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{name} slots=1\n" for name in made.full_names))
        settings = SETTINGS | {"PRTE_MCA_prte_default_hostfile": str(hostfile)}
        mpiexec = find_mpiexec()
        words = command_line(mpiexec, 2, ["hostname"], hosts=read_hostfile(hostfile))
        assert hostnames(made, words, tmp_path, **settings) == names
        assert hostnames(made, [str(mpiexec.path), "-n", "2", "hostname"], tmp_path, **settings) == names


@pytest.mark.full
@pytest.mark.mpi
def test_a_job_of_pbs_has_all_its_hosts(tmp_path: Path) -> None:
    """A training in a job of PBS, started as in its script, puts ranks on all of the job's hosts: as many on
    each as it has lines in the node file."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(None, None) as made:
        nodes = tmp_path / "nodes"
        nodes.write_text("".join(f"{made.names[host]}\n" for host in (0, 0, 1)))
        job = {"PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBID": "7.server", "PBS_NODEFILE": str(nodes)}
        words = ["--dataset", "digits", "--model", "mlp", "--lr", "0.01", "--epochs", "2", "--out", "run"]
        program = [sys.executable, "-m", "rankwise", "train", "--ranks", "3", *words]
        process = made.start(*program, environment=mpi_environment() | job, cwd=tmp_path)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        record = RunFolder(tmp_path / "run").read()
        assert [(its.name, its.ranks) for its in record.environment.hosts] == [
            (made.names[0], 2),
            (made.names[1], 1),
        ]


@pytest.mark.mpi
@pytest.mark.waits
@only_in_full
@pytest.mark.parametrize("hosts", [(None, None, None)], indirect=True, ids=["three"])
def test_a_link_is_cut(hosts: Hosts, tmp_path: Path) -> None:
    """Both sides live and see the folder: the one without the launcher ends, and the run goes on once, on the
    hosts that are left."""
    words = ["--strategy", "allreduce", "--epochs", "4", "--fault", "cut:rank=2,epoch=3,step=2"]
    record, err = train(hosts, 1, tmp_path, *words)
    assert [(fault.rank, fault.kind, fault.action) for fault in record.faults] == [(2, "cut", "restart")]
    assert record.config["hosts"] == ",".join(f"{address}:1" for address in hosts.addresses[:2])
    assert len(record.ranks) == 2
    assert f"host {hosts.addresses[2]} does not answer" in err
    manifests = [json.loads(path.read_bytes()) for path in (tmp_path / "run").glob("checkpoints/*/*.json")]
    assert {manifest["epoch"] for manifest in manifests if "epoch" in manifest} <= {3, 4}


@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("hosts", [(None, None)], indirect=True, ids=["two"])
def test_a_host_comes_and_goes(hosts: Hosts, tmp_path: Path) -> None:
    """An elastic run follows its hostfile: onto a host that is added to it, and off one that is taken out,
    in one record in which each sample counts once."""
    hostfile, folder = tmp_path / "hosts", RunFolder(tmp_path / "run")
    one, other = (f"{address} slots=2\n" for address in hosts.addresses)
    hostfile.write_text(one)
    small = ["--dataset", "digits", "--model", "mlp", "--lr", "0.01", "--strategy", "local-sgd"]
    words = [*small, "--epochs", "100000", "--elastic", "2:4", "--hostfile", "hosts", "--out", "run"]
    process = hosts.start(sys.executable, "-m", "rankwise", "train", *words, cwd=tmp_path)
    try:
        wait_for(lambda: bool(folder.read_metrics()))
        for generation, (lines, ranks) in enumerate(((one + other, 4), (other, 2)), start=1):
            hostfile.write_text(lines)

            def is_there(generation: int = generation) -> bool:
                return folder.read().generation == generation and process.poll() is None

            wait_for(is_there)
            record = folder.read()
            assert len(record.ranks) == ranks
            epochs = len(record.epochs)
            wait_for(lambda epochs=epochs: len(folder.read().epochs) > epochs + 1)  # type: ignore[misc]
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    record = folder.read()
    assert [host.name for host in record.environment.hosts] == hosts.names[1:]
    assert [len(each.ranks) for each in record.earlier] == [2, 4]
    assert record.samples.trained == record.samples.expected > 0
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert closes(record)
    assert [hosts.processes(host) for host in range(len(hosts.names))] == [[]] * len(hosts.names)
