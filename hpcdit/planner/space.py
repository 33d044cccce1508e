"""All layouts of a group, and for each what its attention takes at least: enough to leave most of them unsimulated."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from ..attention.methods import METHODS, Layout, degrees
from ..attention.schedule import Attend, Pull, Push, Shape
from ..errors import InputError
from ..mesh import cut
from .costs import Costs
from .groups import Fixed, Group, divisors
from .timeline import Span, Timeline
from .workload import Workload

HEAD_GROUPS = (1, 2, 3, 4)
TORUS_PIECES = (1, 0, 2)  # one piece for all remote rows, one a row, two
SIMPLEST_FIRST = ("ulysses", "ring", "usp", "tas", "torus")


@dataclass(frozen=True)
class Bound:
    """What a layer's attention takes at least on one family of layouts, however they are cut.

    seconds: of the layer; inter_bytes, intra_bytes: that cross nodes, or change ranks inside one, all ranks together;
    readers: ranks of a node that get the same from other nodes at the same time, 1 where they differ; stored: whether
    keys and values of other ranks have to be copied.
    """

    seconds: float
    inter_bytes: float
    intra_bytes: float
    readers: int
    stored: bool


def simplicity(layout: Layout) -> tuple[int, ...]:
    """Sorts layouts, the simplest first; no two are equal."""
    cuts = {1: 0, 0: 1}.get(layout.pieces, layout.pieces) if layout.method == "torus" else 0
    return layout.groups, cuts, SIMPLEST_FIRST.index(layout.method), layout.ulysses, layout.pieces


def layouts(group: Group, heads: int, fixed: Fixed, puts: bool = False) -> list[Layout]:
    """All layouts of `group` that the user left open, the simplest first. Raises InputError where there is none.

    puts: as Costs.puts.
    """
    families = list(_families(group, heads, fixed, puts))
    if not families:
        more = ", ".join(str(d) for d in divisors(group.size) if 1 < d <= heads)
        raise InputError(
            "parallel.method=torus with ulysses=1: there is one row of ranks, and none that could arrive meanwhile;"
            f" allowed for {group.size} ranks: {f'parallel.ulysses={more}, or ' if more else ''}another method"
        )
    found = [
        Layout(method, ulysses, ring, pieces, groups)
        for method, ulysses, ring in families
        for pieces in (_pieces(ulysses, fixed) if method == "torus" and group.size > 1 else (0,))
        for groups in _head_groups(ceil(heads / ulysses), group.size, fixed)
    ]
    if not found:
        raise InputError(f"parallel.groups={fixed.groups}: a rank has fewer heads; allowed: 1 to {heads}, or null")
    return sorted(found, key=simplicity)


def _families(group: Group, heads: int, fixed: Fixed, puts: bool) -> Iterator[tuple[str, int, int]]:
    """(method, ulysses, ring). On a mesh of one axis the products are Ulysses or Ring by another name."""
    ranks, method, given = group.size, fixed.method, fixed.ulysses is not None or fixed.ring is not None
    if given or method in ("ulysses", "ring"):
        as_product = "torus" if method == "auto" else method
        pairs = [degrees(as_product, ranks, heads, fixed.ulysses, fixed.ring)]
    else:
        pairs = [(d, ranks // d) for d in divisors(ranks) if d <= heads]
    for ulysses, ring in pairs:
        if method != "auto":
            if method != "torus" or ulysses > 1 or ranks == 1:
                yield method, ulysses, ring
            continue
        if 1 in (ulysses, ring):
            yield "ulysses" if ring == 1 else "ring", ulysses, ring
        else:
            yield "usp", ulysses, ring
            if group.crosses:  # inside a node the order of the axes makes no difference
                yield "tas", ulysses, ring
        if (group.crosses or puts) and ulysses > 1:  # else nothing is on its way while a rank computes
            yield "torus", ulysses, ring


def _pieces(ulysses: int, fixed: Fixed) -> tuple[int, ...]:
    if fixed.pieces is not None:
        return (fixed.pieces,)
    return TORUS_PIECES[: ulysses - 1]  # with one remote row, or two, some are the same


def _head_groups(slot: int, ranks: int, fixed: Fixed) -> tuple[int, ...]:
    if fixed.groups is not None:
        return (fixed.groups,) if fixed.groups <= slot else ()
    return tuple(g for g in HEAD_GROUPS if g <= slot) if ranks > 1 else (1,)


def bound(method: str, ulysses: int, ring: int, group: Group, work: Workload, costs: Costs) -> Bound:
    """The least time of one attention layer for all layouts of `method` on ulysses x ring.

    Counted for the first node, from even shares of tokens and heads: others are alike, or have more to do.
    """
    ranks, nodes, costs = group.size, group.nodes, group.costs(costs)
    ulysses_outside, torus = METHODS[method][1][0] == "ulysses", method == "torus"

    def rank(u: int, r: int) -> int:
        u, r = u % ulysses, r % ring
        return u * ring + r if ulysses_outside else r * ulysses + u

    far_pieces, near_pulls = [], 0  # that come to each rank of the node from other nodes, and from inside
    for n in range(nodes.count(nodes[0])):
        u, r = divmod(n, ring) if ulysses_outside else divmod(n, ulysses)[::-1]
        far = sum(nodes[rank(u + i, r)] != nodes[n] for i in range(1, ulysses))
        if torus:  # each row is read from the rank that has pulled it
            far_ring = sum(nodes[rank(u, r + j)] != nodes[n] for j in range(1, ring))
        else:  # passed on by the neighbour
            far_ring = (ring - 1) * (ring > 1 and nodes[rank(u, r + 1)] != nodes[n])
        far_pieces.append(4 * far + 2 * far_ring * ulysses)
        near_pulls = max(near_pulls, 3 * (ulysses - 1 - far) + 2 * (ring - 1 - far_ring) * ulysses)
    piece = work.batch * work.tokens / ranks * work.heads / ulysses * work.head_dim * work.itemsize
    inter_bytes = sum(far_pieces) * piece
    transfer = inter_bytes / costs.inter.bytes_per_s + costs.inter.latency_s * any(far_pieces)
    pulls = 0.0 if costs.puts else near_pulls * (costs.intra.latency_s + piece / costs.intra.bytes_per_s)
    flops = 4 * work.batch * work.tokens * ceil(work.tokens / ring) * ceil(work.heads / ulysses) * work.head_dim
    calls = 1 if ulysses == ring == 1 else 3 if torus else ring
    moved = (4 * (ulysses - 1) + 2 * (ring - 1) * ulysses) * ranks * piece
    across = inter_bytes * (nodes[-1] + 1)
    return Bound(
        seconds=max(flops / costs.attention_flops + calls * costs.call_s + pulls, transfer),
        inter_bytes=across,
        intra_bytes=max(moved - across, 0.0),
        readers=len(far_pieces) if len(set(far_pieces)) == 1 and ranks % len(far_pieces) == 0 else 1,
        stored=ulysses > 1 or group.crosses or costs.puts,
    )


def alone(layout: Layout, shape: Shape, group: Group, costs: Costs, itemsize: int, limit: Bound) -> Timeline:
    """One layer if the last rank never waited for another but for what its node's link brings in turn.

    A bound closer than `bound`, at the price of making that rank's steps; `limit` is what `bound` found. The last rank
    has the largest share of tokens and heads.
    """
    schedule, nodes, costs, me = layout.schedule(), group.nodes, group.costs(costs), group.size - 1
    tokens = [len(part) for part in cut(shape.length, group.size)]
    heads = [len(part) for part in schedule.heads(shape.heads)]
    one = shape.batch * shape.dim * itemsize  # bytes of a head of one token
    mean = one * shape.length * shape.heads / (group.size * schedule.slots)  # bytes of a piece
    whole = costs.copy(one * tokens[me] * shape.heads)
    now, last, busy, met = 3 * whole, 0.0, 0.0, set[tuple[int, int]]()
    arrived = {True: 0.0, False: 0.0}  # from other nodes, and from the own one
    spans = list[Span]()
    for step in schedule.ranks[me]:
        start = now
        if isinstance(step, Attend):
            count, queries, keys = heads[step.heads], *(sum(tokens[who] for who in part) for part in (step.q, step.kv))
            call = costs.attend(queries, keys, count, shape.batch, shape.dim)
            merged = sum(tokens[who] for who in step.q if (who, step.heads) in met)
            met.update((who, step.heads) for who in step.q)
            now += call + costs.copy(3 * merged * one * count)
            busy += call
            spans.append(Span(me, "compute", "attend", start, now))
            continue
        nbytes = one * tokens[step.piece.tokens] * heads[step.piece.heads]
        other = nodes[step.source if isinstance(step, Pull) else step.home]
        far, link = other != nodes[me], costs.link(other, nodes[me])
        if isinstance(step, Push):
            now += costs.copy(nbytes)
            sent = far or costs.puts
            last = max(last, now + link.latency_s + sent * nbytes / link.bytes_per_s)
            spans.append(Span(me, "inter" if far else "intra", "o", start, max(now, sent * last)))
        elif far or costs.puts:
            all_alike = limit.readers * min(nbytes, mean)  # those of its node, some with smaller shares
            size = all_alike if far and limit.readers > 1 else nbytes
            start, arrived[far] = arrived[far], arrived[far] + size / link.bytes_per_s
            spans.append(Span(me, "inter" if far else "intra", step.piece.tensor, start, arrived[far]))
            now = max(now, arrived[far] + link.latency_s)
        else:
            now += link.latency_s + nbytes / link.bytes_per_s
            spans.append(Span(me, "intra", step.piece.tensor, start, now))
    seconds = max(max(now, last) + whole, limit.seconds)
    return Timeline(seconds, busy, int(limit.inter_bytes), int(limit.intra_bytes), spans)
