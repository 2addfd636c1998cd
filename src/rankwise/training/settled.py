"""What a plan leaves to the ranks, and they settle before the first step."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.plan import RunPlan

SETTLED = ("balance", "compile")
"""Options of which a record holds what the ranks have settled, and with which a run goes on."""


@dataclass(frozen=True)
class Settled:
    """What only ranks can find out: this rank's arithmetic threads; and, alike on all ranks, whether the loop
    calls a compiled model, and samples in a step of each worker."""

    threads: int
    compiled: bool
    batch_sizes: tuple[int, ...]

    def in_force(self, plan: RunPlan) -> RunPlan:
        """The plan with what was settled, as it is trained by and as a record keeps it."""
        sizes = ",".join(map(str, self.batch_sizes))
        return plan.with_options(
            compile="on" if self.compiled else "off",
            balance=sizes if plan.balance == "measured" else plan.balance,
        )
