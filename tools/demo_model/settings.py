"""What conf/train.yaml may say, checked before anything is made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .captions import GROUNDS, SHAPES
from .data import Size

TRAINS = ("vae", "text", "image")


@dataclass
class Stage:
    trains: str = MISSING
    steps: int = MISSING
    batch: int = MISSING
    sizes: dict[str, float] = MISSING
    lr: float = MISSING
    lr_end: float = MISSING
    start: str | None = None
    encoder: bool = False
    two: float = 0.3
    warmup: int = 200
    average: float = 0.999  # decay of the running average of the weights


@dataclass
class Bank:
    clips: int = MISSING
    steps: int = MISSING


@dataclass
class Evaluation:
    one: int = MISSING
    two: int = MISSING
    images: int = MISSING
    batch: int = MISSING
    steps: int = MISSING
    guidance_scale: float = MISSING
    max_sequence_length: int = MISSING


@dataclass
class Settings:
    out: str = MISSING
    device: str = MISSING
    autocast: bool | None = None
    compile: bool | None = None
    graph: bool | None = None
    minutes: float = MISSING
    reserve_s: float = MISSING
    save_s: float = MISSING
    every: int = MISSING
    seed: int = MISSING
    sizes: dict[str, list[int]] = MISSING
    emphasis: dict[str, float] = field(default_factory=dict)
    vae: dict[str, Any] = MISSING
    transformer: dict[str, Any] = MISSING
    text_encoder: dict[str, Any] = MISSING
    bank: Bank = field(default_factory=Bank)
    evaluation: Evaluation = field(default_factory=Evaluation)
    stages: dict[str, Stage] = MISSING

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def usual(self) -> Size:
        """What batches are counted in, and evaluation renders."""
        return self.size("usual")

    def size(self, name: str) -> Size:
        return Size(*self.sizes[name])

    def last(self, trains: str) -> str:
        """The stage whose result is the model of a kind."""
        return [name for name, stage in self.stages.items() if stage.trains == trains][-1]

    def on(self) -> torch.device:
        cuda = torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def settings(config: DictConfig | dict[str, Any]) -> Settings:
    """The checked settings. Raises ValueError of one line that names the key and says what is allowed."""
    plain = OmegaConf.create(config) if isinstance(config, dict) else config
    values = OmegaConf.to_container(plain, resolve=True)
    assert isinstance(values, dict)
    values.pop("hydra", None)
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), values))
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from error
    assert isinstance(made, Settings)
    _check(made)
    return made


def _check(made: Settings) -> None:
    def need(key: str, good: bool, allowed: str) -> None:
        if not good:
            raise ValueError(f"{key}: allowed: {allowed}")

    need("device", made.device in ("auto", "cpu", "cuda"), "auto, cpu, cuda")
    need("minutes", 60 * made.minutes > made.reserve_s >= 0, "more than reserve_s, which is 0 or more")
    for key in ("every", "save_s", "bank.clips", "bank.steps"):
        need(key, OmegaConf.select(OmegaConf.structured(made), key) > 0, "more than 0")
    need("sizes", "usual" in made.sizes, "usual, which the evaluation renders, and others")
    for name, size in made.sizes.items():
        good = len(size) == 3 and size[0] % 4 == 1 and size[0] > 0 and all(n > 0 and n % 16 == 0 for n in size[1:])
        need(f"sizes.{name}", good, "[4 n + 1 frames, height, width], both multiples of 16")
    for word, weight in made.emphasis.items():
        need(f"emphasis.{word}", word in (*SHAPES, *GROUNDS) and weight > 0, "a shape or ground: more than 0")
    before: list[str] = []
    for name, stage in made.stages.items():
        key = f"stages.{name}"
        need(f"{key}.trains", stage.trains in TRAINS, ", ".join(TRAINS))
        need(f"{key}.start", stage.start is None or stage.start in before, "a stage before it")
        need(f"{key}.start", stage.trains != "image" or stage.start is not None, "a stage that trains text or image")
        need(f"{key}.sizes", bool(stage.sizes) and set(stage.sizes) <= set(made.sizes), ", ".join(made.sizes))
        need(f"{key}.two", 0 <= stage.two <= 1, "0 to 1")
        need(f"{key}.steps", min(stage.steps, stage.batch, stage.warmup) > 0, "steps, batch, warmup: more than 0")
        vae = stage.trains == "vae" or any(made.stages[other].trains == "vae" for other in before)
        need(f"{key}.trains", vae, "vae, as no stage before it trains one")
        before.append(name)
