"""Users' own files: labels under the keys people use, and a clear error for every bad frame."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from rung.data.sources.ase_file import read_structures

H2 = "H 0 0 0 1 0 0\nH 0 0 0.74 -1 0 0\n"
HEADER = "Properties=species:S:1:pos:R:3:{forces}:R:3 {energy}=-31.0"


def frame(energy: str = "REF_energy", forces: str = "REF_forces", extra: str = "") -> str:
    return f"2\n{HEADER.format(forces=forces, energy=energy)} {extra}\n{H2}"


def read(folder: Path, text: str, **keys: str) -> list:
    path = folder / "mine.xyz"
    path.write_text(text)
    return list(read_structures(path, fidelity="pbe", **keys))


@pytest.mark.parametrize(("energy", "forces"), [("REF_energy", "REF_forces"), ("energy", "forces")])
def test_reads_both_common_pairs_of_keys(tmp_path: Path, energy: str, forces: str) -> None:
    first, second = read(tmp_path, frame(energy, forces) + frame(energy, forces, "group=hydrogen charge=1 spin=2"))
    assert (first.key, first.group, first.charge, first.multiplicity) == ("mine-000000", "H2", 0, 1)
    assert (second.key, second.group, second.charge, second.multiplicity) == ("mine-000001", "hydrogen", 1, 2)
    assert first.labels["pbe"].energy == -31.0
    np.testing.assert_array_equal(first.labels["pbe"].forces, [[1, 0, 0], [-1, 0, 0]])


def test_own_keys(tmp_path: Path) -> None:
    (structure,) = read(tmp_path, frame("ccsd", "mp2_forces"), energy_key="ccsd")
    assert structure.labels["pbe"].energy == -31.0 and structure.labels["pbe"].forces is None
    both = frame("REF_energy=-1.0 energy", "forces")  # what ASE moves to its calculator, asked for by name
    (structure,) = read(tmp_path, both, energy_key="energy", forces_key="forces")
    assert structure.labels["pbe"].energy == -31.0 and structure.labels["pbe"].forces is not None


@pytest.mark.parametrize("key", ["energy_key", "forces_key", "group_key"])
def test_a_key_that_no_frame_has_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="no frame has mistyped; the last one has REF_energy, REF_forces"):
        read(tmp_path, frame() + frame(), **{key: "mistyped"})


def test_labels_of_two_sources_are_never_mixed(tmp_path: Path) -> None:
    (structure,) = read(tmp_path, frame("REF_energy", "forces"))
    assert structure.labels["pbe"].energy == -31.0 and structure.labels["pbe"].forces is None


def test_a_periodic_cell_with_stress_written_by_ase(tmp_path: Path) -> None:
    atoms = Atoms("Cu", positions=[[0.1, 0, 0]], cell=np.diag([3.0, 4.0, 5.0]), pbc=True)
    voigt = np.array([1.0, 2, 3, 4, 5, 6]) / 100
    atoms.calc = SinglePointCalculator(atoms, energy=-3.5, forces=np.zeros((1, 3)), stress=voigt)
    write(tmp_path / "cu.traj", atoms)
    (structure,) = read_structures(tmp_path / "cu.traj", fidelity="pbe")
    np.testing.assert_allclose(structure.labels["pbe"].stress, atoms.get_stress(voigt=False), rtol=1e-6)
    assert structure.pbc.all() and structure.cell[2, 2] == 5.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.xyz: the file is empty; expected at least one frame"),
        ("hello\nworld\n", "mine.xyz: frame 0: ASE cannot read it"),
        (frame() + frame()[:-20], "mine.xyz: frame 1: ASE cannot read it"),
        (frame() + "2\n", "mine.xyz: frame 1: ASE cannot read it"),
        (
            "1\nProperties=species:S:1:pos:R:3 E=1.0\nH 0 0 0\n",
            "frame 0: no energy and no forces: expected 'REF_energy'",
        ),
        ("1\n\nHe 0 0 0\n", "found no labels at all"),
        (frame("REF_energy=1.0 energy", "forces").replace("=1.0", "=high"), "REF_energy: expected one number in eV"),
        (frame().replace("-31.0", "nan"), "energy.pbe: expected a finite energy in eV"),
        (frame().replace("1 0 0\n", "900 0 0\n"), "forces.pbe: expected |F| <= 300 eV/angstrom, found 900"),
        (frame(extra="spin=1 multiplicity=3"), "multiplicity 3 and spin 1 differ"),
        (frame(extra="charge=0.5"), "charge: expected a whole number, found"),
        (frame(extra="spin=high"), "multiplicity: expected a whole number, found 'high'"),
        (
            "1\nProperties=species:S:1:pos:R:3:REF_forces:R:2\nH 0 0 0 1 1\n",
            "frame 0: structure 'mine-000000': REF_forces",
        ),
    ],
)
def test_bad_frames_are_named(tmp_path: Path, text: str, message: str) -> None:
    message = message.replace("': REF_forces", "': forces.pbe: expected shape (1, 3), found shape (1, 2)")
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, text)


def test_a_missing_file_and_a_bad_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.xyz: no such file"):
        list(read_structures(tmp_path / "nowhere.xyz", fidelity="pbe"))
    with pytest.raises(ValueError, match="name 'CCSD\\(T\\)': expected lower-case"):
        list(read_structures(tmp_path / "nowhere.xyz", fidelity="CCSD(T)"))
