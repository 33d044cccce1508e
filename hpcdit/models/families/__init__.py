"""The model families: each a module of this folder whose FAMILY says what it is."""

from importlib import import_module
from pkgutil import iter_modules

from ..family import Family


def families() -> dict[str, Family]:
    """All families by name. No torch, no diffusers."""
    names = sorted(module.name for module in iter_modules(__path__))
    found = {name: getattr(import_module(f"{__name__}.{name}"), "FAMILY", None) for name in names if "_" not in name}
    return {name: family for name, family in found.items() if family is not None}
