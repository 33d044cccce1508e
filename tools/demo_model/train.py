"""Trains the demo model, a call at a time; the same command goes on until it says that all stages are done.

usage: python -m tools.demo_model.train [minutes=9] [out=outputs/demo_model] [KEY=VALUE ...]     (conf/train.yaml)
"""

import csv
import sys
import time

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from .evaluate import figures
from .settings import Settings, settings
from .stages import work
from .training import Training, steps_done


class Curve:
    """curve.csv: a line for each figure that was taken, (stage, step, seconds of the stage, name, value)."""

    def __init__(self, made: Settings) -> None:
        self._path = made.folder / "curve.csv"
        if not self._path.exists():
            self._path.write_text("stage,step,seconds,name,value\n")

    def add(self, name: str, training: Training, values: dict[str, float]) -> None:
        with self._path.open("a", newline="") as file:
            for key, value in values.items():
                row = [name, training.steps, f"{training.seconds:.1f}", key, f"{value:.6g}"]
                csv.writer(file, lineterminator="\n").writerow(row)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"{name}: step {training.steps} of {training.stage.steps}, {training.seconds:.0f} s: {shown}", flush=True)


def train(made: Settings, until: float) -> bool:
    """Goes on with the first stage that is not done, and with the next, until all are (True) or it is time.

    until: when it has to be over, on `time.monotonic`'s clock. Raises ValueError where `out` holds another model.
    """
    curve = Curve(made)
    for name, stage in made.stages.items():
        path = made.folder / f"{name}.safetensors"
        if steps_done(path) >= stage.steps:
            continue
        if time.monotonic() > until - made.reserve_s:
            return False
        job = work(made, name)
        training = Training(job.modules, stage, job.device)
        if path.exists():
            training.load(path)
        _steps(made, name, job.loss, training, curve, until - made.reserve_s)
        training.save(path)
        curve.add(name, training, figures(made, name, training))
        if training.steps < stage.steps:
            return False
    return True


def _steps(made: Settings, name: str, loss_of: object, training: Training, curve: Curve, until: float) -> None:
    """Steps of a stage until it is done or it is time, with a line of the curve and a checkpoint now and then."""
    assert callable(loss_of)
    path = made.folder / f"{name}.safetensors"
    losses: list[torch.Tensor] = []
    last = saved = time.monotonic()
    while training.steps < training.stage.steps and last < until:
        loss = loss_of(training.steps)
        training.step(loss)
        losses.append(loss.detach())
        if training.steps % made.every and training.steps < training.stage.steps and training.device.type == "cuda":
            continue  # without asking the device for anything
        mean = float(torch.stack(losses).mean())
        if mean != mean:
            raise FloatingPointError(f"{name}: the loss is not a number at step {training.steps}")
        now = time.monotonic()
        training.seconds += now - last
        last = now
        if training.steps % made.every == 0 or training.steps == training.stage.steps:
            curve.add(name, training, {"loss": mean, "lr": training.rate()})
            losses.clear()
        if now - saved > made.save_s:
            training.save(path)
            saved = now


@hydra.main(config_path="conf", config_name="train", version_base=None)
def main(config: DictConfig) -> None:
    start = time.monotonic()
    try:
        made = settings(config)
        made.folder.mkdir(parents=True, exist_ok=True)
        (made.folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64
        done = train(made, start + 60 * made.minutes)
    except (OSError, ValueError, FloatingPointError) as error:
        print("train:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print("all stages are done" if done else "not done yet: the same command goes on")


if __name__ == "__main__":
    main()
