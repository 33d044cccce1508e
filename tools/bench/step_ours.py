"""hpcdit's own variants of a denoising step, for other programs: as `hpcdit.models` and the engine set them up."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import Cluster, World
from hpcdit.device import Device
from hpcdit.models.families.wan_blocks import compile_blocks, share
from hpcdit.models.graphs import Passes
from hpcdit.models.guidance import Guidance
from hpcdit.models.split import Split
from hpcdit.output.trace import Trace
from hpcdit.planner.calibrate import calibrate
from hpcdit.planner.costs import Costs
from hpcdit.planner.groups import Fixed
from hpcdit.planner.plans import Plan
from hpcdit.planner.search import plan_batch
from hpcdit.planner.workload import Workload
from hpcdit.render.groups import Groups
from hpcdit.spans import Spans
from hpcdit.transport import Network

HEAP_BYTES, HEAD_DIM, DTYPE = 8 << 30, 128, torch.bfloat16


@dataclass(frozen=True)
class Prepared:
    """planned_bytes: of torch's memory; predicted_s: of a step of `whole` layers; close: to be called in the end."""

    plan: Plan
    planned_bytes: int
    predicted_s: float
    close: Callable[[], None]


class Ours:
    """What transformers of any number of layers share: NVSHMEM starts once a process."""

    def __init__(self, world: World, device: Device, ranks_per_node: int | None = 1) -> None:
        self.world, self.device, self.cluster = world, device, Cluster(world, ranks_per_node)
        self.network = Network(world, device, "auto", "auto", HEAP_BYTES, print)

    @cached_property
    def costs(self) -> Costs:
        return calibrate(self.cluster, self.network.transport(self.cluster), self.device, DTYPE, HEAD_DIM)

    def prepare(
        self, transformer: Any, tokens: int, noise: Tensor, negative: Tensor | None, replicas: int, cfg: int | None,
        whole: int,
    ) -> Prepared:  # fmt: skip
        """Prepares `transformer`, which is nobody else's, for this rank.

        tokens: of the whole video; negative: the text of the second pass of a guided step; replicas: groups of ranks
        that render a video each; cfg: None: the planner chooses, as it does the layout, from what it measures here;
        whole: layers of the model of which these are some.
        """
        of, guided = transformer.config, negative is not None
        heads, channels = of.num_attention_heads, transformer.proj_out.out_features
        weights = sum(parameter.numel() for parameter in transformer.parameters())
        work = Workload(
            tokens, heads, HEAD_DIM, of.num_layers, of.ffn_dim, videos=replicas, guided=guided, itemsize=2,
            latents=noise.numel(), out_channels=channels, weights=weights,
        )  # fmt: skip
        plan = plan_batch(
            replace(work, layers=whole), self.cluster.nodes, self.costs, Fixed(replicas=replicas, cfg=cfg)
        )
        self.device.forget_peak()
        trace = Trace(self.world.rank, 0, 0.0)
        groups = Groups.cut(self.world, self.cluster, plan.replicas, plan.cfg)
        transport, halves = self.network.transport(groups.sequence), groups.halves(self.network, trace)
        shape, spans = Shape(1, tokens, heads, HEAD_DIM), Spans(None, trace.now)
        sequence = SequenceParallel(
            plan.schedule(), shape, transport, self.device.kernels, DTYPE, spans, channels
        )  # fmt: skip
        split = Split()
        share(transformer, split)
        split.sequence = sequence
        if self.device.cuda:
            compile_blocks(transformer)
        passes = Passes(transformer.forward, graph=self.device.cuda)
        passes.begin(sequence)
        transformer.forward = passes
        guidance = Guidance(transformer, {"negative": "encoder_hidden_states"})
        guidance.begin(halves, None if negative is None else {"negative": negative}, noise.shape)

        def close() -> None:
            passes.begin(None)
            sequence.close()
            if halves:
                halves.close()
            groups.close()

        planned = work.weights_bytes + work.activation_bytes(transport.size)
        if transport.size == 1:  # else it is NVSHMEM's memory
            planned += work.exchanged_bytes(1, 1, stored=False)
        return Prepared(plan, planned, plan.step_s, close)

    def close(self) -> None:
        self.network.close()
