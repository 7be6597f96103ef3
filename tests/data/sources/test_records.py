"""Records: structures of pymatgen and values of JSON as arrays; what is of another kind is named."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from rung.data.sources.records import array, crystal, full_stress, number, whole_number


def lattice_and_site(**changes: object) -> dict:
    site = {"species": [{"element": "Li", "occu": 1}], "abc": [0.5, 0.25, 0.0], "xyz": [9.0, 9.0, 9.0], "label": "Li"}
    matrix = [[2.0, 0.1, 0.0], [0.0, 3.0, 0.2], [0.3, 0.0, 4.0]]
    return {"lattice": {"matrix": matrix}, "sites": [{**site, **changes}, site], "charge": None}


def test_a_pymatgen_structure() -> None:
    record = lattice_and_site(species=[{"element": "O", "oxidation_state": -2, "occu": 1.0}], abc=[1.25, -0.5, 0.1])
    atoms = Atoms("OLi", cell=record["lattice"]["matrix"], scaled_positions=[[1.25, -0.5, 0.1], [0.5, 0.25, 0]])
    found = crystal(record)
    np.testing.assert_allclose(found["positions"], atoms.positions, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["cell"], atoms.cell.array, rtol=1e-6)
    assert found["numbers"].tolist() == [8, 3] and found["pbc"].tolist() == [True] * 3 and found["charge"] == 0
    slab = {**lattice_and_site(), "charge": -1}
    slab["lattice"]["pbc"] = [True, True, False]
    assert crystal(slab)["pbc"].tolist() == [True, True, False] and crystal(slab)["charge"] == -1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lattice_and_site(species=[{"element": "Li", "occu": 0.5}]), "expected one whole species on each site"),
        (lattice_and_site(species=[{"element": "Li", "occu": 0.5}] * 2), "expected one whole species on each site"),
        (lattice_and_site(species=[{"element": "Xx", "occu": 1}]), "expected symbols of elements, found 'Xx'"),
        (lattice_and_site(abc=[0.1, 0.2]), "sites.abc: expected"),
        ({"sites": []}, "structure: expected a pymatgen structure .* found an object with sites"),
        ({**lattice_and_site(), "lattice": {"matrix": [[1, 2, 3]]}}, r"lattice.matrix: expected shape \(3, 3\)"),
        (None, "structure: expected a pymatgen structure .* found NoneType"),
    ],
)
def test_other_structures_are_refused(record: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crystal(record)


def test_numbers_and_stresses() -> None:
    voigt = np.arange(1.0, 7)
    np.testing.assert_array_equal(full_stress(voigt), voigt_6_to_full_3x3_stress(voigt))
    np.testing.assert_array_equal(full_stress(range(9)), np.arange(9).reshape(3, 3))
    assert number(None, "e") is None and number(float("nan"), "e") is None and number(2, "e") == 2.0
    with pytest.raises(ValueError, match="e: expected a number or null, found str 'x'"):
        number("x", "e")
    with pytest.raises(ValueError, match=r"f: expected numbers of shape \(1, 3\), found list"):
        array([[1, 2, "x"]], (1, 3), "f")
    assert whole_number(-2.0, "charge") == -2 and whole_number(np.int64(3), "charge") == 3
    for value in (0.5, float("nan"), "1", True, None):
        with pytest.raises(ValueError, match="charge: expected a whole number, found"):
            whole_number(value, "charge")
