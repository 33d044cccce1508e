"""What is stored with every video besides what is its own: how and where it was made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..cluster import Cluster
from ..config import Config
from ..mesh import Mesh
from ..output.record import VideoRecord
from ..output.store import software
from ..planner.costs import Costs
from ..planner.presets import to_keys
from ..planner.workload import Workload
from .batch import Batch
from .groups import Groups
from .manifest import Job


def priced(costs: Costs, work: Workload, nodes: Sequence[int]) -> dict[str, Any]:
    """What a run's plans were priced with, so that whoever looks at a video can price others. nodes: of its ranks."""
    return {"costs": to_keys(costs), "work": asdict(work), "nodes": list(nodes)}


@dataclass(frozen=True)
class Provenance:
    """What is stored with every video of a run, besides what is its own. priced: see the function of that name."""

    model: dict[str, Any]
    config: dict[str, Any]
    software: dict[str, str]
    cluster: dict[str, Any]
    mesh: Mesh
    priced: dict[str, Any]

    @classmethod
    def of(cls, config: Config, cluster: Cluster, batch: Batch, groups: Groups, priced: dict[str, Any]) -> "Provenance":
        described = cluster.describe()
        model = {
            "name": config.model.name,
            "family": batch.folder.family,
            "fingerprint": batch.folder.fingerprint,
            "dtype": config.model.dtype,
        }
        return cls(model, config.describe(), software(described["mpi"]), described, groups.mesh, priced)

    def __call__(self, job: Job, plan: dict[str, Any]) -> VideoRecord:
        """plan: how its denoising was shared out inside the group."""
        s = job.sampling
        return VideoRecord(
            id=job.id,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            seed=s.seed,
            fps=s.fps,
            sampling=asdict(s),
            model=self.model,
            plan={**plan, **dict(self.mesh.axes), "priced": self.priced},
            config=self.config,
            software=self.software,
            cluster=self.cluster,
            image=job.image_sha256,
        )
