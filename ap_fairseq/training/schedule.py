"""When a training prunes, and how much: budgets that grow from update to update."""

from __future__ import annotations

from dataclasses import dataclass

from ap_fairseq.files import UserError

SHAPES = {"cubic": 3, "linear": 1}


def share_of_round(number: int, rounds: int, shape: str = "cubic") -> float:
    """Return the share of the final budget that round *number* (1 to *rounds*) prunes, in (0, 1].

    1 - (1 - number / rounds)^3 for ``cubic``: s_t of Zhu and Gupta 2017 (arXiv 1710.01878), equation 1, from an
    initial sparsity of 0. ``linear`` has the exponent 1.
    """
    return 1 - (1 - number / rounds) ** SHAPES[shape]


@dataclass(frozen=True)
class PruningSchedule:
    """Updates at which a training prunes.

    Attributes:
        start, end: the first update that is made under masks of a pruning, and the one from which the final budget
            holds.
        every: updates between two prunings; *end* is one of them whatever the remainder.
        shape: growth of the budget, a key of :data:`SHAPES`.

    Raises:
        UserError: for an order of updates that cannot be.
    """

    start: int
    end: int
    every: int
    shape: str = "cubic"

    def __post_init__(self):
        if not 0 < self.start <= self.end:
            raise UserError(
                f"--prune-start {self.start} and --prune-end {self.end}: pruning starts after the first update and "
                "ends no earlier than it starts"
            )
        if self.every < 1:
            raise UserError(f"--prune-every {self.every}: at least 1 update lies between two prunings")

    @property
    def updates(self) -> list[int]:
        """The updates after which new masks are derived."""
        return [*range(self.start, self.end, self.every), self.end]

    def cut_by(self, updates: int, flag: str) -> str | None:
        """Return what a training of *updates* (0: without end) leaves out of the schedule; None: nothing.

        Args:
            flag: that gives it this many.
        """
        if not 0 < updates <= self.end:
            return None
        done = [update for update in self.updates if update < updates]
        reached = f"{self.share(done[-1]):.1%}" if done else "nothing"
        return (
            f"{flag} ends the training before the last pruning, after --prune-end {self.end} updates: {reached} of the "
            "budget is pruned then"
        )

    def share(self, update: int) -> float:
        """Return the share of the final budget that is pruned after *update*, one of :attr:`updates`, in (0, 1]."""
        return share_of_round(self.updates.index(update) + 1, len(self.updates), self.shape)
