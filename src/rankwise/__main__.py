"""``python -m rankwise``, and ``rankwise``: the command line."""

from __future__ import annotations

import sys

from rankwise.system import head_start


def main() -> None:
    """Run the command line, with a head start for the ranks that it asks for."""
    try:
        head_start.begin(sys.argv[1:])
        with head_start.importing():
            from rankwise import cli
    except KeyboardInterrupt:  # nothing has begun yet that could be left half done
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
