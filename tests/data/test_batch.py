"""Batches equal the union of their structures and stay within their budget."""

from __future__ import annotations

import dataclasses
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from rung.data.batch import Batch, Budget, Sample, batches, collate
from rung.data.structure import Labels, Structure

FIDELITIES = {"low": 0, "high": 1}
CUTOFF = 3.0


def make_structure(seed: int, num_atoms: int = 5, periodic: bool = False) -> Structure:
    rng = np.random.default_rng(seed)
    forces = rng.normal(size=(num_atoms, 3)).astype(np.float32)
    low = Labels(energy=float(rng.normal()), forces=forces, stress=np.eye(3, dtype=np.float32) if periodic else None)
    return Structure(
        key=f"s{seed}",
        group=f"g{seed}",
        numbers=rng.integers(1, 9, num_atoms).astype(np.uint8),
        positions=rng.uniform(0, 4, (num_atoms, 3)).astype(np.float32),
        cell=np.eye(3, dtype=np.float32) * (4.0 if periodic else 0.0),
        pbc=np.full(3, periodic),
        charge=seed % 3 - 1,
        multiplicity=1 + seed % 2,
        labels={"low": low, "high": Labels(energy=float(rng.normal()))},
    )


def single(structure: Structure, fidelity: str) -> Batch:
    return collate([structure], fidelities=[fidelity], fidelity_index=FIDELITIES, cutoff=CUTOFF)


def test_batch_is_the_union_of_its_structures() -> None:
    lone = dataclasses.replace(make_structure(3, num_atoms=1), labels={})
    structures = [make_structure(0), make_structure(1, periodic=True), lone, make_structure(2, num_atoms=9)]
    fidelities = ["low", "low", "high", "high"]
    batch = collate(structures, fidelities=fidelities, fidelity_index=FIDELITIES, cutoff=CUTOFF)
    singles = [single(structure, name) for structure, name in zip(structures, fidelities, strict=True)]
    assert batch.keys == ("s0", "s1", "s3", "s2")
    atoms = edges = 0
    for index, part in enumerate(singles):
        atom, edge = slice(atoms, atoms + part.num_atoms), slice(edges, edges + part.num_edges)
        assert (batch.structure[atom] == index).all()
        for name in ("numbers", "positions", "forces"):
            torch.testing.assert_close(getattr(batch, name)[atom], getattr(part, name), rtol=0, atol=0, equal_nan=True)
        for name in ("cell", "charge", "multiplicity", "fidelity", "energy", "stress", "energy_weight"):
            found, expected = getattr(batch, name)[index], getattr(part, name)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(batch.receivers[edge] - atoms, part.receivers)
        torch.testing.assert_close(batch.senders[edge] - atoms, part.senders)
        torch.testing.assert_close(batch.reverse[edge] - edges, part.reverse)
        torch.testing.assert_close(batch.shifts[edge], part.shifts)
        torch.testing.assert_close(batch.row_ptr[atoms : atoms + part.num_atoms + 1] - edges, part.row_ptr)
        atoms, edges = atoms + part.num_atoms, edges + part.num_edges
    assert (batch.num_structures, batch.num_atoms, batch.num_edges) == (4, atoms, edges)


def test_types_and_missing_labels() -> None:
    batch = single(make_structure(0), "high")
    for item in dataclasses.fields(Batch):
        declared = item.metadata.get("dtype") or {
            "numbers": torch.int64, "structure": torch.int64, "charge": torch.int64, "multiplicity": torch.int64,
            "fidelity": torch.int64, "task": torch.int64, "receivers": torch.int32, "senders": torch.int32,
            "row_ptr": torch.int32, "reverse": torch.int32, "energy": torch.float64,
        }.get(item.name, torch.float32)  # fmt: skip
        if item.name not in ("keys", "element_counts"):
            assert getattr(batch, item.name).dtype == declared, item.name
    assert batch.fidelity.tolist() == [1] and batch.energy.isfinite().all()
    assert batch.forces.isnan().all() and batch.stress.isnan().all()


def test_no_edges() -> None:
    batch = single(make_structure(0, num_atoms=1), "low")
    assert batch.num_edges == 0 and batch.shifts.shape == (0, 3) and batch.row_ptr.tolist() == [0, 0]


def test_weights_follow_their_structures() -> None:
    pair = [make_structure(0), make_structure(1)]
    batch = collate(
        pair,
        fidelities=["low", "low"],
        fidelity_index=FIDELITIES,
        cutoff=CUTOFF,
        energy_weights=[1.0, 0.5],
        forces_weights=[0.0, 2.0],
    )
    assert batch.energy_weight.tolist() == [1.0, 0.5] and batch.forces_weight.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(("max_atoms", "max_edges"), [(20, 10_000), (10_000, 60)])
def test_batches_fill_the_budget_and_lose_nothing(max_atoms: int, max_edges: int) -> None:
    structures = [make_structure(seed, num_atoms=1 + seed % 7) for seed in range(40)]
    samples = [Sample(structure, "low") for structure in structures]
    budget = Budget(max_atoms, max_edges)
    made = list(batches(samples, fidelity_index=FIDELITIES, cutoff=CUTOFF, budget=budget))
    assert [key for batch in made for key in batch.keys] == [structure.key for structure in structures]
    for batch, following in zip(made, made[1:], strict=False):
        assert batch.num_atoms <= max_atoms and batch.num_edges <= max_edges
        first = single(structures[int(following.keys[0][1:])], "low")
        too_many_atoms = batch.num_atoms + first.num_atoms > max_atoms
        assert too_many_atoms or batch.num_edges + first.num_edges > max_edges


def test_fidelities_keep_their_rows_in_long_sequences() -> None:
    samples = [Sample(make_structure(seed, num_atoms=1), "low" if seed < 300 else "high") for seed in range(310)]
    (batch,) = batches(samples, fidelity_index=FIDELITIES, cutoff=CUTOFF, budget=Budget(10_000, 10**10))
    assert batch.fidelity.tolist() == [0] * 300 + [1] * 10


@pytest.mark.parametrize("budget", [Budget(8, 1000), Budget(1000, 8)])
def test_structure_larger_than_the_budget_is_named(budget: Budget) -> None:
    samples = [Sample(make_structure(0, num_atoms=2), "low"), Sample(make_structure(1, num_atoms=9), "low")]
    message = rf"structure 's1': 9 atoms and \d+ edges .* budget of {budget.max_atoms} atoms and {budget.max_edges}"
    with pytest.raises(ValueError, match=message):
        list(batches(samples, fidelity_index=FIDELITIES, cutoff=CUTOFF, budget=budget))


def test_bad_arguments_are_named() -> None:
    structure = make_structure(0)
    with pytest.raises(ValueError, match="hihg.*high"):
        single(structure, "hihg")
    with pytest.raises(ValueError, match="fidelities: expected one per structure"):
        collate([structure], fidelities=[], fidelity_index=FIDELITIES, cutoff=CUTOFF)
    with pytest.raises(ValueError, match="at least one structure"):
        collate([], fidelities=[], fidelity_index=FIDELITIES, cutoff=CUTOFF)
    with pytest.raises(ValueError, match="budget.max_edges"):
        Budget(1, 0)
    twice = dataclasses.replace(structure, positions=np.zeros((5, 3), np.float32))
    with pytest.raises(ValueError, match="structure 's0': positions: atoms"):
        single(twice, "low")


def test_to_keeps_the_energy_in_double_precision() -> None:
    batch = single(make_structure(0), "low").to("cpu", torch.float64)
    assert batch.positions.dtype == batch.shifts.dtype == batch.energy.dtype == torch.float64
    assert batch.receivers.dtype == torch.int32
    assert single(make_structure(0), "low").to("cpu", torch.float32).energy.dtype == torch.float64


def test_batch_survives_the_way_between_processes() -> None:
    batch = single(make_structure(1, periodic=True), "low")
    copy = ForkingPickler.loads(ForkingPickler.dumps(batch))
    for item in dataclasses.fields(Batch):
        found, expected = getattr(copy, item.name), getattr(batch, item.name)
        if isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        else:
            assert found == expected
