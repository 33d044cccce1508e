"""Model families: checkpoint folders, and one adapter for all families over the diffusers classes."""

from importlib import import_module
from typing import Any


def pipeline_of(family: str) -> Any:
    """diffusers' pipeline class of a family, the first where it has several; imports diffusers."""
    from .families import families

    return getattr(import_module("diffusers"), families()[family].pipelines[0])
