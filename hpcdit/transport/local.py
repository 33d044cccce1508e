"""The transport of a group of one rank: its own memory, on its device."""

import torch

from .base import Exchange, Pattern, Place, Transport


class LocalExchange(Exchange):
    """Two buffer sets in a tensor; what is written is there."""

    def __init__(self, pattern: Pattern, device: torch.device) -> None:
        self._sets = torch.empty(self.SETS, pattern.elements(0), dtype=pattern.dtype, device=device)
        self._round = 0

    def begin(self) -> int:
        self._round += 1
        return self._round % self.SETS

    def memory(self, rank: int, which: int) -> torch.Tensor | None:
        return self._sets[which] if rank == 0 else None

    def signal(self, place: Place) -> None: ...

    def wait(self, place: Place) -> None: ...

    def quiet(self) -> None: ...

    def close(self) -> None:
        self._sets = torch.empty(0)


class LocalTransport(Transport):
    """For one rank."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(rank=0, nodes=(0,))
        self.device = device

    def exchange(self, pattern: Pattern) -> LocalExchange:
        return LocalExchange(pattern, self.device)

    @property
    def streams(self) -> bool:
        return self.device.type == "cuda"

    def await_stream(self, what: str) -> None:
        if self.streams:
            torch.cuda.current_stream(self.device).synchronize()

    def measure(self, nbytes: int, others: int = 1, rounds: int = 5, turns: int = 1) -> float:
        return 0.0

    def describe(self) -> dict[str, str]:
        return {"kind": "local", "inter": "none"}
