"""A parallel attention method is a schedule, and a schedule is data.

A schedule lists, for every rank, the steps by which it comes to its share of one attention layer. The same lists are
checked (`check`), counted (`traffic`), priced, drawn and run; a step names *pieces*, never buffers.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from ..mesh import Mesh, cut

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Piece:
    """A part of a tensor: the tokens of rank `tokens`, the heads of slot `heads`.

    Heads are cut into ulysses x groups slots; rank coordinate u has slots u * groups .. (u + 1) * groups - 1.
    """

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
    """Attends the q pieces to the kv pieces, all of the head slot `heads`, and merges into the partial results."""

    q: tuple[int, ...]
    kv: tuple[int, ...]
    heads: int = 0


@dataclass(frozen=True)
class Push:
    """Sends a finished piece of o to the rank whose tokens it holds."""

    piece: Piece
    home: int


Step = Pull | Attend | Push
Method = Callable[[Mesh, int, range], list[Step]]  # mesh, rank, and the head slots that this rank computes


class ScheduleError(Exception):
    """A schedule that does not compute attention; says which rank, which step and why."""


@dataclass(frozen=True)
class Shape:
    """What one layer attends: `batch` x `length` tokens x `heads` x `dim`."""

    batch: int
    length: int
    heads: int
    dim: int


class Lazy(Sequence[T]):
    """`make(rank)` for each rank, made when it is first asked for: a plan for thousands of ranks looks at a few."""

    def __init__(self, make: Callable[[int], T], count: int) -> None:
        self._make, self._count, self._made = make, count, dict[int, T]()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rank: Any) -> Any:
        if not 0 <= rank < self._count:
            raise IndexError(rank)
        if rank not in self._made:
            self._made[rank] = self._make(rank)
        return self._made[rank]


@dataclass(frozen=True, eq=False)
class Schedule:
    """All ranks' steps of one layer on `mesh`; the tokens are cut over ranks, the heads over ulysses x groups slots."""

    name: str
    mesh: Mesh
    ranks: Sequence[tuple[Step, ...]]
    groups: int = 1

    @classmethod
    def of(cls, name: str, method: Method, mesh: Mesh, groups: int = 1) -> "Schedule":
        def steps(rank: int) -> tuple[Step, ...]:
            return tuple(method(mesh, rank, own_slots(mesh, rank, groups)))

        return cls(name, mesh, Lazy(steps, mesh.size), groups)

    @property
    def slots(self) -> int:
        """Into how many slots the heads are cut."""
        return self.mesh.extent("ulysses") * self.groups

    def own(self, rank: int) -> range:
        """The head slots that `rank` computes."""
        return own_slots(self.mesh, rank, self.groups)

    def heads(self, count: int) -> tuple[range, ...]:
        """The heads of each slot: `count` heads cut over the ulysses axis first, each part into its groups."""
        parts = cut(count, self.mesh.extent("ulysses"))
        return tuple(part[g.start : g.stop] for part in parts for g in cut(len(part), self.groups))

    @cached_property
    def sources(self) -> Sequence[dict[Piece, int]]:
        """For every rank: the source of each piece it pulls."""

        def of(rank: int) -> dict[Piece, int]:
            return {step.piece: step.source for step in self.ranks[rank] if isinstance(step, Pull)}

        return Lazy(of, self.mesh.size)

    def holder(self, piece: Piece, reader: int, nodes: Sequence[int]) -> int:
        """The rank in whose memory `reader` finds `piece`: read in place inside a node, else brought over."""
        chain = [reader]
        while chain[-1] != piece.tokens:
            chain.append(self.sources[chain[-1]][piece])
        holder = chain[-1]
        for rank in reversed(chain):
            if nodes[rank] != nodes[holder]:
                holder = rank
        return holder

    def crossings(self, nodes: Sequence[int]) -> list[tuple[int, int, Piece]]:
        """Every (from, to, piece) that crosses nodes, in the order in which they should leave.

        What is pulled goes first, in the order in which its reader wants it; o goes when nothing else waits, since
        whoever still lacks q, k or v cannot compute, while o is wanted at the end only.
        """
        pulls, pushes = [], []
        for rank, steps in enumerate(self.ranks):
            for at, step in enumerate(steps):
                if isinstance(step, Push) and nodes[step.home] != nodes[rank]:
                    pushes.append((at, rank, step.home, step.piece))
                if isinstance(step, Pull) and self.holder(step.piece, rank, nodes) == rank:
                    pulls.append((at, self.holder(step.piece, step.source, nodes), rank, step.piece))
        return [found[1:] for found in (*sorted(pulls), *sorted(pushes))]


def own_slots(mesh: Mesh, rank: int, groups: int) -> range:
    """The head slots that `rank` computes, of all ulysses x groups."""
    u = mesh.coords(rank).get("ulysses", 0)
    return range(u * groups, (u + 1) * groups)


def traffic(schedule: Schedule, shape: Shape, nodes: Sequence[int]) -> dict[str, int]:
    """Elements of one layer that change ranks, all ranks together, by link class: `intra` and `inter` node.

    nodes: the node of each rank.
    """
    tokens, slots = cut(shape.length, schedule.mesh.size), schedule.heads(shape.heads)

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
    size, own = schedule.mesh.size, schedule.own(rank)
    have = {Piece(t, rank, slot) for t in "qkv" for slot in own}
    used: set[Piece] = {piece for source in schedule.sources for piece, who in source.items() if who == rank}
    met: dict[tuple[int, int], set[int]] = defaultdict(set)
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
            case Attend(qs, kvs, slot):
                if slot not in own:
                    raise wrong("these heads are another rank's")
                needs = {Piece("q", q, slot) for q in qs} | {Piece(t, kv, slot) for kv in kvs for t in "kv"}
                if needs - have:
                    raise wrong(f"{min(needs - have)} is not there yet")
                used |= needs
                for q in qs:
                    if met[q, slot] & set(kvs) or len(set(kvs)) < len(kvs):
                        raise wrong(f"q of rank {q} meets keys twice")
                    met[q, slot] |= set(kvs)
            case Push(piece, home):
                if (piece.tensor, piece.tokens) != ("o", home) or home == rank or piece.heads not in own:
                    raise wrong("only o of another rank's tokens goes to that rank, of heads that are computed here")
                if len(met[home, piece.heads]) != size:
                    raise wrong("not finished: it has not met every key")
                if piece in have:
                    raise wrong("pushed twice")
                have.add(piece)
    for (q, _), keys in met.items():
        if len(keys) != size:
            raise ScheduleError(f"rank {rank}: q of rank {q} meets {len(keys)} of {size} key chunks")
    pulled = {piece for piece in have if piece.tensor != "o" and piece.tokens != rank}
    if unused := pulled - used:
        raise ScheduleError(f"rank {rank}: pulls {min(unused)} and never uses it")


def _check_complete(schedule: Schedule) -> None:
    """Every q of every slot is attended by one rank, and its o is at home at the end."""
    made: dict[Piece, int] = {}
    for rank, steps in enumerate(schedule.ranks):
        pushed = {step.piece for step in steps if isinstance(step, Push)}
        for piece in {Piece("o", q, step.heads) for step in steps if isinstance(step, Attend) for q in step.q}:
            if piece in made:
                raise ScheduleError(f"{piece} is made by rank {made[piece]} and by rank {rank}")
            made[piece] = rank
            if piece.tokens != rank and piece not in pushed:
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
