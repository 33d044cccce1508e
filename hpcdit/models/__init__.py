"""Model families: checkpoint folders, and one adapter for all families over the diffusers classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import ModelFolder


def pipeline_of(folder: "ModelFolder") -> Any:
    """diffusers' pipeline class of a checkpoint; imports diffusers."""
    return getattr(import_module("diffusers"), folder.pipeline)
