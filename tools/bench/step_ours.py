"""hpcdit's own variants of a denoising step, for other programs: as `hpcdit.models` and the engine set them up."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import Cluster, World
from hpcdit.device import Device
from hpcdit.models.base import Encoding
from hpcdit.models.families import families
from hpcdit.models.graphs import Passes
from hpcdit.models.guidance import Guidance
from hpcdit.models.layers import Layers
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

HEAP_BYTES, DTYPE = 8 << 30, torch.bfloat16


@dataclass(frozen=True)
class Prepared:
    """planned_bytes: of torch's memory; predicted_s: of a step of all layers; anew: forgets what graphs hold;
    close: to be called in the end, by all ranks together."""

    plan: Plan
    planned_bytes: int
    predicted_s: float
    anew: Callable[[], None]
    close: Callable[[], None]


class Ours:
    """What transformers of any number of layers share: NVSHMEM starts once a process."""

    def __init__(
        self, world: World, device: Device, ranks_per_node: int | None = 1, dtype: torch.dtype = DTYPE,
        heap_bytes: int = HEAP_BYTES,
    ) -> None:  # fmt: skip
        self.world, self.device, self.dtype = world, device, dtype
        self.cluster = Cluster(world, ranks_per_node)
        self.network = Network(world, device, "auto", "auto", heap_bytes, print)
        self._costs = dict[int, Costs]()

    def costs(self, head_dim: int) -> Costs:
        if head_dim not in self._costs:
            transport = self.network.transport(self.cluster)
            self._costs[head_dim] = calibrate(self.cluster, transport, self.device, self.dtype, head_dim)
        return self._costs[head_dim]

    def symmetric_bytes(self) -> int:
        """Of NVSHMEM's memory, what is in use."""
        if not self.network.peak_bytes():
            return 0
        from hpcdit.transport.heap import current

        return current().nbytes - current().free()

    def prepare(
        self, family: str, transformer: Any, work: Workload, like: torch.Size, negative: Encoding | None, fixed: Fixed,
        whole: int, layers: str = "resident", graph: bool = True,
    ) -> Prepared:  # fmt: skip
        """Prepares `transformer`, which is nobody else's, for this rank.

        work: of what there is of it; whole: layers of the model of which these are some; like: the shape of the
        latents; negative: of a guided step; fixed: of the layout, all else the planner chooses from what it measures
        here; layers: as model.layers; graph: whether passes become graphs where the family's can.
        """
        described = families()[family]
        plan = plan_batch(replace(work, layers=whole), self.cluster.nodes, self.costs(work.head_dim), fixed)
        self.device.forget_peak()
        trace = Trace(self.world.rank, 0, 0.0)
        groups = Groups.cut(self.world, self.cluster, plan.replicas, plan.cfg)
        transport, halves = self.network.transport(groups.sequence), groups.halves(self.network, trace)
        shape, spans = Shape(1, work.tokens, work.heads, work.head_dim), Spans(None, trace.now)
        split = Split()
        described.split(transformer, split)
        if layers != "resident":
            self._shelve(transformer, described.layer_lists(), layers)
        sequence = split.sequence = SequenceParallel(
            plan.schedule(), shape, transport, self.device.kernels, self.dtype, spans, work.out_channels
        )
        if self.device.cuda:
            described.compile(transformer)
        can = described.graphs(self.device.kernels.attend_first(self.dtype, work.head_dim) is not None)
        graph = graph and self.device.cuda and transport.streams and can and layers == "resident"
        passes = Passes(transformer.forward, graph)
        passes.begin(sequence)
        transformer.forward = passes
        guidance = Guidance(transformer, described.asked)
        guidance.begin(halves, negative, like)

        def anew() -> None:
            passes.begin(None)
            passes.begin(sequence)

        def close() -> None:
            passes.begin(None)
            sequence.close()
            if halves:
                halves.close()
            groups.close()

        planned = work.weights_bytes + work.activation_bytes(transport.size)
        if transport.size == 1:  # else it is NVSHMEM's memory
            planned += work.exchanged_bytes(1, 1, stored=False)
        return Prepared(plan, planned, plan.step_s, anew, close)

    def prepare_wan(
        self, transformer: Any, tokens: int, noise: Tensor, negative: Tensor | None, replicas: int, cfg: int | None,
        whole: int,
    ) -> Prepared:  # fmt: skip
        """As `prepare`, of a Wan transformer. tokens: of the whole video; negative: the text of the second pass of a
        guided step; replicas: groups of ranks that render a video each; cfg: None: the planner chooses."""
        of, guided = transformer.config, negative is not None
        work = Workload(
            tokens, of.num_attention_heads, of.attention_head_dim, of.num_layers, of.ffn_dim, videos=replicas,
            guided=guided, itemsize=self.dtype.itemsize, latents=noise.numel(),
            out_channels=transformer.proj_out.out_features,
            weights=sum(parameter.numel() for parameter in transformer.parameters()),
        )  # fmt: skip
        encoding = None if negative is None else {"prompt_embeds": negative}
        return self.prepare("wan", transformer, work, noise.shape, encoding, Fixed(replicas=replicas, cfg=cfg), whole)

    def _shelve(self, transformer: Any, lists: list[str], place: str) -> None:
        """As `render.weights.shelve`, of a transformer without a checkpoint. Collective over the world."""
        layers = Layers([[block for name in lists for block in transformer.get_submodule(name)]])
        shelf = self.network.shelf(self.cluster, layers.sizes, place)
        layers.put(shelf)
        shelf.filled()
        layers.start(shelf, self.device.torch)

    def close(self) -> None:
        self.network.close()
