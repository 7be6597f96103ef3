"""The shipped data: whole, small, free, nested, split by molecule, and what the codes compute."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from rung.data.manifest import read_manifest, resolve_dataset
from rung.data.read import read_any
from rung.data.structure import Structure
from rung.data.verify import verify

LADDER = ("gfn1_xtb", "gfn2_xtb", "pbe_def2svp", "wb97x_631gd")
CORRELATED = ("mp2_ccpvdz", "ccsdt_ccpvdz")


@pytest.fixture(scope="module")
def structures() -> list[Structure]:
    return read_any("builtin")


def test_the_shards_are_whole_and_small() -> None:
    assert verify("builtin") == []
    assert sum(path.stat().st_size for path in resolve_dataset("builtin").iterdir() if path.is_file()) < 10_000_000


def test_the_manifest_says_what_the_data_are() -> None:
    manifest = read_manifest("builtin")
    assert manifest.licence == "CC0-1.0"
    assert "rung data generate" in manifest.source
    assert set(manifest.fidelities) == {*LADDER, *CORRELATED}
    assert set(manifest.elements) == {1, 6, 7, 8}
    for entry in manifest.fidelities.values():
        assert entry.e0_source == "isolated_atoms"
        assert set(entry.e0) == {1, 6, 7, 8}
        assert entry.descriptor.code.split()[1]  # the version
        assert entry.energy_mean is not None and -9 < entry.energy_mean < -2  # bound, eV/atom
    assert manifest.entry("ccsdt_ccpvdz").num_forces["train"] == 0


def test_higher_fidelities_nest_in_lower_ones(structures: list[Structure]) -> None:
    keys = {name: {s.key for s in structures if name in s.labels} for name in (*LADDER, *CORRELATED)}
    assert keys["gfn1_xtb"] == keys["gfn2_xtb"]
    assert keys["pbe_def2svp"] < keys["gfn2_xtb"]
    for lower, higher in pairwise(sorted((*LADDER[2:], *CORRELATED), key=lambda name: -len(keys[name]))):
        assert keys[higher] <= keys[lower], f"{higher} in {lower}"


def test_no_molecule_is_in_two_splits() -> None:
    groups = {split: {s.group for s in read_any("builtin", split=split)} for split in ("train", "val", "test")}
    assert not groups["train"] & groups["val"] and not groups["train"] & groups["test"]
    assert not groups["val"] & groups["test"]


def test_every_molecule_is_in_the_card(structures: list[Structure]) -> None:
    card = (resolve_dataset("builtin") / "README.md").read_text(encoding="utf-8")
    for group in {s.group for s in structures}:
        assert f"`{group}`" in card


def test_forces_of_a_molecule_add_to_zero(structures: list[Structure]) -> None:
    for structure in structures:
        for name, labels in structure.labels.items():
            if labels.forces is not None:
                limit = 0.05 if name in LADDER[2:] else 1e-3  # DFT: the quadrature grid is not invariant
                assert np.abs(labels.forces.sum(0)).max() < limit, f"{structure.key} at {name}"


@pytest.mark.parametrize("name", ["gfn2_xtb", "pbe_def2svp", "wb97x_631gd", "mp2_ccpvdz", "ccsdt_ccpvdz"])
def test_labels_are_what_the_codes_compute(structures: list[Structure], name: str) -> None:
    for package in ("tblite", "pyscf"):
        pytest.importorskip(package, reason="needs rung[generate]")
    from rung.data.generate.levels import LEVELS, compute_label

    structure = min((s for s in structures if name in s.labels), key=lambda s: (s.num_atoms, s.key))
    stored = structure.labels[name]
    energy, forces = compute_label(LEVELS[name], structure.numbers, structure.positions)
    assert energy == pytest.approx(stored.energy, abs=1e-4)
    assert (forces is None) == (stored.forces is None)
    if forces is not None:
        np.testing.assert_allclose(forces, stored.forces, atol=2e-3)
