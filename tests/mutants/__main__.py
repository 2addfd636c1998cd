"""`python -m tests.mutants`."""

from __future__ import annotations

if __name__ == "__main__":  # each forked process reads this file again, and needs nothing of it
    from tests.mutants.commands import app

    app()
