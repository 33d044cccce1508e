"""What the configuration files of a checkpoint must say, whatever its family. No torch, no diffusers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NoReturn

from hpcdit.errors import InputError
from hpcdit.models.family import Component, Family
from hpcdit.models.weights import read_json

COUNT = "a whole number from 1 to 1000000"
CODE = "classes of diffusers and transformers; custom code is never run"


@dataclass(frozen=True)
class Config:
    """One configuration file: where it is, and what it says with the defaults filled in."""

    path: Path
    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def need(self, key: str, good: Callable[[Any], object], allowed: str) -> None:
        """Raises InputError naming file, key, value and what is allowed, unless the value is good."""
        if not good(self[key]):
            self.refuse(key, allowed)

    def refuse(self, key: str, allowed: str) -> NoReturn:
        raise InputError(f"{self.path}: {key}: {shown(self[key])} is not supported; allowed: {allowed}")


def read_config(path: Path, defaults: Mapping[str, Any]) -> Config:
    """A component's configuration. Raises InputError, also for custom code and quantized weights."""
    config = Config(path, {**defaults, **read_json(path)})
    for key in ("auto_map", "trust_remote_code", "custom_pipeline"):
        config.need(key, lambda value: not value, CODE)
    config.need("quantization_config", lambda value: value is None, "none (weights in float32, bfloat16 or float16)")
    return config


def family_of(index: Config, families: Mapping[str, Family]) -> str:
    """The name of the family whose pipeline model_index.json names. Raises InputError for what is not supported."""
    if not isinstance(index["_class_name"], str):
        index.refuse("_class_name", CODE)
    known = {pipeline: name for name, family in families.items() for pipeline in family.pipelines}
    index.need("_class_name", lambda name: name in known, ", ".join(known))
    return known[index["_class_name"]]


def check_components(index: Config, family: Family) -> dict[str, Component]:
    """The components that a checkpoint has, as model_index.json says. Raises InputError for what is not supported."""
    found = {}
    for name, component in family.components.items():
        entry = index[name]
        if not component.needed and entry in (None, [None, None]):
            continue
        library, classes = component.library, component.classes
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            index.refuse(name, f'["{library}", "{classes[0]}"]')
        # A module of the component's folder that is called like the library would be loaded in its place.
        if entry[0] not in ("diffusers", "transformers") or (index.path.parent / name / f"{entry[0]}.py").exists():
            index.refuse(name, CODE)
        index.need(name, lambda entry: entry[0] == library and entry[1] in classes, " or ".join(classes))  # noqa: B023
        found[name] = component
    return found


def check_scheduler(config: Config) -> None:
    """Raises InputError for a scheduler that draws noise in its steps."""
    why = "every rank would draw other noise"
    config.need("stochastic_sampling", lambda flag: not flag, f"false ({why})")
    config.need("algorithm_type", lambda kind: not str(kind).startswith("sde"), f"none that starts with sde ({why})")


def check_class(config: Config, component: Component) -> None:
    """Raises InputError where a model's configuration is of another class than model_index.json says."""
    config.need("_class_name", lambda name: name in (None, *component.classes), " or ".join(component.classes))


def check_counts(config: Config, *keys: str) -> None:
    """Raises InputError unless each of these is a whole number, 1 or more."""
    for key in keys:
        config.need(key, count, COUNT)


def check_tensors(
    config: Config, asked: Mapping[str, tuple[int, ...] | None], held: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises InputError unless the weights hold the tensors that the configuration asks for; None: of a layer too many.

    diffusers would fill what is missing with random numbers and only warn.
    """
    for name, size in asked.items():
        if size is None and name in held:
            raise InputError(
                f"{config.path}: num_layers: {config['num_layers']}, but the weight files hold more layers"
            )
        if held.get(name) != size and size is not None:
            found = f"has shape {list(held[name])}" if name in held else "is missing"
            raise InputError(f"{config.path.parent}: tensor {name} {found}; config.json asks for {list(size)}")


def count(value: object) -> bool:
    """Whether this is a whole number, 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000


def counts(value: object) -> bool:
    """Whether this is a list of whole numbers, 1 or more."""
    return isinstance(value, list) and value != [] and all(map(count, value))


def numbers(value: object, length: int) -> bool:
    """Whether these are finite numbers, one a channel; diffusers' own, where there are none, are sixteen."""
    if value is None:
        return length == 16
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(type(n) in (int, float) and math.isfinite(n) for n in value)
