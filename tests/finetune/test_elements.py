"""New elements: their place in the periodic table, and how they enter a potential."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase.data import atomic_numbers

from rung.data.structure import Structure
from rung.finetune.elements import add_elements, period_and_group, relatives
from rung.model.potential import Potential
from rung.model.predict import predict


@pytest.mark.parametrize(
    ("symbol", "period", "group"),
    [
        ("H", 1, 1), ("He", 1, 18), ("B", 2, 13), ("F", 2, 17), ("Ca", 4, 2), ("Sc", 4, 3), ("Zn", 4, 12),
        ("Ga", 4, 13), ("Br", 4, 17), ("La", 6, 3), ("Ce", 6, 3), ("Yb", 6, 3), ("Lu", 6, 3), ("Hf", 6, 4),
        ("Au", 6, 11), ("Rn", 6, 18), ("Og", 7, 18),
    ],
)  # fmt: skip
def test_place_in_the_periodic_table(symbol: str, period: int, group: int) -> None:
    assert period_and_group(atomic_numbers[symbol]) == (period, group)


@pytest.mark.parametrize(
    ("new", "known", "expected"),
    [
        ("S", "H C N O", ["O"]),  # the same group
        ("Cl", "F Br S", ["F", "Br"]),  # both sides of the group
        ("N", "C O", ["C", "O"]),  # both sides of the period
        ("Si", "H O", ["O"]),  # nothing in line: the nearest
    ],
)
def test_relatives(new: str, known: str, expected: list[str]) -> None:
    numbers = [atomic_numbers[symbol] for symbol in known.split()]
    assert relatives(atomic_numbers[new], numbers) == [atomic_numbers[symbol] for symbol in expected]


@pytest.fixture
def fluorinated(shifted: list[Structure]) -> list[Structure]:
    """The structures with every other hydrogen replaced by fluorine."""
    replaced = []
    for structure in shifted:
        numbers = structure.numbers.copy()
        numbers[np.flatnonzero(numbers == 1)[::2]] = 9
        replaced.append(dataclasses.replace(structure, numbers=numbers))
    return replaced


@pytest.mark.parametrize("potential", ["film", "heads"], indirect=True)
def test_a_new_element_starts_as_its_relatives(potential: Potential, fluorinated: list[Structure]) -> None:
    known = {name: value.clone() for name, value in potential.element_parameters()}
    new, notes = add_elements(potential, fluorinated, allowed=True)
    assert new == [9] and notes == [f"new element F: starts as O, trained on {len(fluorinated)} structures"]
    assert potential.config.elements == (1, 6, 8, 9)
    for name, value in potential.element_parameters():
        assert torch.equal(value[:3], known[name]) and torch.equal(value[3], known[name][2])
    with pytest.raises(ValueError, match="'low' was not trained on F"):
        predict(potential, fluorinated, "low")
    # With oxygen's reference energy, fluorine is oxygen.
    potential.set_reference("low", {1: -13.0, 6: -1030.0, 8: -2040.0, 9: -2040.0})
    like = [dataclasses.replace(s, numbers=np.where(s.numbers == 9, 8, s.numbers)) for s in fluorinated]
    pairs = zip(predict(potential, fluorinated, "low"), predict(potential, like, "low"), strict=True)
    assert all(a.energy == pytest.approx(b.energy, abs=1e-4) for a, b in pairs)


def test_known_predictions_do_not_change(potential: Potential, shifted: list[Structure]) -> None:
    before = [p.energy for p in predict(potential, shifted, "low")]
    potential.add_elements({7: [6, 8], 9: [8]})
    assert potential.config.elements == (1, 6, 7, 8, 9)
    assert [p.energy for p in predict(potential, shifted, "low")] == pytest.approx(before, abs=1e-4)


def test_new_elements_need_a_flag(potential: Potential, fluorinated: list[Structure]) -> None:
    with pytest.raises(ValueError, match="the checkpoint does not know F; it knows H, C, O. Pass --new-elements"):
        add_elements(potential, fluorinated, allowed=False)
    with pytest.raises(ValueError, match="new element O like C: expected one that is not"):
        potential.add_elements({8: [6]})
