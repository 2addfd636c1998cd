"""A batch script for Slurm."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from rankwise.errors import ConfigError
from rankwise.submit.work import Work, comment
from rankwise.system.numbers import WHOLE

_SCRIPT = """\
#!/bin/bash
# {comment}
{directives}

set -u
{setup}run={run}
words=(
{words}
)

# A job that was put back into the queue goes on from its newest checkpoint.
if [ -e "$run/record.json" ]; then
    words+=(--resume "$run")
fi

# Slurm's notice that time is up, or that others go first: ranks save, and leave.
told=
launcher=
notice() {{
    told=yes
    [ -z "$launcher" ] || kill -USR1 "$launcher"
}}
trap notice USR1 TERM

# rankwise calls mpirun, which has ranks go on when one dies; started by srun they could not.
rankwise train "${{words[@]}}" --out "$run" &
launcher=$!
while true; do
    wait "$launcher"
    code=$?
    kill -0 "$launcher" 2>/dev/null || break # else it was the notice that ended the waiting
done
wait "$launcher" 2>/dev/null
last=$?
[ "$last" -eq 127 ] || code=$last

if [ -n "$told" ] && [ "$code" -eq 130 ]; then
    echo "stopped in time: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


_FORMS = (
    ("mem", r"\d+[KMGT]?B?", "8G"),
    ("time", r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|unlimited|infinite", "02:00:00 or 1-12:00:00"),
)
"""How Slurm writes amounts (sbatch(1)), with an example."""


@dataclass(frozen=True)
class Slurm:
    """What Slurm is asked for."""

    nodes: Annotated[int, WHOLE, Parameter(help="Nodes, over which ranks are spread evenly.")] = 1
    cpus_per_rank: Annotated[int, WHOLE, Parameter(help="Cores for each rank.")] = 1
    job_name: Annotated[str, Parameter(help="Name of the job.")] = "rankwise"
    partition: Annotated[str | None, Parameter(help="Partition; otherwise the cluster's default.")] = None
    account: Annotated[str | None, Parameter(help="Account that is charged.")] = None
    time_limit: Annotated[
        str | None, Parameter(help="Time limit in Slurm's form, e.g. 02:00:00; otherwise the partition's.")
    ] = None
    memory: Annotated[str | None, Parameter(help="Memory of each node in Slurm's form, e.g. 8G.")] = None
    notice: Annotated[
        int, WHOLE, Parameter(help="Seconds before the end at which ranks save, leave, and are queued again.")
    ] = 120
    setup: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="A line of shell before training, e.g. 'module load openmpi/5'."),
    ] = ()

    def script(self, work: Work, command: Sequence[str] = ()) -> str:
        """The batch script, written by this command. Raises ConfigError, one line."""
        for option, least in (("cpus_per_rank", 1), ("notice", 0)):
            given = getattr(self, option)
            if given < least:
                words = f"--{option.replace('_', '-')} {given}"
                raise ConfigError(f"{words} was given, expected {least} or more")
        asked = {
            "job-name": self.job_name,
            "partition": self.partition,
            "account": self.account,
            "nodes": self.nodes,
            "ntasks": work.ranks,
            "ntasks-per-node": work.ranks_per_host,
            "cpus-per-task": self.cpus_per_rank,
            "mem": self.memory,
            "time": self.time_limit,
            "signal": f"B:USR1@{self.notice}",
            "output": "%x-%j.log",
            "open-mode": "append",
        }
        for option, value in asked.items():
            if isinstance(value, str) and not re.fullmatch(r"[\w.,:@%+/-]+", value):
                raise ConfigError(f"{value!r} was given for Slurm's --{option}, expected one word")
        for option, form, example in _FORMS:
            value = asked[option]
            if value is not None and not re.fullmatch(form, str(value), re.IGNORECASE):
                raise ConfigError(f"{value!r} was given for Slurm's --{option}, expected e.g. {example}")
        directives = [f"#SBATCH --{option}={value}" for option, value in asked.items() if value is not None]
        directives += ["#SBATCH --requeue", "#SBATCH --no-kill"]
        run = _quoted(str(work.out)) if work.out else '"runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"'
        return _SCRIPT.format(
            comment=comment(command),
            directives="\n".join(directives),
            setup="".join(f"{line}\n" for line in self.setup),
            run=run,
            words=work.lines("    "),
        )


def _quoted(path: str) -> str:
    """A path for the shell, in which variables of the job are filled in there."""
    return '"' + re.sub(r'(["\\`])', r"\\\1", path) + '"'
