"""Blocks between two GPUs through hpcdit's exchange, beside bare puts, and beside an attention call.

mpirun -n 2 python tools/bench/transfers.py
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts

import torch
from gpu import bind, captured, cards, kernels, run, say, table

from hpcdit.cluster import Cluster, World
from hpcdit.errors import InputError
from hpcdit.transport.base import Exchange, Place, probe
from hpcdit.transport.heap import ALIGN
from hpcdit.transport.nvshmem import NvshmemTransport, finish, start

MIB = 1 << 20
ROUNDS = 20  # of a graph, and bare puts of a measurement
ROW = 1 << 30  # bytes of the blocks of one round, at most
WHAT = "the benchmark"


class Bench:
    """Both ranks send a block to each other at once."""

    def __init__(self, args: argparse.Namespace, world: World, device: torch.device) -> None:
        self.args, self.world, self.device = args, world, device
        largest = max(args.sizes)
        start(world, device, Exchange.SETS * (3 * largest + 2 * ROW) + 16 * MIB)
        self.cluster = Cluster(world, 1)
        self.transport = NvshmemTransport(self.cluster)

    def seconds(self, body: Callable[[], object], times: int = 1) -> float:
        """The median time of `body` / `times` on the device, of the slower rank."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        found = []
        for _ in range(3 + self.args.repeat):
            self.transport.await_stream(WHAT)
            self.world.barrier(WHAT)
            first.record()
            body()
            last.record()
            self.transport.await_stream(WHAT)
            found.append(first.elapsed_time(last) / 1e3 / times)
        return self.world.largest(statistics.median(found[3:]), WHAT)

    def rounds(self, exchange: Exchange, blocks: int, beside: Callable[[], object]) -> Callable[[], object]:
        """A graph of ROUNDS rounds, each with `blocks` blocks each way and `beside` meanwhile."""

        def turn() -> None:
            exchange.begin()
            exchange.signal(Place(self.world.rank, 0))
            beside()
            for block in range(blocks):
                exchange.wait(Place(self.world.rank, 1 + block))
            exchange.quiet()

        def turns() -> None:
            for _ in range(ROUNDS):
                turn()
            self.transport.join()

        for _ in range(Exchange.SETS):  # every kernel runs once before rounds run ahead
            turn()
        return captured(turns)

    def bare(self, nbytes: int) -> tuple[float, float]:
        """Seconds of a put among puts, and of one that is answered by one of the peer's before the next."""
        heap, peer, put = self.transport.heap, 1 - self.world.rank, self.transport.heap.nvshmem
        size = -(-nbytes // ALIGN) * ALIGN
        at = int(heap.fit(3 * size + ALIGN, 0))
        own = heap.take(at, 3 * size + ALIGN)
        source, signals = own.data_ptr(), own[3 * size :].view(torch.int64).zero_()
        self.transport.await_stream(WHAT)
        self.world.barrier(WHAT)

        def row() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for i in range(ROUNDS):
                put.putmem_on_stream(source + (1 + i % 2) * size, source, nbytes, peer, stream)

        def answered() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for i in range(ROUNDS):  # ROUNDS is even, and a replay begins where the last one ended
                target, signal = source + (1 + i % 2) * size, signals.data_ptr() + 8 * (i % 2)
                put.putmem_signal_on_stream(target, source, nbytes, signal, 1, heap.set, peer, stream)
                put.signal_wait_until_on_stream(signal, heap.reached, 1, stream)
                signals[i % 2].zero_()

        found = self.seconds(captured(row), ROUNDS), self.seconds(captured(answered), ROUNDS)
        self.world.barrier(WHAT)
        heap.give(at)
        return found

    def size(self, nbytes: int, attend: Callable[[], object]) -> tuple[list[str], list[str]]:
        """The rows of one size: transfers, and transfers beside attention."""
        blocks = max(min(ROUNDS, ROW // nbytes), 1)
        single, many = (self.transport.exchange(probe((0, 1), nbytes, turns=n)) for n in (1, blocks))
        put, answered = self.bare(nbytes)
        transfer = self.seconds(self.rounds(single, 1, lambda: None), ROUNDS)
        in_row = self.seconds(self.rounds(many, blocks, lambda: None), ROUNDS) / blocks
        one = self.seconds(captured(lambda: [attend() for _ in range(ROUNDS)]), ROUNDS)
        calls = max(math.ceil(transfer / one), 1)

        def compute() -> None:
            for _ in range(calls):
                attend()

        def computes() -> None:
            for _ in range(ROUNDS):
                compute()

        alone = self.seconds(captured(computes), ROUNDS)
        both = self.seconds(self.rounds(single, 1, compute), ROUNDS)
        overlap = (transfer + alone - both) / min(transfer, alone)
        for exchange in (single, many):
            exchange.close()
        speeds = [f"{t * 1e6:.1f} us, {nbytes / t / 1e9:.0f}" for t in (put, in_row, answered, transfer)]
        milliseconds = [f"{t * 1e3:.3f}" for t in (transfer, alone, both)]
        name = f"{nbytes / MIB:g} MiB" if nbytes >= MIB else f"{nbytes / 1024:g} KiB"
        return [name, *speeds], [f"{name}, {calls} call{'s' * (calls > 1)}", *milliseconds, f"{overlap:.2f}"]


def body(args: argparse.Namespace, world: World) -> None:
    if world.size != 2:
        raise InputError(f"{world.size} ranks; allowed: 2")
    device = bind(world)
    bench = Bench(args, world, device)
    q = torch.randn(1, args.tokens, args.heads, args.dim, device=device).to(torch.bfloat16)
    name, attend = list(kernels().items())[-1]
    say(world, f"{cards(world, device)}; {bench.transport.describe()}")
    rows = [bench.size(nbytes, lambda: attend(q, q, q)) for nbytes in args.sizes]
    say(world, f"\nblocks each way at once; time, GB/s of each rank; medians of {args.repeat}, of the slower rank")
    head = ("", "bare put, in a row", "exchange, in a row", "bare put, answered", "exchange, answered")
    say(world, table(head, [row for row, _ in rows]))
    say(world, f"all in graphs; in a row: up to {ROUNDS} that nobody waits for; answered: each after the peer's last")
    say(world, f"\nbeside {name}, {args.tokens} tokens, {args.heads} heads of {args.dim}, bfloat16; ms")
    say(world, table(("", "transfer", "compute", "both", "overlap"), [row for _, row in rows]))
    say(world, "overlap: (transfer + compute - both) / the shorter of them")
    finish()
    bench.cluster.close()


def sizes(text: str) -> list[int]:
    """Bytes, of a list like 64k,1,16: KiB, and MiB."""
    words = [word.strip() for word in text.split(",")]
    return [int(word[:-1]) * 1024 if word.endswith("k") else int(word) * MIB for word in words]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Blocks between two GPUs, under mpirun -n 2.")
    parser.add_argument(
        "--sizes", type=sizes, default="64k,256k,1,16,256", help="of the blocks, a list, in MiB or (64k) KiB"
    )
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8192, help="of the attention call")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--dim", type=int, default=128)
    sys.exit(run(parser, body))
