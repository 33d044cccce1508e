"""hpcdit's own variants of a denoising step, for step.py: as `hpcdit.models.wan` and the engine set them up."""

import argparse
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import Cluster, World
from hpcdit.device import bind
from hpcdit.models.graphs import Passes
from hpcdit.models.wan import Guidance
from hpcdit.models.wan_blocks import Split, compile_blocks
from hpcdit.output.trace import Trace
from hpcdit.planner.calibrate import calibrate
from hpcdit.planner.costs import Costs
from hpcdit.planner.groups import Fixed
from hpcdit.planner.search import plan_batch
from hpcdit.planner.workload import Workload
from hpcdit.render.groups import Groups
from hpcdit.spans import Spans
from hpcdit.transport import Network

HEAP_BYTES, HEAD_DIM, DTYPE = 8 << 30, 128, torch.bfloat16


class Ours:
    """What transformers of any number of layers share: NVSHMEM starts once a process."""

    def __init__(self, args: argparse.Namespace, world: World, tokens: int, noise: Tensor, negative: Tensor) -> None:
        """args: of step.py; tokens: of the whole video; negative: the text of the second pass of a guided step."""
        self.args, self.world, self.tokens, self.noise, self.negative = args, world, tokens, noise, negative
        self.device, self.cluster = bind("cuda", world), Cluster(world, ranks_per_node=1)
        self.network = Network(world, self.device, "auto", "auto", HEAP_BYTES, print)

    @cached_property
    def costs(self) -> Costs:
        return calibrate(self.cluster, self.network.transport(self.cluster), self.device, DTYPE, HEAD_DIM)

    def prepare(
        self, transformer: Any, replicas: int, cfg: int | None
    ) -> tuple[str, Callable[..., Any], Callable[[], None]]:
        """Prepares `transformer`, which is nobody else's, for this rank.

        replicas: groups of ranks that render a video each; cfg: None: the planner chooses, as it does the layout, from
        what it measures here. Returns what the planner chose and has planned, what to call in place of the
        transformer, and what to call in the end.
        """
        of, guided = transformer.config, self.args.guided
        heads, channels = of.num_attention_heads, transformer.proj_out.out_features
        weights = sum(parameter.numel() for parameter in transformer.parameters())
        work = Workload(
            self.tokens, heads, HEAD_DIM, of.num_layers, of.ffn_dim, videos=replicas, guided=guided, itemsize=2,
            latents=self.noise.numel(), out_channels=channels, weights=weights,
        )  # fmt: skip
        plan = plan_batch(work, self.cluster.nodes, self.costs, Fixed(replicas=replicas, cfg=cfg))
        self.device.forget_peak()
        trace = Trace(self.world.rank, 0, 0.0)
        groups = Groups.cut(self.world, self.cluster, plan.replicas, plan.cfg)
        transport, halves = self.network.transport(groups.sequence), groups.halves(self.network, trace)
        shape, spans = Shape(1, self.tokens, heads, HEAD_DIM), Spans(None, trace.now)
        sequence = SequenceParallel(
            plan.schedule(), shape, transport, self.device.kernels, DTYPE, spans, channels
        )  # fmt: skip
        split = Split(transformer)
        split.sequence = sequence
        compile_blocks(transformer)
        passes = Passes(transformer.forward)
        passes.begin(sequence)
        transformer.forward = passes
        Guidance(transformer).begin(halves, self.negative if guided else None)

        def close() -> None:
            passes.begin(None)
            sequence.close()
            if halves:
                halves.close()
            groups.close()

        planned = work.weights_bytes + work.activation_bytes(transport.size)
        if transport.size == 1:  # else it is NVSHMEM's memory
            planned += work.exchanged_bytes(1, 1, stored=False)
        return f"{plan}, {planned / 2**30:.1f} GiB planned", transformer, close

    def close(self) -> None:
        self.network.close()
