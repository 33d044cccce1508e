"""Model families: checkpoint folders, and one adapter a family over the diffusers classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Adapter


def adapter_of(family: str) -> "type[Adapter]":
    """The adapter of a family, which is the one Adapter of the module of that name; imports diffusers."""
    return import_module(f"{__name__}.{family}").ADAPTER


def pipeline_of(family: str) -> Any:
    """diffusers' pipeline class of a family; imports diffusers."""
    from . import configs

    return getattr(import_module("diffusers"), next(name for name, own in configs.FAMILIES.items() if own == family))
