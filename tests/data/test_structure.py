"""What `validate` refuses: each error names the structure and the field."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rung.data.structure import Labels, Structure, validate


def water() -> Structure:
    positions = np.array([[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]], np.float32)
    labels = {"pbe": Labels(energy=-2077.0, forces=np.zeros((3, 3), np.float32))}
    return Structure("water-0", "water", np.array([8, 1, 1], np.uint8), positions, labels=labels)


def test_a_molecule_and_a_cell_are_valid() -> None:
    validate(water())
    validate(replace(water(), cell=np.eye(3, dtype=np.float32) * 9, pbc=np.ones(3, np.bool_), charge=-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": np.zeros(0, np.uint8)}, "'water-0': numbers: expected at least one atom, found none"),
        ({"numbers": np.array([8, 0, 1], np.uint8)}, "numbers: expected atomic numbers 1..118, found 0..8"),
        ({"numbers": np.array([8, 1, 1])}, "numbers: expected uint8 of one dimension, found int64 (3,)"),
        ({"positions": np.zeros((2, 3), np.float32)}, "positions: expected shape (3, 3), found shape (2, 3)"),
        ({"positions": np.zeros((3, 3))}, "positions: expected dtype float32, found dtype float64"),
        ({"positions": np.full((3, 3), np.inf, np.float32)}, "positions: expected finite values, found 9"),
        ({"pbc": np.ones(2, np.bool_)}, "pbc: expected shape (3,)"),
        ({"pbc": np.ones(3, np.bool_)}, "cell: expected a cell with volume, because pbc is set"),
        ({"charge": 200}, "charge: expected -128..127 elementary charges, found 200"),
        ({"multiplicity": 0}, "multiplicity: expected 2S + 1 in 1..255, found 0"),
        ({"labels": {"pbe": Labels(energy=float("nan"))}}, "energy.pbe: expected a finite energy in eV, or None"),
        ({"labels": {"pbe": Labels(forces=np.zeros((3, 2), np.float32))}}, "forces.pbe: expected shape (3, 3)"),
        (
            {"labels": {"pbe": Labels(forces=np.full((3, 3), 301, np.float32))}},
            "forces.pbe: expected |F| <= 300 eV/angstrom, found 301; are they in eV/angstrom?",
        ),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(replace(water(), **change))
