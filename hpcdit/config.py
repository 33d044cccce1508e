"""The configuration as dataclasses, read from the command line, and where the packaged files lie.

The defaults, group by group, are the files of conf/; keys.py says what each key takes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpcdit.command_line import compose, unknown_key
from hpcdit.errors import InputError
from hpcdit.keys import FREE_TEXT, RULES, SAMPLING_RULES


@dataclass(frozen=True)
class Sampling:
    """How one video is made: sizes in pixels, fps in frames a second, max_sequence_length in tokens; scheduler: its
    class, "" for the checkpoint's own."""

    num_frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int
    fps: int
    max_sequence_length: int
    scheduler: str = ""


@dataclass(frozen=True)
class Model:
    """`path` None: the demo model; `layers`: where they lie; `lora`: file and scale; `sampling`: its own defaults;
    `shape`: the fields of ModelShape."""

    name: str
    path: str | None
    dtype: str
    device: str
    compile: bool
    graph: bool
    layers: str
    lora: list[Any] | None
    sampling: dict[str, Any]
    shape: dict[str, Any] | None


@dataclass(frozen=True)
class Parallel:
    """Degrees; None: the planner chooses."""

    method: str
    replicas: int | None
    cfg: int | None
    batch: int | None
    pipeline: int | None
    ulysses: int | None
    ring: int | None
    pieces: int | None
    groups: int | None
    vae: str


@dataclass(frozen=True)
class Transport:
    """How ranks reach each other; `timeout_s` in seconds."""

    kind: str
    inter: str
    timeout_s: float


@dataclass(frozen=True)
class ClusterSpec:
    """The cluster as it was told; None: as found, or measured. `costs`: in users' units, see planner.presets."""

    nodes: int | None
    ranks_per_node: int | None
    costs: dict[str, Any]


@dataclass(frozen=True)
class PlanSpec:
    """What mode=plan plans for; `videos` None: as many as the prompts file has."""

    videos: int | None


@dataclass(frozen=True)
class QueueSpec:
    """Which videos are this run's. `shared`: other runs write into the same folder; `share`: "i/n"; `stale_s`: seconds
    after which a claim that was not renewed is void."""

    shared: bool
    share: str | None
    stale_s: float

    @property
    def claims(self) -> bool:
        """Whether each video has to be claimed."""
        return self.shared or self.share is not None

    def mine(self, index: int) -> bool:
        """Whether the video at place `index` of the prompts file is in this run's share."""
        number, _, count = (self.share or "0/1").partition("/")
        return index % int(count) == int(number) % int(count)


@dataclass(frozen=True)
class Output:
    """What is written, and where."""

    dir: str
    compression: str
    video: str


@dataclass(frozen=True)
class Failures:
    """`max`: so many failed videos end the run; None: none do."""

    max: int | None


@dataclass(frozen=True)
class Checkpoint:
    """`seconds` between two of a video; None: there are none."""

    seconds: float | None


@dataclass(frozen=True)
class Trace:
    """0: nothing, 1: stages and steps, 2: also every transfer and attention call."""

    level: int


TWIN = "demo-image"  # the demo model that starts from a picture
DEFAULT_CLUSTER = "4x8-h100"  # whose costs mode=plan takes where none are given

PARTS = {
    "model": Model,
    "parallel": Parallel,
    "transport": Transport,
    "cluster": ClusterSpec,
    "plan": PlanSpec,
    "queue": QueueSpec,
    "output": Output,
    "failures": Failures,
    "checkpoint": Checkpoint,
    "trace": Trace,
}


@dataclass(frozen=True)
class Config:
    """Everything that the command line says. `sampling`: only keys that were set, see resolve_sampling."""

    mode: str
    prompts: str | None
    resume: bool
    grace_s: float
    model: Model
    sampling: dict[str, Any]
    parallel: Parallel
    transport: Transport
    cluster: ClusterSpec
    plan: PlanSpec
    queue: QueueSpec
    output: Output
    failures: Failures
    checkpoint: Checkpoint
    trace: Trace

    def to_dict(self) -> dict[str, Any]:
        """Nested, of JSON's types; from_dict reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration that to_dict wrote."""
        return cls(**{key: PARTS[key](**value) if key in PARTS else value for key, value in values.items()})

    def describe(self) -> dict[str, Any]:
        """As on the command line, {"parallel.method": "auto", ...}: what is stored with each video."""
        return _flat(self.to_dict())


def load(argv: Sequence[str]) -> Config | None:
    """The configuration that the arguments ask for; None when they ask for help or the like (it is printed).

    Makes no folder and no file. Raises InputError, one line, for anything wrong.
    """
    choices = {key: rule.choices for key, rule in RULES.items()}
    composed = compose(argv, conf_dir(), choices, FREE_TEXT, _adopt_folder)
    if composed is None:
        return None
    config = _checked(composed.values)
    if config.model.path is None and composed.groups.get("model", "demo") != "demo":
        if config.mode == "render":
            raise InputError(f"model.path: must name a model folder when model={composed.groups['model']}")
        if config.model.shape is None:
            raise InputError("model.path: must name a model folder, or model.shape.* give the model's shape")
    return config


def resolve_sampling(config: Config, family: str) -> Sampling:
    """The sampling of a run: what was set, else the model's own defaults, else those of its family.

    family: as models.loading.inspect names it ("wan"); its defaults are those of conf/model/<family>.yaml.
    Raises InputError where nothing says what a key is.
    """
    file = conf_dir() / "model" / f"{family}.yaml"
    of_family: dict[str, Any] = dict(OmegaConf.load(file).sampling) if file.is_file() else {}
    values = {"scheduler": "", **of_family, **config.model.sampling, **config.sampling}
    missing = next((key for key in SAMPLING_RULES if key not in values), None)
    if missing is not None:
        whose = f"{family} models have" if family else "the model has"
        raise InputError(f"sampling.{missing}: must be given, {whose} no default for it")
    return Sampling(**values)


def planned_costs(config: Config) -> tuple[dict[str, Any], str]:
    """What the cluster costs, in users' units, where nothing can be measured; and in words, whose figures they are."""
    default = dict(OmegaConf.load(conf_dir() / "cluster" / f"{DEFAULT_CLUSTER}.yaml").costs)
    given = {key: value for key, value in config.cluster.costs.items() if value is not None}
    if not given:
        return default, f"the figures of cluster={DEFAULT_CLUSTER}, since none are given"
    missing = [key for key in default if key not in given]
    if missing:
        return {**default, **given}, f"as given, the rest ({', '.join(missing)}) as of cluster={DEFAULT_CLUSTER}"
    return given, "as given"


def conf_dir() -> Path:
    """The folder of the configuration files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def demo_prompts() -> Path:
    """The captions that are rendered when no prompts file is named."""
    return conf_dir() / "demo_prompts.txt"


def demo_model(name: str = "demo") -> Path:
    """A model folder that comes with the package: the one that is used when none is named, or its twin."""
    return Path(__file__).resolve().parent / "models" / name


def _adopt_folder(config: DictConfig, groups: Mapping[str, str]) -> None:
    """A model folder that was named lends the run its name, and the demo's defaults are not meant for it."""
    path, name = OmegaConf.select(config, "model.path"), OmegaConf.select(config, "model.name")
    folder = path if isinstance(path, str) and path.strip() else None
    group = groups.get("model", "demo")  # none: ~model, or a configuration file of the user's
    if path is None and group == TWIN:
        OmegaConf.update(config, "model.path", str(demo_model(TWIN)))
    if folder and group in ("demo", TWIN):
        OmegaConf.update(config, "model.sampling", None, merge=False)
        name = None if name == group else name
    if name is None:
        base = os.path.basename(os.path.abspath(folder)) if folder else group
        plain = "".join(c if c.isalnum() or c in "._+-" else "-" for c in base)[:200].lstrip(".")
        OmegaConf.update(config, "model.name", plain or "model", force_add=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _checked(values: Mapping[str, Any]) -> Config:
    """Every key against its rule; a key that a configuration file of the user's leaves out counts as null."""
    flat = _flat(values)
    for part in ("model.sampling", "model.shape", "cluster.costs"):  # may be null as a whole
        if flat.get(part, "") is None:
            del flat[part]
    unknown = next((key for key in flat if key not in RULES), None)
    if unknown is not None:
        raise unknown_key(unknown, RULES)
    shapeless = not any(key.startswith("model.shape.") for key in flat)
    nested: dict[str, Any] = {}
    for key, rule in RULES.items():
        if not (shapeless and key.startswith("model.shape.")):
            *groups, leaf = key.split(".")
            place = nested
            for group in groups:
                place = place.setdefault(group, {})
            place[leaf] = rule.check(key, flat.get(key))
    nested["model"].setdefault("shape", None)
    for parent in (nested, nested["model"]):
        parent["sampling"] = {key: value for key, value in parent["sampling"].items() if value is not None}
    return Config.from_dict(nested)
