"""Trains the demo model, a call at a time; the same command goes on until it says that all stages are done.

usage: python -m tools.demo_model.train [minutes=9] [out=outputs/demo_model] [KEY=VALUE ...]     (conf/train.yaml)
       torchrun --nproc-per-node 2 -m tools.demo_model.train ...       on so many GPUs, for the same model in less time
"""

import csv
import sys
import time

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from .evaluate import figures
from .ranks import Ranks
from .settings import Settings, settings
from .stages import Work, work
from .training import Training, steps_done


class Curve:
    """curve.csv: a line for each figure that was taken, (stage, step, seconds of the stage, name, value).

    The first of the ranks writes it.
    """

    def __init__(self, made: Settings, ranks: Ranks) -> None:
        self._path, self._writes = made.folder / "curve.csv", ranks.rank == 0
        if self._writes and not self._path.exists():
            self._path.write_text("stage,step,seconds,name,value\n")

    def add(self, name: str, training: Training, values: dict[str, float]) -> None:
        if not self._writes:
            return
        with self._path.open("a", newline="") as file:
            for key, value in values.items():
                row = [name, training.steps, f"{training.seconds:.1f}", key, f"{value:.6g}"]
                csv.writer(file, lineterminator="\n").writerow(row)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"{name}: step {training.steps} of {training.stage.steps}, {training.seconds:.0f} s: {shown}", flush=True)


def train(made: Settings, until: float, ranks: Ranks) -> bool:
    """Goes on with the first stage that is not done, and with the next, until all are (True) or it is time.

    until: when it has to be over, on `time.monotonic`'s clock. Raises ValueError where `out` holds another model.
    """
    curve = Curve(made, ranks)
    for name, stage in made.stages.items():
        path = made.folder / f"{name}.safetensors"
        if steps_done(path) >= stage.steps:
            continue
        clock = Clock(until - made.reserve_s, made.save_s, ranks, made.on())
        if clock.over:
            return False
        job = work(made, name, ranks)
        training = Training(job.modules, stage, job.device, ranks)
        if path.exists():
            training.load(path)
        _steps(made, job, training, curve, clock)
        if ranks.rank == 0:
            training.save(path)
            curve.add(name, training, figures(made, name, training))
        ranks.first(0, job.device)  # the others read the file when it is there
        if training.steps < stage.steps:
            return False
    return True


class Clock:
    """The first rank's, by which all decide. now: as of the last look."""

    def __init__(self, until: float, save_s: float, ranks: Ranks, device: torch.device) -> None:
        self._until, self._save_s, self._ranks, self._device = until, save_s, ranks, device
        self.now = self._saved = ranks.first(time.monotonic(), device)

    def look(self) -> float:
        """Seconds since the last look."""
        before, self.now = self.now, self._ranks.first(time.monotonic(), self._device)
        return self.now - before

    @property
    def over(self) -> bool:
        return self.now > self._until

    def save_due(self) -> bool:
        """Whether it is time for a checkpoint, which is then taken as made."""
        due = self.now - self._saved > self._save_s
        if due:
            self._saved = self.now
        return due


def _steps(made: Settings, job: Work, training: Training, curve: Curve, clock: Clock) -> None:
    """Steps of a stage until it is done or it is time, with a line of the curve and a checkpoint now and then."""
    losses: list[torch.Tensor] = []
    while training.steps < training.stage.steps and not clock.over:
        loss = job.loss(training.steps)
        training.step(loss)
        losses.append(loss.detach())
        shown = training.steps % made.every == 0 or training.steps == training.stage.steps
        if not shown and training.device.type == "cuda":
            continue  # without asking the device for anything
        mean = float(job.ranks.sum(torch.stack(losses).mean())) / job.ranks.size
        if mean != mean:
            raise FloatingPointError(f"{job.name}: the loss is not a number at step {training.steps}")
        training.seconds += clock.look()
        if shown:
            curve.add(job.name, training, {"loss": mean, "lr": training.rate()})
            losses.clear()
        if clock.save_due() and job.ranks.rank == 0:
            training.save(made.folder / f"{job.name}.safetensors")


@hydra.main(config_path="conf", config_name="train", version_base=None)
def main(config: DictConfig) -> None:
    start, ranks = time.monotonic(), Ranks()
    try:
        made = settings(config)
        ranks.join(made.on())
        made.folder.mkdir(parents=True, exist_ok=True)
        (made.folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64
        done = train(made, start + 60 * made.minutes, ranks)
        ranks.leave()
    except (OSError, ValueError, FloatingPointError) as error:
        print("train:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    if ranks.rank == 0:
        print("all stages are done" if done else "not done yet: the same command goes on")


if __name__ == "__main__":
    main()
