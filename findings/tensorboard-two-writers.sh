#!/usr/bin/env bash
# Guessed: several ranks can each write an event file into one folder, and TensorBoard's reader shows all
#   points of all of them as they come in.
# Happens: the reader takes files in the order of their names. Once it has gone on to the second it never
#   looks into the first again: what that rank writes from then on does not appear, but for one warning in
#   the log. A reader that is started afterwards shows every point.
# Versions: tensorboard 2.21.0, its reader in Python (EventAccumulator, as other tools and
#   --load_fast=false use it; --reload_multifile=true is the way out).
# Matters: a rank seems to have stopped learning, or to hang, while a run is on, and all is well when
#   somebody looks again later. Give each rank a folder of its own, or let one rank write.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tensorboard==2.21.0 numpy==2.4.6

cat > "$folder/look.py" <<'EOF'
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def points(reader):
    reader.Reload()
    return {tag: [point.step for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


folder = sys.argv[1]
ranks = [EventFileWriter(folder), EventFileWriter(folder)]  # this process plays both
live = EventAccumulator(folder)
for step in range(4):
    for rank, writer in enumerate(ranks):
        value = Summary.Value(tag=f"loss/rank{rank}", simple_value=1.0)
        writer.add_event(Event(wall_time=1.0 + step, step=step, summary=Summary(value=[value])))
        writer.flush()
    seen = points(live)
    print(f"after step {step} the reader that is on shows {seen}")
fresh = points(EventAccumulator(folder))
print(f"a new reader shows {fresh}")
everything = [0, 1, 2, 3]
if seen != {"loss/rank0": [0], "loss/rank1": everything} or set(map(tuple, fresh.values())) != {(0, 1, 2, 3)}:
    sys.exit("changed: the first file used to be forgotten")
EOF
"$folder/venv/bin/python" "$folder/look.py" "$folder/events"
