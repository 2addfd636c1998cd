"""``python -m rankwise``: the command line."""

from rankwise.cli import main

main()
