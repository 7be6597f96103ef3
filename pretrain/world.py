"""How the ranks of a run are arranged: G task groups of D data ranks; arithmetic only, whatever the size.

The ranks of a group are neighbours (rank = group * D + data rank), so that the all-reduce of every inner step stays
within as few nodes as possible; the outer step, which is rare, joins the ranks that have the same data rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """`size` ranks in `groups` task groups of equal size."""

    size: int
    groups: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"world: expected at least 1 rank, found {self.size}")
        if self.groups < 1 or self.size % self.groups:
            fitting = ", ".join(map(str, divisors(self.size)))
            raise ValueError(
                f"world.groups: expected a divisor of the {self.size} rank(s) ({fitting}), found {self.groups}"
            )

    @property
    def data_ranks(self) -> int:
        """Ranks of one group, D."""
        return self.size // self.groups

    def group(self, rank: int) -> int:
        """Return the task group that a rank belongs to."""
        return rank // self.data_ranks

    def data_rank(self, rank: int) -> int:
        """Return a rank's number within its group."""
        return rank % self.data_ranks

    def group_ranks(self, group: int) -> range:
        """Return the ranks of one group: they share the gradients of an inner step."""
        return range(group * self.data_ranks, (group + 1) * self.data_ranks)

    def exchange_ranks(self, data_rank: int) -> range:
        """Return the ranks with one data rank, one of each group: they share the outer step."""
        return range(data_rank, self.size, self.data_ranks)


def divisors(number: int) -> list[int]:
    """Return the divisors of a whole number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def choose_groups(size: int, tasks: int, wanted: int | None) -> int:
    """Return the number of task groups for `tasks` tasks in an outer step.

    `wanted` None: as many as divide both numbers, so that every group has equally much to do. Raises ValueError for a
    `wanted` that does not divide both.
    """
    fitting = [groups for groups in divisors(size) if tasks % groups == 0]
    if wanted is None:
        return fitting[-1]
    if wanted not in fitting:
        raise ValueError(
            f"world.groups: expected a divisor of both {size} rank(s) and reptile.tasks_per_outer={tasks} "
            f"({_words(fitting)}), found {wanted}"
        )
    return wanted


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
