"""Error metrics of sets and of parts of them, against sums written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk

from rung.data.reaction import Reaction
from rung.data.structure import Labels, Structure
from rung.data.units import KCAL_MOL
from rung.model.errors import Errors, ErrorSums, StructurePrediction, reaction_metrics, size_class


def case(symbols: list[int], energy: float, forces: list[float] | None) -> tuple[Structure, StructurePrediction]:
    """Return a structure with labels of 0, and a prediction off by `energy` eV/atom and by `forces` along x."""
    n = len(symbols)
    zero, predicted = np.zeros((n, 3)), np.zeros((n, 3))
    if forces is not None:
        predicted[:, 0] = forces
    labels = Labels(energy=0.0, forces=None if forces is None else zero.astype(np.float32))
    structure = Structure("s", "s", np.array(symbols, np.uint8), zero.astype(np.float32), labels={"low": labels})
    return structure, StructurePrediction("s", energy * n, np.full(n, energy), predicted, None)


CASES = [
    case([8, 1, 1], 0.003, [0.03, 0.0, -0.06]),
    case([6, 1, 1, 1, 1], -0.005, [0.1, 0.02, 0.02, 0.02, 0.02]),
    case([6, 8], 0.010, None),
    case([1], 0.001, [0.0]),
]


def test_parts_in_closed_form() -> None:
    whole = Errors.of([s for s, _ in CASES], [p for _, p in CASES], "low")
    elements, sizes = whole.by_element(), whole.by_size()
    total = whole.sums().metrics()
    assert total["num_energies"] == 4 and total["num_forces"] == 3
    assert total["energy_mae_mev_per_atom"] == pytest.approx((3 + 5 + 10 + 1) / 4)
    assert total["force_mae_mev_per_angstrom"] == pytest.approx((30 + 60 + 100 + 80) / 27)
    hydrogen, carbon, oxygen = (elements[number].metrics() for number in (1, 6, 8))
    assert list(elements) == [1, 6, 8]
    assert (hydrogen["num_energies"], carbon["num_energies"], oxygen["num_energies"]) == (3, 2, 2)
    assert hydrogen["energy_mae_mev_per_atom"] == pytest.approx((3 + 5 + 1) / 3)
    assert carbon["energy_rmse_mev_per_atom"] == pytest.approx(np.sqrt((25 + 100) / 2))
    assert hydrogen["force_mae_mev_per_angstrom"] == pytest.approx((60 + 80) / 21)
    assert carbon["force_rmse_mev_per_angstrom"] == pytest.approx(100 / np.sqrt(3))
    assert oxygen["num_forces"] == 1 and oxygen["force_mae_mev_per_angstrom"] == pytest.approx(10)
    components = sum(sums.num_force_components for sums in elements.values())
    assert components == whole.sums().num_force_components  # every atom is of one element
    assert {size: sums.num_energies for size, sums in sizes.items()} == {
        (1, 1): 1,
        (2, 2): 1,
        (3, 4): 1,
        (5, 8): 1,
    }
    assert sum(sizes.values(), ErrorSums()).metrics() == pytest.approx(total)


def test_size_classes() -> None:
    assert [size_class(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [
        *((1, 1), (2, 2), (3, 4), (3, 4), (5, 8), (5, 8)),
        *((9, 16), (9, 16), (17, 32)),
    ]


def test_stress_where_it_is_labelled() -> None:
    atoms = bulk("Cu")
    fields = (atoms.numbers.astype(np.uint8), atoms.positions.astype(np.float32), atoms.cell.array.astype(np.float32))
    stress = np.zeros((3, 3), np.float32)
    labels = {"low": Labels(energy=0.0, stress=stress)}
    structure = Structure("Cu", "Cu", *fields, pbc=np.ones(3, np.bool_), labels=labels)
    prediction = StructurePrediction("Cu", 0.0, np.zeros(1), None, np.diag([0.009, 0.0, 0.0]))
    metrics = Errors.of([structure], [prediction], "low").sums().metrics()
    assert metrics["num_stresses"] == 1
    assert metrics["stress_mae_mev_per_angstrom3"] == pytest.approx(1.0)
    assert metrics["stress_rmse_mev_per_angstrom3"] == pytest.approx(3.0)
    assert "num_stresses" not in ErrorSums().metrics()


def test_reactions_in_closed_form() -> None:
    structure = CASES[0][0]
    reactions = [Reaction(name, "", (structure,), (1.0,), energy) for name, energy in (("a", 1.0), ("b", 2.0))]
    metrics = reaction_metrics(reactions, np.array([1.3, 1.6]))
    assert metrics["num_reactions"] == 2 and metrics["largest_error_of"] == "b"
    assert metrics["mae_mev"] == pytest.approx(350) and metrics["rmse_mev"] == pytest.approx(np.sqrt(125000))
    assert metrics["mean_signed_error_mev"] == pytest.approx(-50)
    assert metrics["largest_error_kcal_per_mol"] == pytest.approx(-0.4 / KCAL_MOL)
    with pytest.raises(ValueError, match="expected at least one reaction"):
        reaction_metrics([], np.zeros(0))
