"""Another scheduler than a checkpoint's own, for the model that the checkpoint holds."""

from typing import Any

import diffusers

FLOW = "FlowMatchEulerDiscreteScheduler"


def chosen(name: str, own: Any) -> Any:
    """The scheduler of class `name` of diffusers, with the settings of the checkpoint's own.

    As diffusers' `from_config` makes it, which drops what the other class calls by another name: how the noise levels
    of flow matching are shifted, and that the model predicts a flow. These are handed on, as the documentation of
    diffusers' pipelines does it.
    """
    from_flow, to_flow = type(own).__name__ == FLOW, name == FLOW
    told: dict[str, Any] = {}
    if from_flow and not to_flow:
        told = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": own.config.shift}
    elif to_flow and not from_flow:
        told = {"shift": own.config.flow_shift}
    return getattr(diffusers, name).from_config(own.config, **told)
