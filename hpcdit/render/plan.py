"""mode=plan: what a batch would be rendered with, on any cluster, without MPI and without a checkpoint."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from ..config import Config, Parallel, Sampling, demo_model, planned_costs, resolve_sampling
from ..errors import InputError
from ..models.loading import ModelShape, inspect, shape
from ..planner.costs import Costs
from ..planner.groups import Fixed
from ..planner.picture import lanes, table
from ..planner.plans import Plan
from ..planner.presets import to_costs
from ..planner.price import timeline
from ..planner.reasons import seconds, size
from ..planner.search import plan_batch
from ..planner.workload import Workload
from .manifest import fits, read

FLOAT32_TFLOPS = 100  # more than any GPU makes of products in float32
NOT_FLOAT32 = "The costs are of 16-bit numbers, float32 takes far longer: model.dtype=bfloat16, or your cluster.costs."
ENCODERS_APART = "The text encoders stay on the host, and are brought in parts while they encode: else nothing fits."


def itemsize(dtype: str) -> int:
    """Bytes of one number of a torch type's name."""
    return 4 if dtype == "float32" else 2


def fixed(parallel: Parallel) -> Fixed:
    """What the user decided about the layout."""
    p = parallel
    return Fixed(p.method, p.replicas, p.cfg, p.ulysses, p.ring, p.pieces, p.groups)


def shelves(layers: str, nodes: Sequence[int], cuda: bool) -> int:
    """How many ranks hold the layers together, where `model.layers` says so and ranks lie on `nodes`; 0: a host does.

    cuda: the host's memory is not that of the devices.
    """
    if layers == "resident":
        return 1
    return 0 if layers == "host" and cuda else min(Counter(nodes).values())


def workload(
    model: ModelShape, sampling: Sequence[Sampling], dtype: str, batch: int | None = None, shelves: int = 1
) -> Workload:
    """The videos of a batch as one workload: all as large as the largest, and guided if one is."""

    def length(s: Sampling) -> int:
        return model.length(s.num_frames, s.height, s.width, s.max_sequence_length)

    # Of a hundred thousand videos few differ in more than their seeds.
    sizes_of = {(s.num_frames, s.height, s.width, s.max_sequence_length, s.steps): s for s in sampling}
    largest = max(sizes_of.values(), key=lambda s: (length(s), s.steps))
    sizes = largest.num_frames, largest.height, largest.width
    return Workload(
        tokens=length(largest),
        heads=model.heads,
        head_dim=model.head_dim,
        layers=model.layers,
        ffn_dim=model.ffn_dim or 4 * model.heads * model.head_dim,
        steps=largest.steps,
        videos=len(sampling),
        guided=any(model.guided(s.guidance_scale) for s in sampling),
        itemsize=itemsize(dtype),
        text_tokens=0 if model.joint else largest.max_sequence_length,
        latents=prod(model.latents(*sizes)),
        out_channels=model.token_channels,
        batch=batch or 1,
        weights=model.weights,
        float_weights=model.vae_weights,
        layer_weights=model.layer_weights,
        largest_layer=model.largest_layer,
        shelves=shelves,
        encoder_weights=model.encoder_weights,
    )


def plan_fitting(
    work: Workload, nodes: Sequence[int], costs: Costs, fixed: Fixed, devices: bool
) -> tuple[Plan, Workload]:
    """As `plan_batch`, and what it was planned for: text encoders stay on the host where nothing fits with them.

    devices: the host's memory is not that of the devices.
    """
    try:
        return plan_batch(work, nodes, costs, fixed), work
    except InputError:
        lean = replace(work, encoders_apart=devices)
        if lean.weights_bytes == work.weights_bytes:
            raise
        return plan_batch(lean, nodes, costs, fixed), lean


def family_of(config: Config) -> str:
    """The family whose defaults count where a checkpoint is named; else the configuration has its own."""
    return inspect(Path(config.model.path)).family if config.model.path else ""


def model_shape(config: Config) -> ModelShape:
    """The shape that `mode=plan` plans for: of the checkpoint, or of the configuration where that has one."""
    if config.model.path is None and config.model.shape is not None:
        values = dict(config.model.shape)
        return ModelShape(**{**values, "patch": tuple(values["patch"]), "multiple": 16})
    return shape(inspect(Path(config.model.path) if config.model.path else demo_model()))


def report(config: Config) -> str:
    """The chosen plan, what else was thought of, and a picture of one attention layer."""
    model, defaults = model_shape(config), resolve_sampling(config, family_of(config))
    sampling = [defaults]
    if config.prompts:
        jobs = read(Path(config.prompts), defaults)
        fits(jobs, defaults, model)
        sampling = [job.sampling for job in jobs]
    sides = defaults.height, defaults.width
    try:
        model.legal(defaults.num_frames, *sides, scheduler=defaults.scheduler, steps=defaults.steps)
    except InputError as error:
        raise InputError(f"sampling.{error}") from None
    sampling = sampling[: config.plan.videos]
    keys, whose = planned_costs(config)
    costs = to_costs(keys)
    count, per_node = config.cluster.nodes or 1, config.cluster.ranks_per_node or 1
    nodes = [rank // per_node for rank in range(count * per_node)]
    devices = config.model.device != "cpu"
    held = shelves(config.model.layers, nodes, devices)
    work = workload(model, sampling, config.model.dtype, config.parallel.batch, held)
    work = replace(work, videos=config.plan.videos or work.videos)
    best, work = plan_fitting(work, nodes, costs, fixed(config.parallel), devices)
    head = _head(config, work, count, per_node, whose)
    if config.model.dtype == "float32" and max(keys["attention_tflops"], keys["matmul_tflops"]) > FLOAT32_TFLOPS:
        head += f"{NOT_FLOAT32}\n"
    return "\n".join([head, *_chosen(best, work, costs, nodes)])


def _head(config: Config, work: Workload, nodes: int, per_node: int, whose: str) -> str:
    videos = f"{work.videos} video{'s' * (work.videos > 1)} of {work.tokens} tokens, {work.steps} steps"
    return (
        f"{config.model.name}, {config.model.dtype}: {videos}, {'guided' if work.guided else 'not guided'};"
        f" {work.heads} heads of {work.head_dim}, {work.layers} layers\n"
        f"on {nodes} node{'s' * (nodes > 1)} x {per_node} rank{'s' * (per_node > 1)}; costs {whose}\n"
    )


def _chosen(best: Plan, work: Workload, costs: Costs, nodes: Sequence[int]) -> list[str]:
    group, layer = timeline(best, work, costs, nodes)
    moved = [f"{size(best.inter_bytes)} cross nodes"] * (best.inter_bytes > 0)
    moved += [f"{size(best.intra_bytes)} move inside them"] * (best.intra_bytes > 0)
    apart = [ENCODERS_APART] * work.encoders_apart
    idle = [f"For {best.idle:.0%} of their time the ranks have no video."] * (best.idle > 0)
    return [
        table(best),
        "",
        f"Chosen: of each step {seconds(best.exposed_s)} are not hidden behind computation"
        f" ({', '.join(moved) or 'nothing is sent'}).",
        *idle,
        *apart,
        f"One attention layer in {'each group' if best.replicas * best.cfg > 1 else 'the group'} of {group.size}"
        f" rank{'s' * (group.size > 1)}, {layer.exposed_s / layer.seconds:.0%} of it without attention:",
        lanes(layer.spans, layer.seconds, group.nodes),
    ]
