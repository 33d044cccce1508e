"""hpcdit's own variant of a denoising step, for step.py: as `hpcdit.models.wan` and the engine set it up."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import Cluster, World
from hpcdit.device import bind
from hpcdit.models.graphs import Passes
from hpcdit.models.wan_blocks import Split, compile_blocks
from hpcdit.planner.calibrate import calibrate
from hpcdit.planner.search import plan_group
from hpcdit.planner.workload import Workload
from hpcdit.spans import Spans
from hpcdit.transport import Network

HEAP_BYTES = 8 << 30


class Ours:
    """What transformers of any number of layers share: NVSHMEM starts once a process."""

    def __init__(self, args: argparse.Namespace, world: World, tokens: int) -> None:
        """args: of step.py; tokens: of the whole video."""
        self.args, self.tokens = args, tokens
        self.device, self.cluster = bind("cuda", world), Cluster(world, ranks_per_node=1)
        self.network = Network(world, self.device, "auto", "auto", HEAP_BYTES, print)
        self.transport = self.network.transport(self.cluster)

    def prepare(self, transformer: Any) -> tuple[str, Callable[..., Any], Callable[[], None]]:
        """Prepares `transformer`, which is nobody else's, for this rank.

        Returns what to call the variant, what to call in place of the transformer, and what to call in the end. The
        planner chooses the layout, from what it measures here.
        """
        of, dtype, kernels = transformer.config, torch.bfloat16, self.device.kernels
        heads, dim = of.num_attention_heads, of.attention_head_dim
        costs = calibrate(self.cluster, self.transport, self.device, dtype, dim)
        self.device.forget_peak()
        guided = self.args.guided
        weights = sum(parameter.numel() for parameter in transformer.parameters())
        work = Workload(self.tokens, heads, dim, of.num_layers, of.ffn_dim, guided=guided, itemsize=2, weights=weights)
        plan = plan_group(work, self.cluster.nodes, costs)
        shape, spans = Shape(1, self.tokens, heads, dim), Spans(None, lambda: 0.0)
        channels = transformer.proj_out.out_features
        sequence = SequenceParallel(plan.schedule(), shape, self.transport, kernels, dtype, spans, channels)
        split = Split(transformer)
        split.sequence = sequence
        compile_blocks(transformer)
        passes = Passes(transformer.forward)
        passes.begin(sequence)
        transformer.forward = passes

        def close() -> None:
            passes.begin(None)
            sequence.close()

        planned = work.weights_bytes + work.activation_bytes(self.transport.size)
        if self.transport.size == 1:  # else it is NVSHMEM's memory
            planned += work.exchanged_bytes(1, 1, stored=False)
        return f"hpcdit, {plan.layout}, {planned / 2**30:.1f} GiB planned", transformer, close

    def close(self) -> None:
        self.network.close()
