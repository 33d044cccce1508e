"""Costs in the units of conf/cluster/: microseconds, GB/s, TFLOP/s, GB."""

from collections.abc import Mapping
from typing import Any

from .costs import Costs, Link

# The keys of cluster.costs, and how many of Costs' units one of theirs is.
UNITS = {
    "inter_latency_us": 1e-6,
    "inter_gb_s": 1e9,
    "inter_spread": 1,
    "inter_overlap": 1,
    "intra_latency_us": 1e-6,
    "intra_gb_s": 1e9,
    "attention_tflops": 1e12,
    "matmul_tflops": 1e12,
    "call_us": 1e-6,
    "lanes": 1,
    "tile": 1,
    "copy_gb_s": 1e9,
    "memory_gb": 1e9,
    "intra_puts": 1,
}


def to_costs(values: Mapping[str, Any]) -> Costs:
    """Costs from the keys of `cluster.costs`, all of which must be there."""
    v = {key: values[key] * unit for key, unit in UNITS.items()}
    return Costs(
        inter=Link(v["inter_latency_us"], v["inter_gb_s"]),
        intra=Link(v["intra_latency_us"], v["intra_gb_s"]),
        attention_flops=v["attention_tflops"],
        matmul_flops=v["matmul_tflops"],
        call_s=v["call_us"],
        lanes=v["lanes"],
        tile=v["tile"],
        copy_bytes_per_s=v["copy_gb_s"],
        memory_bytes=v["memory_gb"],
        spread=v["inter_spread"],
        overlap=v["inter_overlap"],
        puts=bool(v["intra_puts"]),
    )


def to_keys(costs: Costs) -> dict[str, Any]:
    """The keys of `cluster.costs` that say the same."""
    v = {
        "inter_latency_us": costs.inter.latency_s,
        "inter_gb_s": costs.inter.bytes_per_s,
        "intra_latency_us": costs.intra.latency_s,
        "intra_gb_s": costs.intra.bytes_per_s,
        "attention_tflops": costs.attention_flops,
        "matmul_tflops": costs.matmul_flops,
        "call_us": costs.call_s,
        "lanes": costs.lanes,
        "tile": costs.tile,
        "copy_gb_s": costs.copy_bytes_per_s,
        "memory_gb": costs.memory_bytes,
        "inter_spread": costs.spread,
        "inter_overlap": costs.overlap,
        "intra_puts": costs.puts,
    }
    return {key: value if UNITS[key] == 1 else value / UNITS[key] for key, value in v.items()}


def overridden(measured: Costs, given: Mapping[str, Any]) -> Costs:
    """`measured`, but for the keys of `cluster.costs` that are given (not None)."""
    return to_costs(to_keys(measured) | {key: value for key, value in given.items() if value is not None})
