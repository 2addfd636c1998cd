#!/usr/bin/env bash
# Guessed: an archive whose events could not be written, as on a full disk, is not closed without an error; at the
#   latest its definitions say how many events are there.
# Happens: Writer.close() returns as if all was well. The C library prints lines on stderr, which Python does not see,
#   the definitions hold all events that were handed over, and a reader gets those that came to the disk and then an
#   error, of a class that is not the package's own otf2.error.Error.
# Versions: otf2 3.2.
# Matters: what writes an archive must read it again before it says that it is there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check otf2==3.2

cat > "$folder/look.py" <<'EOF'
import resource
import sys

import otf2

EVENTS = 20_000
archive = sys.argv[1] + "/archive"

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes of a file, in place of a full disk
writer = otf2.writer.Writer(archive, timer_resolution=10**9)
of = writer.definitions
location = of.location("main", group=of.location_group("rank", system_tree_parent=of.system_tree_node("host")))
region, events = of.region("step"), writer.event_writer_from_location(location)
for time in range(EVENTS // 2):
    events.enter(2 * time, region)
    events.leave(2 * time + 1, region)
try:
    writer.close()
    closed = "without an error"
except Exception as error:
    closed = f"with {type(error).__name__}"
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

read, raised, documented = 0, None, None
with otf2.reader.open(archive + "/traces.otf2") as trace:
    said = sum(its.number_of_events for its in trace.definitions.locations)
    try:
        for _ in trace.events:
            read += 1
    except Exception as error:
        raised, documented = type(error).__name__, isinstance(error, otf2.error.Error)
print(f"closed {closed}; the definitions say {said} events of {EVENTS}")
print(f"the reader gets {read} and then {raised}, which is {'an' if documented else 'no'} otf2.error.Error")
if closed != "without an error" or said != EVENTS or not 0 < read < EVENTS or raised is None or documented:
    sys.exit("changed: an archive that was cut short used to close without an error, and to claim all events")
EOF
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/stderr"
echo "on stderr: $(wc -l < "$folder/stderr") lines of the C library's"
