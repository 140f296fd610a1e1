"""Parts shared out over processes: each makes its own, and the first one waits until all are there.

Invariants: processes meet in the parts' folder alone, so any launcher will do; a part has one maker; the union is, byte
for byte, what one process makes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pertcast.errors import CheckpointError
from pertcast.generate.parts import PartMaker
from pertcast.generate.plan import Part
from pertcast.progress import Advance

__all__ = ["own_share", "wait_for_others"]

_POLL_SECONDS = 0.5


def own_share(parts: Sequence[Part], *, rank: int, size: int) -> tuple[Part, ...]:
    """Return the parts that a process makes, in the plan's order; all processes have about as many cells.

    Examples
    --------
    >>> parts = [Part(name, "vcc", "H1", name, num) for name, num in (("A", 5), ("B", 9), ("C", 4), ("D", 1))]
    >>> [[part.target for part in own_share(parts, rank=rank, size=2)] for rank in range(2)]
    [['B', 'D'], ['A', 'C']]
    """
    loads, owner = [0] * size, {}
    for part in sorted(parts, key=lambda part: -part.num_cells):
        least = loads.index(min(loads))
        loads[least] += part.num_cells
        owner[part.file] = least
    return tuple(part for part in parts if owner[part.file] == rank)


def wait_for_others(out: Path, parts: Sequence[Part], maker: PartMaker, advance: Advance) -> None:
    """Return when the parts of all other processes are there and right; a launcher ends all if one of them fails."""
    pending = list(parts)
    while pending:
        for part in tuple(pending):
            # A manifest may be taken away between two looks at it.
            with suppress(CheckpointError):
                if maker.is_right(out, part):
                    pending.remove(part)
                    advance(part.num_cells, detail=part.target)
        time.sleep(_POLL_SECONDS if pending else 0)
