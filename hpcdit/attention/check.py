"""The proof that a schedule computes attention, without running it."""

from collections import defaultdict
from collections.abc import Sequence

from .schedule import Attend, Piece, Pull, Push, Schedule, Step


class ScheduleError(Exception):
    """A schedule that does not compute attention; says which rank, which step and why."""


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
