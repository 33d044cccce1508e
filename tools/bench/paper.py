"""StreamFusion's workloads on its cluster, priced by the simulator, beside the speed-ups that the paper measured.

    python tools/bench/paper.py [--cluster 4x8-a100]

Paper: arXiv 2601.20273, 3 or 4 nodes of 8 A100-40GB. Each column is a speed-up over USP with whole blocks a hop.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import yaml

from hpcdit.attention.methods import Layout, degrees
from hpcdit.attention.schedule import Shape
from hpcdit.planner.costs import Costs, Link
from hpcdit.planner.presets import to_costs
from hpcdit.planner.simulate import simulate
from hpcdit.planner.timeline import Timeline
from hpcdit.planner.workload import Workload

PRESETS = Path(__file__).parents[2] / "conf" / "cluster"
RANKS_PER_NODE, ITEMSIZE, HEADS = 8, 2, 24

# Assumption: from a block being written to its first byte at the peer, where both ends call NCCL for each transfer and
# a kernel has to start on both, instead of one side's put. Between two H100 a 1 MiB send and receive takes 135 us, a
# put 18 us. It is all that "+ one-sided" changes here; that NCCL's kernels take multiprocessors from attention is not.
TWO_SIDED_LATENCY_S = 120e-6


@dataclass(frozen=True)
class Work:
    """One row of the paper's table. published: TAS, + Torus, + one-sided."""

    name: str
    nodes: int
    tokens: int
    dim: int
    published: tuple[float, float, float]


def flux(side: int) -> int:
    """Tokens of a square image: patches of 16 pixels, and 512 of text."""
    return (side // 16) ** 2 + 512


def cogvideox(seconds: int) -> int:
    """Tokens of 480 x 720 at 8 frames a second: 4 frames in one, patches of 16 pixels, and 226 of text."""
    return (seconds * 8 // 4 + 1) * 30 * 45 + 226


WORKS = (
    Work("Flux 3072^2", 3, flux(3072), 128, (1.11, 1.01, 1.11)),
    Work("Flux 3072^2", 4, flux(3072), 128, (1.64, 1.06, 1.77)),
    Work("Flux 4096^2", 4, flux(4096), 128, (1.62, 1.49, 1.61)),
    Work("CogVideoX 20 s", 3, cogvideox(20), 64, (1.08, 1.26, 1.22)),
    Work("CogVideoX 40 s", 3, cogvideox(40), 64, (1.06, 1.16, 1.17)),
)


@dataclass(frozen=True)
class Priced:
    """Timelines of one attention layer of a workload, and rest_s, what its layer takes beside attention."""

    usp: Timeline
    tas: Timeline
    torus: Timeline
    one_sided: Timeline
    best: Timeline
    best_layout: Layout
    rest_s: float

    def gains(self, rest: bool) -> tuple[float, ...]:
        """Over USP: TAS, Torus, one-sided Torus, ours; of attention alone, or of the whole layer."""
        more = self.rest_s if rest else 0.0
        columns = (self.tas, self.torus, self.one_sided, self.best)
        return tuple((self.usp.seconds + more) / (column.seconds + more) for column in columns)


def price(work: Work, costs: Costs) -> Priced:
    """costs: of one-sided transfers."""
    ranks = work.nodes * RANKS_PER_NODE
    # Cut evenly, so that few ranks stand for all; at most a token a rank more than there are.
    shape = Shape(1, ceil(work.tokens / ranks) * ranks, HEADS, work.dim)
    nodes = tuple(rank // RANKS_PER_NODE for rank in range(ranks))
    two_sided = replace(costs, inter=Link(TWO_SIDED_LATENCY_S, costs.inter.bytes_per_s))

    def run(layout: Layout, prices: Costs) -> Timeline:
        return simulate(layout.schedule(), shape, nodes, prices, ITEMSIZE)

    usp = Layout("usp", RANKS_PER_NODE, work.nodes)
    u, r = degrees("tas", ranks, HEADS)  # the paper's rule
    # The paper's Torus has one piece a node. Where several rows lie on a node, as many pieces come nearest to that.
    torus = Layout("torus", u, r, pieces=work.nodes if u > work.nodes else 0)
    ours = {layout: run(layout, costs) for layout in candidates(ranks)}
    best = min(ours, key=lambda layout: ours[layout].seconds)
    whole = Workload(shape.length, HEADS, work.dim, layers=1, ffn_dim=4 * HEADS * work.dim, text_tokens=0,
                     itemsize=ITEMSIZE)  # fmt: skip
    return Priced(
        usp=run(usp, two_sided),
        tas=run(Layout("tas", u, r), two_sided),
        torus=run(torus, two_sided),
        one_sided=run(torus, costs),
        best=ours[best],
        best_layout=best,
        rest_s=whole.rest_s(ranks, costs),
    )


def candidates(ranks: int) -> list[Layout]:
    """Layouts that use the heads evenly."""
    pairs = [(u, ranks // u) for u in range(1, HEADS + 1) if ranks % u == 0 and HEADS % u == 0]
    return [
        Layout(method, *pair, pieces=pieces, groups=groups)
        for pair in pairs
        for method in ("usp", "tas", "torus")
        for pieces in ((0, 1) if method == "torus" else (0,))
        for groups in (1, 2, 3)
        if groups <= HEADS // pair[0]
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The paper's workloads on its cluster, priced.")
    parser.add_argument("--cluster", default="4x8-a100", help="a preset of conf/cluster")
    parser.add_argument("--inter-gb-s", type=float, help="GB/s of a node's network instead of the preset's")
    args = parser.parse_args(words)
    file = PRESETS / f"{args.cluster}.yaml"
    if not file.exists():
        parser.error(f"--cluster: no {file}")
    costs = to_costs(yaml.safe_load(file.read_text())["costs"])
    if args.inter_gb_s:
        costs = replace(costs, inter=replace(costs.inter, bytes_per_s=args.inter_gb_s * 1e9))
    print(
        f"speed-up over USP 8 x nodes in whole blocks; predicted with {file.name}, {costs.inter.bytes_per_s / 1e9:.0f}"
        " GB/s a node; two-sided transfers begin after"
        f" {TWO_SIDED_LATENCY_S * 1e6:.0f} us, one-sided after {costs.inter.latency_s * 1e6:.0f} us\n"
        "x: USP's bytes across / a node's bandwidth / attention; paper | attention alone | whole layer\n"
    )
    print(f"{'workload':15} nodes {'ms USP':>7} {'x':>5}   {'TAS':20} {'+ Torus':20} {'+ one-sided':20}  ours")
    for work in WORKS:
        priced = price(work, costs)
        transfer = priced.usp.inter_bytes / work.nodes / costs.inter.bytes_per_s
        alone, layer = priced.gains(rest=False), priced.gains(rest=True)
        columns = [f"{p:.2f} | {a:.2f} | {w:.2f}" for p, a, w in zip(work.published, alone, layer, strict=False)]
        print(
            f"{work.name:15} {work.nodes:5} {priced.usp.seconds * 1e3:7.2f} {transfer / priced.usp.compute_s:5.2f}"
            f"   {' '.join(f'{column:20}' for column in columns)}  {alone[3]:.2f} | {layer[3]:.2f} {priced.best_layout}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
