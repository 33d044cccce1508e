"""Model families: checkpoint folders, and one adapter a family over the diffusers classes."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Adapter


def adapter_of(family: str) -> "type[Adapter]":
    """The adapter of a family, which is the one Adapter of the module of that name; imports diffusers."""
    return import_module(f"{__name__}.{family}").ADAPTER
