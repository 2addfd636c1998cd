#!/usr/bin/env bash
# Guessed: the models of kubeflow-trainer-api refuse a field of a TrainJob that they do not know, so a manifest that
#   they take, and write out again, is one that they have checked.
# Happens: what a model does not know is dropped without a word, also one letter too few in a name. Between 2.1.0 and
#   2.2.0 `podTemplateOverrides`, by which a job of 2.1 asks for its volumes, left the models: with 2.3.0 a job that
#   2.1.0 gives back whole comes back without them, and no error is raised.
# Versions: kubeflow-trainer-api 2.1.0 and 2.3.0, pydantic 2.14.4.
# Matters: compare what comes out of `from_dict(...).to_dict()` with what went in; that it came through says nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/look.py" <<'EOF'
import sys

from kubeflow_trainer_api import models

VOLUME = {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}
OVERRIDES = [{"targetJobs": [{"name": "node"}], "spec": {"volumes": [VOLUME]}}]
JOB = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainJob",
    "metadata": {"name": "digits"},
    "spec": {"runtimeRef": {"name": "mpi-distributed"}, "trainer": {"numNodes": 2}},
}


def back(job):
    """What the models make of a job, as a manifest again."""
    return models.TrainerV1alpha1TrainJob.from_dict(job).to_dict()


assert back(JOB) == JOB
kept = "podTemplateOverrides" in back({**JOB, "spec": {**JOB["spec"], "podTemplateOverrides": OVERRIDES}})["spec"]
misspelt = back({**JOB, "spec": {**JOB["spec"], "trainer": {"numNode": 2}}})["spec"]["trainer"]
print(f"{sys.argv[1]}: podTemplateOverrides {'kept' if kept else 'dropped'}; of a trainer with numNode is left {misspelt}")
if kept != (sys.argv[1] == "2.1.0") or misspelt:
    sys.exit("changed: 2.1.0 used to keep the overrides, 2.3.0 to drop them, and both a misspelt name")
EOF
for version in 2.1.0 2.3.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q --disable-pip-version-check kubeflow-trainer-api==$version pydantic==2.14.4
  "$folder/$version/bin/python" "$folder/look.py" $version
done
