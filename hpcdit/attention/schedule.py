"""A parallel attention method is a schedule, and a schedule is data.

A schedule lists, for every rank, the steps by which it comes to its share of one attention layer. The same lists are
checked (`check`), counted (`traffic`), priced, drawn and run; a step names *pieces*, never buffers.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..mesh import Mesh, cut


@dataclass(frozen=True, order=True)
class Piece:
    """A part of a tensor: the tokens of rank `tokens`, the heads of slot `heads` (heads are cut into ulysses slots)."""

    tensor: str  # q, k, v, o; x for a tensor that is only gathered
    tokens: int
    heads: int

    def __str__(self) -> str:
        return f"{self.tensor} (tokens of rank {self.tokens}, heads {self.heads})"


@dataclass(frozen=True)
class Pull:
    """This rank needs `piece` now; `source` has it by then: its owner, or a ring neighbour that pulled it before."""

    piece: Piece
    source: int


@dataclass(frozen=True)
class Attend:
    """Attends the q pieces to the kv pieces, all of this rank's head slot, and merges into the partial results."""

    q: tuple[int, ...]
    kv: tuple[int, ...]


@dataclass(frozen=True)
class Push:
    """Sends a finished piece of o to the rank whose tokens it holds."""

    piece: Piece
    home: int


Step = Pull | Attend | Push
Method = Callable[[Mesh, int], list[Step]]


class ScheduleError(Exception):
    """A schedule that does not compute attention; says which rank, which step and why."""


@dataclass(frozen=True)
class Shape:
    """What one layer attends: `batch` x `length` tokens x `heads` x `dim`."""

    batch: int
    length: int
    heads: int
    dim: int


@dataclass(frozen=True)
class Schedule:
    """All ranks' steps of one layer on `mesh`; the tokens are cut over ranks, the heads over ulysses slots."""

    name: str
    mesh: Mesh
    ranks: tuple[tuple[Step, ...], ...]

    @classmethod
    def of(cls, name: str, method: Method, mesh: Mesh) -> "Schedule":
        return cls(name, mesh, tuple(tuple(method(mesh, rank)) for rank in range(mesh.size)))

    @property
    def slots(self) -> int:
        """Into how many slots the heads are cut."""
        return self.mesh.extent("ulysses")

    def slot(self, rank: int) -> int:
        """The head slot that `rank` computes."""
        return self.mesh.coords(rank)["ulysses"] if self.slots > 1 else 0

    @cached_property
    def sources(self) -> tuple[dict[Piece, int], ...]:
        """For every rank: the source of each piece it pulls."""
        return tuple({step.piece: step.source for step in steps if isinstance(step, Pull)} for steps in self.ranks)

    def holder(self, piece: Piece, reader: int, nodes: Sequence[int]) -> int:
        """The rank in whose memory `reader` finds `piece`: read in place inside a node, else brought over."""
        if piece.tokens == reader:
            return reader
        holder = self.holder(piece, self.sources[reader][piece], nodes)
        return holder if nodes[holder] == nodes[reader] else reader

    def crossings(self, nodes: Sequence[int]) -> list[tuple[int, int, Piece]]:
        """Every (from, to, piece) that crosses nodes, pulls and pushes alike."""
        found = []
        for rank, steps in enumerate(self.ranks):
            for step in steps:
                if isinstance(step, Push) and nodes[step.home] != nodes[rank]:
                    found.append((rank, step.home, step.piece))
                if isinstance(step, Pull) and self.holder(step.piece, rank, nodes) == rank:
                    found.append((self.holder(step.piece, step.source, nodes), rank, step.piece))
        return found


def traffic(schedule: Schedule, shape: Shape, nodes: Sequence[int]) -> dict[str, int]:
    """Elements of one layer that change ranks, all ranks together, by link class: `intra` and `inter` node.

    nodes: the node of each rank.
    """
    tokens, slots = cut(shape.length, schedule.mesh.size), cut(shape.heads, schedule.slots)

    def size(piece: Piece) -> int:
        return shape.batch * len(tokens[piece.tokens]) * len(slots[piece.heads]) * shape.dim

    moved = sum(size(s.piece) for steps in schedule.ranks for s in steps if isinstance(s, Pull | Push))
    inter = sum(size(piece) for _, _, piece in schedule.crossings(nodes))
    return {"intra": moved - inter, "inter": inter}


def check(schedule: Schedule, nodes: Sequence[int] | None = None) -> None:
    """Proves that the schedule computes attention, or raises ScheduleError.

    1. every (query chunk, key chunk) pair of every head slot is attended exactly once, by a rank of that slot;
    2. every Attend and Push uses only what an earlier step of its rank made or pulled, a Push only what is finished;
    3. every Pull names a source that has the piece, is used, and happens once; every o comes home exactly once;
    4. the ranks do not wait for each other in a cycle;
    5. with two buffer sets and no barrier, no memory is written before its last reader has finished with it.

    The bytes by link class are compared with the methods' formulas where those are: `methods.inter_elements`.
    nodes: the node of each rank, for point 5; every rank a node of its own where left out.
    """
    nodes = tuple(range(schedule.mesh.size)) if nodes is None else tuple(nodes)
    for rank, steps in enumerate(schedule.ranks):
        _check_rank(schedule, rank, steps)
    _check_complete(schedule)
    _check_waits(schedule)
    _check_reuse(schedule, nodes)


def _check_rank(schedule: Schedule, rank: int, steps: Sequence[Step]) -> None:
    size, slot = schedule.mesh.size, schedule.slot(rank)
    have = {Piece(t, rank, slot) for t in "qkv"}
    used: set[Piece] = {piece for source in schedule.sources for piece, who in source.items() if who == rank}
    met: dict[int, set[int]] = defaultdict(set)
    for n, step in enumerate(steps):

        def wrong(why: str, n: int = n, step: Step = step) -> ScheduleError:
            return ScheduleError(f"rank {rank}, step {n} {step}: {why}")

        match step:
            case Pull(piece, source):
                if piece in have:
                    raise wrong("it has this piece already")
                if not (0 <= source < size and source != rank and 0 <= piece.tokens < size):
                    raise wrong("no such source or tokens")
                if source != piece.tokens and piece not in schedule.sources[source]:
                    raise wrong(f"rank {source} never has this piece")
                have.add(piece)
            case Attend(qs, kvs):
                needs = {Piece("q", q, slot) for q in qs} | {Piece(t, kv, slot) for kv in kvs for t in "kv"}
                if needs - have:
                    raise wrong(f"{min(needs - have)} is not there yet")
                used |= needs
                for q in qs:
                    if met[q] & set(kvs) or len(set(kvs)) < len(kvs):
                        raise wrong(f"q of rank {q} meets keys twice")
                    met[q] |= set(kvs)
            case Push(piece, home):
                if (piece.tensor, piece.tokens, piece.heads) != ("o", home, slot) or home == rank:
                    raise wrong("only this slot's o of another rank's tokens goes to that rank")
                if len(met[home]) != size:
                    raise wrong("not finished: it has not met every key")
                if piece in have:
                    raise wrong("pushed twice")
                have.add(piece)
    for q, keys in met.items():
        if len(keys) != size:
            raise ScheduleError(f"rank {rank}: q of rank {q} meets {len(keys)} of {size} key chunks")
    pulled = {piece for piece in have if piece.tensor != "o" and piece.tokens != rank}
    if unused := pulled - used:
        raise ScheduleError(f"rank {rank}: pulls {min(unused)} and never uses it")


def _check_complete(schedule: Schedule) -> None:
    """Every q of every slot is attended by one rank, and its o is at home at the end."""
    made: dict[Piece, int] = {}
    for rank, steps in enumerate(schedule.ranks):
        slot, pushed = schedule.slot(rank), {step.piece for step in steps if isinstance(step, Push)}
        for q in {q for step in steps if isinstance(step, Attend) for q in step.q}:
            piece = Piece("o", q, slot)
            if piece in made:
                raise ScheduleError(f"{piece} is made by rank {made[piece]} and by rank {rank}")
            made[piece] = rank
            if q != rank and piece not in pushed:
                raise ScheduleError(f"rank {rank}: {piece} never goes home")
    for tokens in range(schedule.mesh.size):
        for slot in range(schedule.slots):
            if Piece("o", tokens, slot) not in made:
                raise ScheduleError(f"{Piece('o', tokens, slot)} is never made")


def _check_waits(schedule: Schedule) -> None:
    """Runs all ranks to the end; a rank waits at a Pull until the source has passed its own Pull of the piece."""
    position, arrived = [0] * schedule.mesh.size, [set[Piece]() for _ in schedule.ranks]
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(schedule.ranks):
            while position[rank] < len(steps):
                step = steps[position[rank]]
                if isinstance(step, Pull):
                    if step.source != step.piece.tokens and step.piece not in arrived[step.source]:
                        break
                    arrived[rank].add(step.piece)
                position[rank] += 1
                moved = True
    stuck = [rank for rank, steps in enumerate(schedule.ranks) if position[rank] < len(steps)]
    if stuck:
        raise ScheduleError(f"ranks {stuck} wait for each other")


def _check_reuse(schedule: Schedule, nodes: tuple[int, ...]) -> None:
    """A rank writes a set again two layers later; by then it has heard, in the layer between, from all who read it.

    Whoever published in layer i+1 has finished layer i. So the ranks that touch memory which a rank writes must be
    among those whose pieces that rank waits for in every layer.
    """
    heard = [{piece.tokens for piece in pulled} for pulled in schedule.sources]
    readers: list[set[int]] = [set() for _ in schedule.ranks]
    writes: list[set[int]] = [{rank} for rank in range(schedule.mesh.size)]
    for rank, steps in enumerate(schedule.ranks):
        for step in steps:
            if isinstance(step, Pull):
                holder = schedule.holder(step.piece, rank, nodes)
                readers[holder].add(rank)
                if holder == rank:
                    writes[schedule.holder(step.piece, step.source, nodes)].add(rank)
            elif isinstance(step, Push):
                writes[rank].add(step.home)
                heard[step.home].add(rank)
    for rank, targets in enumerate(writes):
        unheard = {reader for target in targets for reader in {target} | readers[target]} - heard[rank] - {rank}
        if unheard:
            raise ScheduleError(f"rank {rank} may overwrite what rank {min(unheard)} still reads")
