"""What the tests of VAEs that are cut by rows run under mpirun."""

from typing import Any

import torch

from hpcdit.cluster import MPI, World
from hpcdit.models.rows import ByRows
from hpcdit.transport.rows import Line, RowGroup
from tests.mpi.groups import each_size
from tests.vaes import FRAMES, SPATIAL, VAES, make

HEIGHT, WIDTH = 5, 6  # of the latents: no rank count but 5 divides it


def differences(name: str, line: Line, height: int, dtype: torch.dtype) -> tuple[float, float]:
    """How far decode and encode by rows are from those of one rank, on this rank's rows, relative to the largest."""
    vae, rows, scale = make(name, dtype), RowGroup(line, height), SPATIAL[name]
    drawn = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, FRAMES[name][0], height, WIDTH, generator=drawn, dtype=dtype)
    pixels = torch.randn(1, 3, FRAMES[name][1], height * scale, WIDTH * scale, generator=drawn, dtype=dtype)
    time = [torch.tensor([0.05], dtype=dtype)] if name == "ltx_noise" else []
    ways: list[tuple[int, torch.Tensor, Any]] = [
        (1, latents, lambda x: vae.decode(x, *time, return_dict=False)[0]),
        (scale, pixels, lambda x: vae.encode(x, return_dict=False)[0].parameters),
    ]
    worst = []
    for factor, x, compute in ways:
        torch.manual_seed(3)
        whole = compute(x)
        torch.manual_seed(3)
        difference = 0.0
        if rows.mine:
            with ByRows(rows):
                mine = compute(x[..., rows.mine.start * factor : rows.mine.stop * factor, :])
            each = whole.shape[-2] // height
            expected = whole[..., rows.mine.start * each : rows.mine.stop * each, :]
            assert mine.shape == expected.shape
            difference = float((mine - expected).abs().max() / whole.abs().max())
        worst.append(line.group.largest(difference, "the differences"))
    return worst[0], worst[1]


def parity(comm: MPI.Comm) -> Any:
    """VAES on 2 to 4 ranks: by size and name the largest differences of decode and of encode."""
    torch.set_num_threads(1)

    def body(world: World) -> dict[str, tuple[float, float]]:
        line = Line(world)
        found = {name: differences(name, line, HEIGHT, torch.float64) for name in VAES}
        found["fewer rows than ranks"] = differences("wan", line, 1, torch.float64)
        found["float32"] = differences("cogvideox", line, HEIGHT, torch.float32)
        return found

    return each_size(comm, body, [(4,), (3,), (2,)])
