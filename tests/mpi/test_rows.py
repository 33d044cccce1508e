"""VAEs that are decoded and encoded by several ranks, some rows each, beside one rank."""

from tests.mpi.starts import mpirun
from tests.vaes import VAES

# LTX's norms compute in float32, whatever the type of the model.
EXACT = dict.fromkeys(VAES, 1e-12) | {"ltx": 2e-6, "ltx_noise": 2e-6}


def test_rows_of_every_vae_are_those_of_one_rank() -> None:
    """On 2, 3 and 4 ranks that divide nothing, in float64; a level of 255 is 4e-3."""
    found = mpirun(4, "parity", module="tests.mpi.rows")
    assert sorted(found) == ["2", "3", "4"]
    for size, differences in found.items():
        assert set(differences) == {*VAES, "fewer rows than ranks", "float32"}
        for name, (decoded, encoded) in differences.items():
            allowed = 1e-5 if name == "float32" else EXACT.get(name, 1e-12)
            assert decoded < allowed and encoded < allowed, f"{name} on {size} ranks"
