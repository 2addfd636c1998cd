"""How long the launcher waits before it starts ranks again."""

from __future__ import annotations

FIRST_PAUSE_S = 1.0
"""How long to wait before a restart."""

LONGEST_PAUSE_S = 60.0


class RestartBackoff:
    """Before each restart: twice as long as before the last one, up to a limit, unless an epoch came to its
    end since. What fails at once may need time; what trained on for a while does not. `count` is how many
    there were."""

    def __init__(self) -> None:
        self.count = 0
        self._epochs = -1
        self._pause_s = 0.0

    def after(self, epochs: int) -> float:
        """Seconds to wait when this many epochs are over."""
        self.count += 1
        again = epochs <= self._epochs
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if again else FIRST_PAUSE_S
        self._epochs = epochs
        return self._pause_s
