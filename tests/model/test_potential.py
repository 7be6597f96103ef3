"""Symmetries, limits and derivatives of the potential, for both kinds of conditioning and both kinds of nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.model.config import ModelConfig
from rung.model.potential import Potential

CUTOFF = 5.0
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}  # relative to the largest energy or force of the structures
E0 = {1: -0.5, 6: -1.5, 8: -2.5}

VARIANTS = [
    {"conditioning": conditioning, "l_hidden": l_hidden, "dtype": dtype}
    for conditioning in ("film", "heads")
    for l_hidden in (0, 1)
    for dtype in (torch.float64, torch.float32)
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


Make = Callable[..., Potential]
Evaluate = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def evaluate(variant: dict[str, Any], make_potential: Make) -> Evaluate:
    """Return a function from structures to energies [M] and forces [N, 3], in eV and angstrom."""
    dtype = variant.pop("dtype")
    potential = make_potential(channels=16, num_layers=3, **variant).to(dtype)
    for fidelity in ("low", "high"):
        potential.set_reference(fidelity, E0)

    def evaluate(structures: list[Structure], dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
        prediction = potential(to_batch(structures, dtype))
        assert prediction.forces is not None
        assert prediction.energy.dtype == torch.float64
        return prediction.energy, prediction.forces

    evaluate.dtype = dtype  # type: ignore[attr-defined]
    return evaluate


def to_batch(structures: list[Structure], dtype: torch.dtype = torch.float64) -> Batch:
    """Alternate the two fidelities, so that a batch mixes them."""
    fidelities = ["high" if structure.key.endswith("high") else "low" for structure in structures]
    batch = collate(structures, fidelities=fidelities, fidelity_index={"low": 0, "high": 1}, cutoff=CUTOFF)
    return batch.to("cpu", dtype)


def cluster(key: str, num_atoms: int, seed: int = 0, **fields: Any) -> Structure:
    """Return atoms of H, C, O 0.9 angstrom apart or more, at places that float32 holds exactly even far away."""
    random = np.random.default_rng(seed)
    positions: list[np.ndarray] = []
    while len(positions) < num_atoms:
        place = random.uniform(-2.2, 2.2, 3)
        if all(np.linalg.norm(place - other) > 0.9 for other in positions):
            positions.append(place)
    numbers = random.choice([1, 6, 8], num_atoms).astype(np.uint8)
    return Structure(key, key, numbers, (np.array(positions) * 1024).round().astype(np.float32) / 1024, **fields)


def moved(structure: Structure, function: Callable[[np.ndarray], np.ndarray]) -> Structure:
    return dataclasses.replace(structure, positions=function(structure.positions.astype(np.float64)))


def close(evaluate: Evaluate, found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[evaluate.dtype]  # type: ignore[attr-defined]
    largest = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest, check_dtype=False)


def orthogonal(seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]


def test_rotations_reflections_and_translations(evaluate: Evaluate) -> None:
    structure = cluster("a_high", 7)
    energy, forces = evaluate([structure])
    assert forces.abs().max() > 0.01
    for turn in (orthogonal(), -orthogonal()):
        turned = moved(structure, lambda positions, turn=turn: positions @ turn.T + np.array([3.0, -2.0, 1.0]))
        other_energy, other_forces = evaluate([turned])
        close(evaluate, other_energy, energy)
        close(evaluate, other_forces, forces @ torch.from_numpy(turn).to(forces).T)


def test_permutation_of_atoms(evaluate: Evaluate) -> None:
    structure = cluster("a", 7)
    order = np.random.default_rng(1).permutation(7)
    permuted = dataclasses.replace(structure, numbers=structure.numbers[order], positions=structure.positions[order])
    (energy, forces), (other_energy, other_forces) = evaluate([structure]), evaluate([permuted])
    close(evaluate, other_energy, energy)
    close(evaluate, other_forces, forces[torch.from_numpy(order)])


def test_a_batch_equals_its_structures_one_by_one(evaluate: Evaluate) -> None:
    structures = [
        cluster("a", 6, seed=1),
        cluster("b_high", 3, seed=2, charge=1, multiplicity=2),
        cluster("c", 1, seed=3),
        cluster("d_high", 5, seed=4),
    ]
    energy, forces = evaluate(structures)
    singles = [evaluate([structure]) for structure in structures]
    close(evaluate, energy, torch.cat([single for single, _ in singles]))
    close(evaluate, forces, torch.cat([single for _, single in singles]))


def test_far_fragments_add_up(evaluate: Evaluate) -> None:
    one, two = cluster("a", 5, seed=1), cluster("b", 4, seed=2)
    both = Structure(
        "ab", "ab", np.concatenate([one.numbers, two.numbers]), np.concatenate([one.positions, two.positions + 50])
    )
    energy, forces = evaluate([both])
    energies, separate_forces = evaluate([one, two])
    close(evaluate, energy[0], energies.sum())
    close(evaluate, forces, separate_forces)


def test_atoms_without_neighbours_have_no_forces(evaluate: Evaluate) -> None:
    energy, forces = evaluate([cluster("a", 1)])
    assert torch.isfinite(energy).all() and forces.abs().max() == 0
    pair = Structure("p", "p", np.array([1, 8], np.uint8), np.array([[0, 0, 0], [0, 0, 40]], np.float32))
    energy, forces = evaluate([pair])
    assert torch.isfinite(energy).all() and forces.abs().max() == 0


@pytest.fixture
def potential(make_potential: Make) -> Potential:
    potential = make_potential(channels=16, num_layers=2).double()
    potential.set_reference("low", E0)
    potential.set_reference("high", E0)
    return potential


def test_no_gradient_crosses_from_one_molecule_to_another(potential: Potential) -> None:
    batch = to_batch([cluster("a", 5, seed=1), cluster("b", 4, seed=2)])
    positions = batch.positions.requires_grad_()
    energy = potential(batch, forces=False).energy
    (gradient,) = torch.autograd.grad(energy[0], positions)
    assert gradient[:5].abs().max() > 0 and gradient[5:].abs().max() == 0


def test_energy_and_forces_are_smooth_where_an_atom_crosses_the_cutoff(potential: Potential) -> None:
    pair = Structure("p", "p", np.array([6, 8, 1], np.uint8), np.zeros((3, 3), np.float32))

    def at(distance: float) -> tuple[Tensor, Tensor]:
        positions = np.array([[0, 0, 0], [distance, 0, 0], [0, 1, 0]], np.float64)
        prediction = potential(to_batch([dataclasses.replace(pair, positions=positions)]))
        return prediction.energy, prediction.forces

    (inside, forces_inside), (outside, forces_outside) = at(CUTOFF - 1e-5), at(CUTOFF + 1e-5)
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-9)
    torch.testing.assert_close(forces_inside, forces_outside, rtol=0, atol=1e-6)
    assert (at(CUTOFF - 0.5)[0] - outside).abs() > 1e-6  # the pair does interact inside


def test_forces_agree_with_finite_differences(potential: Potential) -> None:
    batch = to_batch([cluster("a_high", 5, seed=1), cluster("b", 4, seed=2)])
    forces = potential(batch).forces
    step = 1e-4
    for atom, axis in ((0, 0), (3, 1), (7, 2)):
        energies = []
        for sign in (1, -1):
            positions = batch.positions.clone()
            positions[atom, axis] += sign * step
            energies.append(potential(dataclasses.replace(batch, positions=positions), forces=False).energy.sum())
        expected = -(energies[0] - energies[1]) / (2 * step)
        torch.testing.assert_close(forces[atom, axis], expected, rtol=1e-7, atol=1e-7)


def crystal() -> Structure:
    cell = np.array([[4.0, 0, 0], [0.5, 4.2, 0], [0.3, -0.4, 3.9]], np.float32)
    positions = np.array([[0, 0, 0], [1.9, 2.0, 1.8], [0.4, 2.1, 0.2]], np.float32)
    return Structure("x", "x", np.array([6, 8, 1], np.uint8), positions, cell=cell, pbc=np.ones(3, bool))


def test_stress_agrees_with_finite_differences(potential: Potential) -> None:
    batch = to_batch([crystal(), cluster("m", 3)])
    prediction = potential(batch, stress=True)
    assert prediction.stress[1].isnan().all()  # a molecule has none
    stress, volume = prediction.stress[0], torch.linalg.det(batch.cell[0])
    torch.testing.assert_close(stress, stress.T)
    step = 1e-5
    for a, b in ((0, 0), (1, 2), (2, 0)):
        energies = []
        for sign in (1, -1):
            strain = torch.eye(3, dtype=torch.float64)
            strain[a, b] += sign * step / 2
            strain[b, a] += sign * step / 2
            deformed = dataclasses.replace(batch, positions=batch.positions @ strain, cell=batch.cell @ strain)
            energies.append(potential(deformed, forces=False).energy[0])
        expected = (energies[0] - energies[1]) / (2 * step) / volume
        torch.testing.assert_close(stress[a, b], expected, rtol=1e-6, atol=1e-8)


def test_a_supercell_has_the_energy_of_its_cells(potential: Potential) -> None:
    one = crystal()
    two = dataclasses.replace(
        one,
        numbers=np.tile(one.numbers, 2),
        positions=np.concatenate([one.positions, one.positions + one.cell[0]]),
        cell=one.cell * np.array([[2], [1], [1]], np.float32),
    )
    single, double = potential(to_batch([one])), potential(to_batch([two]))
    torch.testing.assert_close(double.energy, 2 * single.energy, rtol=1e-6, atol=1e-6)  # positions are float32
    torch.testing.assert_close(double.forces, single.forces.repeat(2, 1), rtol=1e-4, atol=1e-5)


def test_a_training_step_computes_no_gradient_that_nobody_reads(
    potential: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native kernels are asked neither for the loss's gradient with respect to the geometry nor, in the first
    layer, for the energy's with respect to what does not move."""
    from rung.kernels import library, use_backend
    from rung.kernels.convolution import cpu

    try:
        library.compiler()
    except library.Unavailable as error:
        pytest.skip(str(error))
    asked: dict[str, list[list[bool]]] = {"backward": [], "backward2": []}
    for name, needs in asked.items():
        original = getattr(cpu, name)

        def spy(*arguments: Any, original: Any = original, needs: list[list[bool]] = needs) -> Any:
            needs.append(list(arguments[-1]))
            return original(*arguments)

        monkeypatch.setattr(cpu, name, spy)
    potential.train()
    with use_backend("native"):
        loss = potential(to_batch([cluster("a", 4, seed=1)])).forces.square().sum()
        forces_pass = asked["backward"].copy()
        loss.backward()
    radial, harmonics, x = 0, 1, 2
    assert [need[x] for need in forces_pass] == [True, False]  # the last layer comes first
    assert all(need[radial] and need[harmonics] for need in forces_pass)
    assert len(asked["backward2"]) == 2
    assert not any(need[1 + radial] or need[1 + harmonics] for need in asked["backward2"])
    assert not any(need[radial] or need[harmonics] for need in asked["backward"][2:])


def test_second_derivatives_with_respect_to_the_parameters(potential: Potential) -> None:
    """The gradient of a loss on forces, which trains the potential, against finite differences."""
    potential.train()
    batch = to_batch([cluster("a", 4, seed=1)])

    def loss() -> Tensor:
        value: Tensor = potential(batch).forces.square().sum()
        return value

    step = 1e-4  # rounding of the loss would dominate a smaller one
    parameters = dict(potential.named_parameters())
    loss().backward()
    for name in ("layers.0.radial_RlC", "layers.1.axial_RlC", "layers.1.mixing_lCC", "conditioning.vector_FD"):
        parameter = parameters[name]
        index = (0,) * parameter.dim()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
            values.append(loss().detach())
            with torch.no_grad():
                parameter[index] -= sign * step
        torch.testing.assert_close(parameter.grad[index], (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("conditioning", ["film", "heads"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_every_parameter_takes_part_in_every_step(make_potential: Make, conditioning: str, num_layers: int) -> None:
    """Also with one of the fidelities and without any edge: an unused parameter stops data-parallel training."""
    potential = make_potential(channels=16, conditioning=conditioning, num_layers=num_layers).double().train()
    potential.set_reference("low", E0)
    for structures in ([cluster("a", 4)], [cluster("b", 1)]):
        prediction = potential(to_batch(structures))
        potential.zero_grad()
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        unused = [name for name, parameter in potential.named_parameters() if parameter.grad is None]
        assert unused == []


@pytest.mark.parametrize("l_max", [1, 2])
def test_lower_degrees_work(make_potential: Make, l_max: int) -> None:
    potential = make_potential(channels=16, l_max=l_max).double()
    potential.set_reference("low", E0)
    structure = cluster("a", 5)
    turn = orthogonal()
    turned = moved(structure, lambda positions: positions @ turn.T)
    energies = [potential(to_batch([item])).energy for item in (structure, turned)]
    torch.testing.assert_close(energies[0], energies[1], rtol=1e-10, atol=1e-10)


def test_initial_predictions_are_near_the_reference_energies_and_reproducible() -> None:
    config = ModelConfig(elements=(1, 6, 8), fidelities=("low", "high"))
    state = torch.get_rng_state()
    first, second = Potential(config), Potential(config)
    assert torch.equal(torch.get_rng_state(), state)  # no global generator
    for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, equal_nan=True, rtol=0, atol=0, msg=name)
    first.set_reference("low", E0)
    batch = to_batch([cluster("a", 8)], torch.float32)
    expected = sum(E0[int(number)] for number in batch.numbers)
    assert abs(first(batch).energy.item() - expected) < 0.5 * 8


def test_changing_the_dtype_keeps_reference_energies_exact() -> None:
    potential = Potential(ModelConfig(elements=(1, 92), fidelities=("low",)))
    exact = {1: -13.587222780835477, 92: -764012.1234567891}
    potential.set_reference("low", exact)
    potential.set_scale(1 / 3)
    for cast in (potential.half, potential.double, potential.float):
        cast()
        assert potential.e0_FZ[0].tolist() == list(exact.values())
        assert potential.scale.item() == 1 / 3
    assert potential.embedding.element_SC.dtype == torch.float32


def test_features_are_invariant_and_one_for_each_layer(potential: Potential) -> None:
    structure = cluster("a", 5)
    turn = orthogonal()
    features = potential.features(to_batch([structure]))
    turned = potential.features(to_batch([moved(structure, lambda positions: positions @ turn.T)]))
    assert [tuple(feature.shape) for feature in features] == [(5, 16)] * 2
    for one, two in zip(features, turned, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_evaluation_mode_keeps_no_graph(potential: Potential) -> None:
    prediction = potential(to_batch([crystal()]), stress=True)
    tensors: Iterator[Any] = iter(vars(prediction).values())
    assert not any(tensor.requires_grad for tensor in tensors)
    with torch.no_grad():
        torch.testing.assert_close(potential(to_batch([crystal()])).forces, prediction.forces)
