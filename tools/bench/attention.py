"""Attention methods side by side: measured, their bound and their prediction in one table. See README.md here.

python tools/shaped_cluster.py --nodes 4 --ranks-per-node 2 --rate 400mbit -- python tools/bench/attention.py
"""

import argparse
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import torch
from cells import WHAT, Bench, Machine, WrongResult, describe, measure
from paced import PacedKernels
from tables import Cell, Gain, gain, summary, table, write

from hpcdit.attention.methods import METHODS, Layout, degrees, inter_elements
from hpcdit.attention.schedule import Shape, traffic
from hpcdit.cluster import MPI, Cluster, World
from hpcdit.device import cpu as cpu_device
from hpcdit.errors import InputError
from hpcdit.group import Group
from hpcdit.kernels import cpu
from hpcdit.kernels.base import Kernels
from hpcdit.planner.calibrate import overlap
from hpcdit.planner.costs import Costs, Link
from hpcdit.planner.search import plan_group
from hpcdit.planner.simulate import simulate
from hpcdit.planner.workload import Workload
from hpcdit.transport.mpi import MpiTransport

AUTO = "auto"
XS = "0.3,0.6,1,1.5,2,2.5,4"


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    world = World()
    cluster = Cluster(world, args.ranks_per_node)
    torch.set_num_threads(world.cores)
    try:
        code = Report(args, cluster).run()
    except InputError as error:  # the same on every rank
        if world.rank == 0:
            print(f"bench: {error}", file=sys.stderr)
        code = 2
    cluster.close()
    world.close()
    return code


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Attention methods side by side, under mpirun.")
    parser.add_argument("--length", type=int, default=2304, help="tokens (real compute: of the first measurement)")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--x", default=XS, help="transfer of USP in whole blocks alone / compute alone, a list")
    parser.add_argument("--layers", type=int, default=5, help="of a chain")
    parser.add_argument("--repeat", type=int, default=5, help="chains of each layout at each x")
    parser.add_argument("--rate-bytes", type=float, help="bytes a second of a node's network; default: measured")
    parser.add_argument("--compute", choices=("paced", "real"), default="paced")
    parser.add_argument("--layouts", help='"usp 2x4; usp 2x4 g4; torus 4x2 p1; auto": ulysses x ring, groups, pieces')
    parser.add_argument("--ranks-per-node", type=int, help="groups of ranks that stand for nodes; default: real nodes")
    parser.add_argument("--inter", default="auto", help="transport.inter: auto, persistent or rma")
    parser.add_argument("--csv", type=Path, help="a file for all cells")
    if MPI.COMM_WORLD.rank:  # one rank says what is wrong
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    args = parser.parse_args(words)
    sys.stderr = sys.__stderr__
    return args


def parse(text: str, ranks: int, heads: int) -> list[Layout | str]:
    """The layouts that `text` names. Raises InputError."""
    found: list[Layout | str] = []
    for word in filter(None, (part.strip() for part in text.split(";"))):
        match = re.fullmatch(r"(\w+) (\d+) ?x ?(\d+)((?: [gp]\d+)*)", word)
        if word == AUTO:
            found.append(AUTO)
        elif match and match[1] in METHODS:
            cuts = {cut[0]: int(cut[1:]) for cut in match[4].split()}
            pair = degrees(match[1], ranks, heads, int(match[2]), int(match[3]))
            found.append(Layout(match[1], *pair, pieces=cuts.get("p", 0), groups=max(cuts.get("g", 1), 1)))
        else:
            raise InputError(f"--layouts: {word!r} is neither auto nor like 'torus 4x2 g3 p1' ({', '.join(METHODS)})")
    return found


def say(group: Group, text: str) -> None:
    if group.rank == 0:
        print(text, flush=True)


class Report:
    """One run. All ranks do the same; rank 0 prints."""

    def __init__(self, args: argparse.Namespace, cluster: Cluster) -> None:
        self.args, self.cluster, self.world = args, cluster, cluster.world
        self.real = args.compute == "real"
        nodes, ranks = cluster.node_count, self.world.size
        self.usp = Layout("usp", *degrees("usp", ranks, args.heads, ranks // nodes, nodes))
        if nodes == 1:
            raise InputError("all ranks are on one node; run it in tools/shaped_cluster.py, or with --ranks-per-node")
        across = f"{nodes}x{ranks // nodes}"
        default = f"usp {ranks // nodes}x{nodes}; usp {ranks // nodes}x{nodes} g4; tas {across}; torus {across}"
        self.layouts = parse(args.layouts or f"{default}; torus {across} g3; auto", ranks, args.heads)
        try:
            self.xs = sorted(float(x) for x in args.x.split(","))
        except ValueError:
            raise InputError(f"--x: {args.x!r} is no list of numbers") from None
        if min(self.xs, default=0) <= 0 or min(args.layers, args.repeat, args.length, args.dim) < 1:
            raise InputError("--x, --layers, --repeat, --length and --dim are above 0")
        self.transport = MpiTransport(cluster, args.inter)
        self.machine = measure(self.transport)
        if self.real:  # a kernel that sleeps loses nothing to others
            q = torch.randn(256, 1, args.heads, args.dim)
            found = overlap(self.world, self.transport, cpu_device(), self.machine.inter, lambda: cpu.attend(q, q, q))
            self.machine = replace(self.machine, overlap=found)
        if args.rate_bytes:
            self.machine = replace(self.machine, inter=replace(self.machine.inter, bytes_per_s=args.rate_bytes))
        self.rows: list[list[Cell]] = []
        self.gains: list[Gain] = []

    def shape(self, length: int) -> Shape:
        return Shape(1, length, self.args.heads, self.args.dim)

    def bench(self, length: int) -> Bench:
        return Bench(self.cluster, self.transport, self.shape(length), torch.float32)

    def run(self) -> int:
        args, nodes = self.args, self.cluster.node_count
        kernels = "real kernels" if self.real else "PACED kernels (sleep instead of computing; all transfers are real)"
        say(self.world, f"{kernels}; {nodes} nodes x {self.world.size // nodes} ranks, {self.transport.describe()}")
        say(
            self.world, f"{args.heads} heads of {args.dim}, float32, chains of {args.layers} layers, {args.repeat} each"
        )
        say(self.world, f"measured: {describe(self.machine)}\nms a layer, medians of the slowest rank")
        bench = self.bench(args.length)
        transfer = self.transfers(bench)
        if self.real:
            computes = bench.alone(cpu, args.repeat)
            bench.close()
            at_length = transfer[self.usp] / computes
            for x in self.xs:  # transfers grow with the length, compute with its square
                length = max(round(args.length * at_length / x / self.world.size), 1) * self.world.size
                bench = self.bench(length)
                self.machine = replace(self.machine, call_s=bench.alone(cpu, 9, tokens=16))
                self.row(bench, self.transfers(bench), cpu, bench.alone(cpu, args.repeat))
                if x == self.xs[-1]:
                    self.bytes(bench)
                bench.close()
        else:
            for x in self.xs:
                self.row(bench, transfer, None, transfer[self.usp] / x)
            self.bytes(bench)
            bench.close()
        say(self.world, "\n" + summary(self.gains, self.rows))
        if args.csv and self.world.rank == 0:
            write(args.csv, [cell for row in self.rows for cell in row], args.compute)
        return 0

    def fixed(self) -> list[Layout]:
        """The layouts of every x, USP in whole blocks among them."""
        return list(dict.fromkeys([self.usp, *(layout for layout in self.layouts if isinstance(layout, Layout))]))

    def transfers(self, bench: Bench, layouts: Sequence[Layout] = ()) -> dict[Layout, float]:
        """Seconds of a layer whose compute takes no time, by layout."""
        times = self.interleaved(bench, layouts or self.fixed(), PacedKernels())
        return {layout: statistics.median(found) for layout, found in times.items()}

    def interleaved(self, bench: Bench, layouts: Sequence[Layout], kernels: Kernels) -> dict[Layout, list[float]]:
        """Layouts take turns, so that what disturbs the machine disturbs all."""
        times: dict[Layout, list[float]] = {layout: [] for layout in layouts}
        for _ in range(self.args.repeat):
            for layout, found in times.items():
                found.append(bench.chain(layout, kernels, self.args.layers)[0])
        return times

    def row(self, bench: Bench, transfer: dict[Layout, float], kernels: Kernels | None, compute: float) -> None:
        """Measures and prints all layouts at one x."""
        s, size, x = bench.shape, self.world.size, transfer[self.usp] / compute
        call_s = self.machine.call_s if self.real else 0.0  # what `compute` has of it: a paced call's comes on top
        flops_per_s = 4 * s.batch * s.length**2 * s.heads * s.dim / size / max(compute - call_s, compute / 2)
        prices = costs(self.machine, flops_per_s)
        predict = predictor(bench, prices)
        layouts, chosen = self.fixed(), None
        if AUTO in self.layouts:
            # By one rank: the others would only take its time.
            chosen = Layout(*self.world.agree(lambda: astuple(choose(bench, prices)), WHAT))
            if chosen not in transfer:
                transfer.update(self.transfers(bench, [chosen]))
            layouts = list(dict.fromkeys([*layouts, chosen]))
        predicted = self.world.agree(lambda: [predict(layout) for layout in layouts], WHAT)
        times = self.interleaved(bench, layouts, kernels or PacedKernels(flops_per_s))
        cells = [
            Cell(x, str(layout), compute, transfer[layout], times[layout], guess)
            for layout, guess in zip(layouts, predicted, strict=True)
        ]
        if chosen is not None:
            auto = cells[layouts.index(chosen)]
            cells.append(replace(auto, method=AUTO, note=f"= {chosen}"))
        self.rows.append(cells)
        say(
            self.world,
            f"\nx = {x:.2f}: {self.args.compute} compute {compute * 1e3:.1f}, {s.length} tokens\n{table(cells)}",
        )
        if (found := gain(cells, str(self.usp))) is not None:
            self.gains.append(found)
            say(self.world, str(found))

    def bytes(self, bench: Bench) -> None:
        """Prints the elements that crossed nodes beside what the schedules and the formulas say."""
        s, nodes, ranks = bench.shape, self.cluster.node_count, self.world.size
        lines = [
            f"\nelements across nodes a layer, {s.length} tokens",
            f"  {'method':32} {'counted':>10} {'formula':>10}",
        ]
        for layout in self.fixed():
            counted = bench.chain(layout, PacedKernels(), 2)[1] / bench.dtype.itemsize
            planned = traffic(layout.schedule(), s, bench.nodes)["inter"]
            formula = inter_elements(layout.method, s, nodes)
            outer = layout.ring if layout.method == "usp" else layout.ulysses  # the formulas have it across the nodes
            even = s.length % ranks == 0 and s.heads % layout.ulysses == 0 and outer == nodes
            said = f"{formula:10.0f}" if formula is not None else f"{'-':>10}"
            verdict = "" if counted == planned else f"not the {planned} of the schedule!"
            if formula is not None and counted != formula:
                verdict += " differs!" if even else " (uneven cuts, or another mesh than the formula's)"
            lines.append(f"  {layout!s:32} {counted:10.0f} {said} {verdict}".rstrip())
        say(self.world, "\n".join(lines))


def costs(machine: Machine, flops_per_s: float) -> Costs:
    """One lane and tiles of one token: this compute's time is in proportion to its size."""
    return Costs(
        inter=machine.inter,
        intra=Link(machine.intra.latency_s, machine.intra.bytes_per_s),
        attention_flops=flops_per_s,
        matmul_flops=flops_per_s,
        call_s=machine.call_s,
        lanes=1,
        tile=1,
        copy_bytes_per_s=machine.copy_bytes_per_s,
        memory_bytes=float("inf"),
        spread=machine.spread,
        overlap=machine.overlap,
    )


def predictor(bench: Bench, prices: Costs) -> Callable[[Layout], float]:
    """Seconds of a layer, as the simulator has them."""

    def predict(layout: Layout) -> float:
        itemsize = bench.dtype.itemsize
        return simulate(layout.schedule(), bench.shape, bench.nodes, prices, itemsize).seconds

    return predict


def choose(bench: Bench, prices: Costs) -> Layout:
    """The planner's choice for this attention and nothing else."""
    s = bench.shape
    work = Workload(
        tokens=s.length,
        heads=s.heads,
        head_dim=s.dim,
        layers=1,
        ffn_dim=0,
        itemsize=bench.dtype.itemsize,
        text_tokens=0,
        out_channels=0,
    )
    return plan_group(work, bench.nodes, replace(prices, matmul_flops=float("inf"))).layout


if __name__ == "__main__":
    started = time.perf_counter()
    try:
        code = main()
    except (Exception, KeyboardInterrupt) as error:  # one rank's end is the end of all
        text = f"bench: {error}" if isinstance(error, WrongResult) else traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # Abort may return before the launcher has heard of it
    if MPI.COMM_WORLD.rank == 0 and code == 0:
        print(f"{time.perf_counter() - started:.0f} s in all")
    sys.exit(code)
