"""hpcdit's own variant of a denoising step, for step.py: as `hpcdit.models.wan` and the engine set it up."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from hpcdit.attention.executor import Spans
from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import Cluster, World
from hpcdit.device import bind
from hpcdit.models.graphs import Replayed
from hpcdit.models.wan import Split, compile_blocks
from hpcdit.planner.calibrate import calibrate
from hpcdit.planner.search import plan_group
from hpcdit.planner.workload import Workload
from hpcdit.transport import Network

HEAP_BYTES = 8 << 30


def ours(
    transformer: Any, args: argparse.Namespace, world: World, tokens: int
) -> tuple[str, Callable[..., Any], Callable[[], None]]:
    """Prepares `transformer`, which is nobody else's, for this rank.

    args: of step.py; tokens: of the whole video. Returns what to call the variant, what to call in place of the
    transformer, and what to call in the end. The planner chooses the layout, from what it measures here.
    """
    device, cluster = bind("cuda", world), Cluster(world, ranks_per_node=1)
    network = Network(world, device, "auto", "auto", HEAP_BYTES, print)
    transport, dtype = network.transport(cluster), torch.bfloat16
    heads, dim = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    costs = calibrate(cluster, transport, device, dtype, dim)
    work = Workload(
        tokens, heads, dim, transformer.config.num_layers, transformer.config.ffn_dim, guided=args.guided, itemsize=2
    )
    plan = plan_group(work, cluster.nodes, costs)
    shape, spans = Shape(1, tokens, heads, dim), Spans(None, lambda: 0.0)
    sequence = SequenceParallel(plan.schedule(), shape, transport, device.kernels, dtype, spans)
    split = Split(transformer)
    split.sequence = sequence
    compile_blocks(transformer)
    replayed = Replayed(transformer.forward)
    replayed.begin(sequence)
    transformer.forward = replayed

    def close() -> None:
        replayed.begin(None)
        sequence.close()
        network.close()

    return f"hpcdit, {plan.layout}", transformer, close
