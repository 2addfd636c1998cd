"""What Kubernetes checks of an MPIJob: the parts of kubeflow.org/v2beta1 and of a pod that are used, with
nothing beside them, so that a misspelt key is found."""

from __future__ import annotations

from typing import Any


def _object(required: str, optional: str = "", **properties: Any) -> dict[str, Any]:
    known = {name: properties.get(name, {"type": "string"}) for name in f"{required} {optional}".split()}
    return {
        "type": "object",
        "properties": known,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


NUMBER = {"type": "integer", "minimum": 0}
QUANTITY = {"type": "string", "pattern": r"^\d+([KMGT]i?|m)?$"}
NEEDS = _object("cpu memory", cpu=QUANTITY, memory=QUANTITY)
CONTAINER = _object(
    "name image command",
    "env securityContext resources volumeMounts",
    env=_list(_object("name value")),
    command=_list({"type": "string"}),
    securityContext=_object("runAsUser", runAsUser=NUMBER),
    resources=_object("requests limits", requests=NEEDS, limits=NEEDS),
    volumeMounts=_list(_object("name mountPath")),
)
VOLUME = _object(
    "name",
    "persistentVolumeClaim emptyDir",
    persistentVolumeClaim=_object("claimName"),
    emptyDir=_object("medium", medium={"enum": ["Memory"]}),
)
POD = _object(
    "containers",
    "volumes terminationGracePeriodSeconds",
    containers=_list(CONTAINER),
    volumes=_list(VOLUME),
    terminationGracePeriodSeconds=NUMBER,
)
REPLICAS = _object(
    "replicas restartPolicy template",
    replicas=NUMBER,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=_object("spec", spec=POD),
)
SCHEMA = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    metadata=_object("name", "namespace"),
    spec=_object(
        "mpiReplicaSpecs",
        "slotsPerWorker mpiImplementation launcherCreationPolicy sshAuthMountPath runPolicy",
        slotsPerWorker=NUMBER,
        mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
        launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
        runPolicy=_object(
            "",
            "cleanPodPolicy backoffLimit",
            cleanPodPolicy={"enum": ["Running", "All", "None"]},
            backoffLimit=NUMBER,
        ),
        mpiReplicaSpecs=_object("Launcher Worker", Launcher=REPLICAS, Worker=REPLICAS),
    ),
)
