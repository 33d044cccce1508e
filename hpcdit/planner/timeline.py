"""What one attention layer is predicted to take, and what each rank does in it when."""

from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """What a rank did: lane is compute, intra or inter; seconds from the start of the layer."""

    rank: int
    lane: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One attention layer. seconds: until the last rank has its o; compute_s: attention calls of the busiest rank.

    inter_bytes: what crosses nodes, all ranks together; intra_bytes: what changes ranks inside nodes.
    """

    seconds: float
    compute_s: float
    inter_bytes: int
    intra_bytes: int
    spans: list[Span]

    @property
    def exposed_s(self) -> float:
        """Seconds that the busiest rank does not attend."""
        return self.seconds - self.compute_s
