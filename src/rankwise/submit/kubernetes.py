"""A job for Kubernetes: a TrainJob of Kubeflow's Trainer with an MPI runtime of its own, or an MPIJob of its
MPI Operator (v2beta1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Parameter

from rankwise.errors import ConfigError
from rankwise.submit.work import Work, comment
from rankwise.system.numbers import WHOLE

HOME = "/home/rankwise"
"""Of the user in the image (Containerfile)."""

SETTINGS = {
    "PRTE_MCA_prte_default_hostfile": "/etc/mpi/hostfile",
    "PRTE_MCA_prte_keep_fqdn_hostnames": "1",
    "PRTE_MCA_plm_ssh_args": "-o ConnectionAttempts=10",
}
"""What both operators tell Open MPI 4 by OMPI_MCA_orte_ variables, which Open MPI 5 ignores without a word:
an mpirun of one's own in the launcher finds the pods by these."""

_SETTINGS = [{"name": name, "value": value} for name, value in SETTINGS.items()]
_OF_LAUNCHER = {"cpu": "1", "memory": "1Gi"}
_SSHD = ["/usr/sbin/sshd", "-De", "-f", f"{HOME}/.sshd_config"]

API = "trainer.kubeflow.org/v1alpha1"

_SCRIPT = """\
words=(
{words}
)
if [ -e '{run}/record.json' ]; then
  words+=(--resume '{run}')
fi
exec rankwise train "${{words[@]}}" --hostfile /etc/mpi/hostfile --out '{run}'
"""


@dataclass(frozen=True)
class Kubernetes:
    """What Kubernetes is asked for."""

    image: Annotated[str, Parameter(help="Image with rankwise and sshd, built from the Containerfile.")] = (
        "rankwise:latest"
    )
    workers: Annotated[int, WHOLE, Parameter(help="Pods, over which ranks are spread evenly.")] = 1
    cpus_per_rank: Annotated[int, WHOLE, Parameter(help="Cores for each rank.")] = 1
    memory_per_rank: Annotated[str, Parameter(help="Memory for each rank, e.g. 1Gi.")] = "1Gi"
    job_name: Annotated[str, Parameter(help="Name of the job.")] = "rankwise"
    namespace: Annotated[str | None, Parameter(help="Namespace; otherwise kubectl's.")] = None
    claim: Annotated[
        str, Parameter(help="Volume claim that all pods can write (ReadWriteMany), for run folders and data.")
    ] = "rankwise"
    mount: Annotated[str, Parameter(help="Where the claim is mounted; --out must be below it.")] = "/shared"
    notice: Annotated[
        int, WHOLE, Parameter(help="Seconds that ranks have to save and leave on eviction.")
    ] = 120
    operator: Annotated[
        Literal["trainer", "v2beta1"],
        Parameter(help="What runs the job: Kubeflow Trainer (a TrainJob), or the MPI Operator (an MPIJob)."),
    ] = "trainer"

    def manifest(self, work: Work, command: Sequence[str] = ()) -> str:
        """The job as YAML, written by this command. Raises ConfigError, one line."""
        self._check()
        out = str(work.out) if work.out else f"{self.mount}/runs/{self.job_name}"
        if not out.startswith(f"{self.mount}/") or "'" in out:
            raise ConfigError(
                f"--out {out} was given, expected a folder below {self.mount}, which all pods see"
            )
        script = _SCRIPT.format(words=work.lines("  "), run=out)
        per_worker = {
            "cpu": str(self.cpus_per_rank * work.ranks_per_host),
            "memory": _times(self.memory_per_rank, work.ranks_per_host),
        }
        make = self._train_job if self.operator == "trainer" else self._mpi_job
        documents = make(work, ["/bin/bash", "-c", script], per_worker)
        text = yaml.dump_all(documents, Dumper=_Readable, sort_keys=False, width=110)
        return f"# {comment(command)}\n{text}"

    def _mpi_job(self, work: Work, command: list[str], per_worker: dict[str, str]) -> list[dict[str, Any]]:
        job = {
            "apiVersion": "kubeflow.org/v2beta1",
            "kind": "MPIJob",
            "metadata": self._metadata(),
            "spec": {
                "slotsPerWorker": work.ranks_per_host,
                "mpiImplementation": "OpenMPI",
                "launcherCreationPolicy": "WaitForWorkersReady",
                "sshAuthMountPath": f"{HOME}/.ssh",
                "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 6},
                "mpiReplicaSpecs": {
                    "Launcher": {
                        "replicas": 1,
                        "restartPolicy": "OnFailure",
                        "template": self._pod({"command": command, "env": _SETTINGS}, _OF_LAUNCHER),
                    },
                    "Worker": {
                        "replicas": work.hosts,
                        "restartPolicy": "Never",
                        "template": self._pod({"command": _SSHD}, per_worker),
                    },
                },
            },
        }
        return [job]

    def _train_job(self, work: Work, command: list[str], per_worker: dict[str, str]) -> list[dict[str, Any]]:
        """The runtime says what pods are, and the job what runs in them. The launcher comes when sshd answers
        on the nodes, which Trainer calls `node` like the container that is to run the command."""
        answers = {"readinessProbe": {"tcpSocket": {"port": 2222}, "initialDelaySeconds": 5}}
        node = self._pod({"command": _SSHD, **answers}, per_worker, name="node")
        launcher = self._pod({}, _OF_LAUNCHER, name="node", restart="OnFailure")
        runtime = {
            "apiVersion": API,
            "kind": "TrainingRuntime",
            "metadata": self._metadata() | {"labels": {"trainer.kubeflow.org/framework": "rankwise"}},
            "spec": {
                "mlPolicy": {
                    "numNodes": work.hosts,
                    "mpi": {
                        "numProcPerNode": work.ranks_per_host,
                        "mpiImplementation": "OpenMPI",
                        "sshAuthMountPath": f"{HOME}/.ssh",
                        "runLauncherAsNode": False,
                    },
                },
                "template": {
                    "spec": {
                        "network": {"publishNotReadyAddresses": True},
                        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["launcher"]},
                        "replicatedJobs": [
                            {"name": "node", "template": {"spec": {"template": node}}},
                            {
                                "name": "launcher",
                                "dependsOn": [{"name": "node", "status": "Ready"}],
                                "template": {
                                    "metadata": {
                                        "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                                    },
                                    "spec": {"backoffLimit": 6, "template": launcher},
                                },
                            },
                        ],
                    }
                },
            },
        }
        job = {
            "apiVersion": API,
            "kind": "TrainJob",
            "metadata": self._metadata(),
            "spec": {
                "runtimeRef": {
                    "apiGroup": "trainer.kubeflow.org",
                    "kind": "TrainingRuntime",
                    "name": self.job_name,
                },
                "trainer": {
                    "image": self.image,
                    "command": command,
                    "env": _SETTINGS,
                    "numNodes": work.hosts,
                    "numProcPerNode": work.ranks_per_host,
                },
            },
        }
        return [runtime, job]

    def _metadata(self) -> dict[str, Any]:
        return {"name": self.job_name} | ({"namespace": self.namespace} if self.namespace else {})

    def _pod(
        self, container: dict[str, Any], needs: dict[str, str], *, name: str = "rankwise", restart: str = ""
    ) -> dict[str, Any]:
        return {
            "spec": {
                "terminationGracePeriodSeconds": self.notice,
                **({"restartPolicy": restart} if restart else {}),
                "containers": [
                    {
                        "name": name,
                        "image": self.image,
                        **container,
                        "securityContext": {"runAsUser": 1000},
                        "resources": {"requests": needs, "limits": needs},
                        "volumeMounts": [
                            {"name": "shared", "mountPath": self.mount},
                            {"name": "memory", "mountPath": "/dev/shm"},
                        ],
                    }
                ],
                "volumes": [
                    {"name": "shared", "persistentVolumeClaim": {"claimName": self.claim}},
                    # Ranks of a pod exchange through shared memory, of which a pod has 64 MB otherwise.
                    {"name": "memory", "emptyDir": {"medium": "Memory"}},
                ],
            }
        }

    def _check(self) -> None:
        for option, value in (
            ("job-name", self.job_name),
            ("namespace", self.namespace),
            ("claim", self.claim),
        ):
            if value is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
                raise ConfigError(
                    f"--{option} {value} was given, expected lower-case letters, digits and -, 63 at most"
                )
        if not re.fullmatch(r"/[\w./-]*[\w-]", self.mount):
            raise ConfigError(f"--mount {self.mount} was given, expected an absolute path, e.g. /shared")
        if not re.fullmatch(r"[\w.:/@-]+", self.image):
            raise ConfigError(
                f"--image {self.image!r} was given, expected a name, e.g. registry.example/rankwise"
            )
        for option, given, least in (("cpus-per-rank", self.cpus_per_rank, 1), ("notice", self.notice, 0)):
            if given < least:
                raise ConfigError(f"--{option} {given} was given, expected {least} or more")


class _Readable(yaml.SafeDumper):
    """Writes text of several lines as such, and what stands twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Readable.add_representer(str, _text)


def _times(amount: str, count: int) -> str:
    """A multiple of a quantity of Kubernetes."""
    found = re.fullmatch(r"(\d+)([KMGT]i?|)", amount)
    if not found:
        raise ConfigError(f"--memory-per-rank {amount} was given, expected an amount like 1Gi or 500M")
    return f"{int(found[1]) * count}{found[2]}"
