"""The server of ranks without torch: its ranks are those of forked_rank.py."""

from __future__ import annotations

import os
import time

from rankwise.launch import fork_server, stand_in

stand_in.RANK = "tests.forked_rank"
fork_server.IMPORTS = (stand_in.RANK, "numpy.random")

if __name__ == "__main__":
    if os.environ.get("SERVER_FAILS"):
        raise SystemExit("as it was asked to")
    time.sleep(float(os.environ.get("SERVER_TAKES_S", "0")))
    fork_server.main()
