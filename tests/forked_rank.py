"""Stands for a rank in tests of forks: runs the code that it is given."""

from __future__ import annotations

import sys


def main() -> None:
    exec(compile(sys.argv[1], "given.py", "exec"), {"__name__": "given"})


if __name__ == "__main__":
    main()
