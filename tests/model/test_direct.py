"""The backward pass written out, against autograd through the references in float64, and in molecular dynamics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk, molecule
from ase.md.verlet import VelocityVerlet
from torch import Tensor

from rung.data.batch import Batch, collate
from rung.data.structure import Structure
from rung.kernels import VectorMessage, library, use_backend
from rung.kernels.convolution import reference as convolution
from rung.kernels.edge_basis import reference as edge_basis
from rung.kernels.explicit import Operations
from rung.kernels.invariants import reference as invariants
from rung.kernels.mixing import reference as mixing
from rung.model.ase_calculator import RungCalculator
from rung.model.checkpoint import Checkpoint
from rung.model.config import ModelConfig
from rung.model.direct import DirectPotential, operations_of
from rung.model.potential import Potential, Prediction
from rung.model.predict import predict

DirectOf = Callable[[Potential], DirectPotential]
CUTOFF = 4.0
SHAPES = [
    {"conditioning": "film", "l_hidden": 1, "num_layers": 3},
    {"conditioning": "film", "l_hidden": 0, "num_layers": 2},
    {"conditioning": "heads", "l_hidden": 1, "num_layers": 2},
    {"conditioning": "heads", "l_hidden": 0, "num_layers": 1},
]
INDEX = {"low": 0, "high": 1}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}  # of the largest value


def make_potential(**changes: Any) -> Potential:
    """Return a potential in float64 whose parameters that start at zero are small random numbers."""
    shape = {"elements": (1, 6, 8), "fidelities": ("low", "high"), "charges": (0, 1), "multiplicities": (1, 2)}
    sizes = {"channels": 16, "fidelity_dim": 4, "cutoff": CUTOFF}
    with use_backend("reference"):
        potential = Potential(ModelConfig(**(shape | sizes | changes))).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in potential.parameters():
            if not parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    potential.set_reference("low", {1: -13.6, 6: -1027.0, 8: -2040.0})
    potential.set_reference("high", {1: -13.7, 6: -1029.5})
    potential.set_scale(0.5)
    return potential.eval()


def from_references() -> Operations:
    """Return the operations made from the references, with autograd for the backward passes."""

    def convolve(*arguments: Any) -> Tensor:
        *tensors, w, axial, identity, edges = arguments
        return convolution.convolve(*tensors, edges, None if w is None else VectorMessage(w, axial, identity))

    def convolve_backward(gA: Tensor, *arguments: Any) -> list[Tensor | None]:
        *inputs, edges, need = arguments
        return _gradients(lambda *tensors: convolve(*tensors, edges), inputs, [gA], need)

    def basis(vectors: Tensor, cutoff: float, num_radial: int, l_max: int) -> tuple[Tensor, Tensor]:
        return edge_basis.edge_basis(vectors, cutoff=cutoff, num_radial=num_radial, l_max=l_max)

    def basis_backward(vectors: Tensor, g_radial: Tensor, g_harmonics: Tensor, *options: Any) -> Tensor:
        [gradient] = _gradients(lambda tensor: basis(tensor, *options), [vectors], [g_radial, g_harmonics], [True])
        assert gradient is not None
        return gradient

    def values(A: Tensor) -> Tensor:
        return invariants.invariants(A).contiguous()

    def values_backward(A: Tensor, g: Tensor) -> Tensor:
        [gradient] = _gradients(values, [A], [g], [True])
        assert gradient is not None
        return gradient.contiguous()

    return Operations(basis, basis_backward, convolve, convolve_backward, values, values_backward, mixing.mix, torch.mm)


def _gradients(
    function: Callable[..., Any], inputs: list[Any], cotangents: list[Tensor], need: Any
) -> list[Tensor | None]:
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
        wanted = [leaf for leaf, asked in zip(leaves, need, strict=True) if asked and leaf is not None]
        found = iter(torch.autograd.grad(function(*leaves), wanted, cotangents))
    return [next(found) if asked and leaf is not None else None for leaf, asked in zip(leaves, need, strict=True)]


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    with use_backend("reference"):
        yield


@pytest.fixture(params=["references", "native"])
def direct_of(request: pytest.FixtureRequest) -> DirectOf:
    """Return a function that makes the direct potential, of the references' derivatives or of the native kernels."""
    if request.param == "references":
        return lambda potential: DirectPotential(potential, from_references())
    skip_without_compiler()

    def make(potential: Potential) -> DirectPotential:
        with use_backend("native"):
            operations = operations_of(potential)
        assert operations is not None
        return DirectPotential(potential, operations)

    return make


def skip_without_compiler() -> None:
    try:
        library.compiler()
    except library.Unavailable as error:
        pytest.skip(str(error))


def cluster(key: str, names: str, seed: int) -> Structure:
    """Return a displaced molecule, whose cell is zero."""
    atoms = molecule(names)
    positions = atoms.positions + np.random.default_rng(seed).normal(scale=0.05, size=atoms.positions.shape)
    charge = seed % 2
    return Structure(key, key, atoms.numbers.astype(np.uint8), positions.astype(np.float32), charge=charge)


def crystal(key: str) -> Structure:
    """Return strained, displaced diamond with an oxygen: every bond crosses a face of the cell."""
    atoms = bulk("C", "diamond", a=3.6)
    cell = atoms.cell.array @ (np.eye(3) + [[0.02, 0.01, 0], [0, -0.03, 0.02], [0, 0, 0.01]])
    positions = atoms.get_scaled_positions() @ cell + [[0.03, -0.02, 0.01], [0, 0, 0]]
    return Structure(
        key,
        key,
        np.array([6, 8], np.uint8),
        positions.astype(np.float32),
        cell=cell.astype(np.float32),
        pbc=np.ones(3, bool),
        multiplicity=2,
    )


def single(key: str) -> Structure:
    return Structure(key, key, np.array([8], np.uint8), np.zeros((1, 3), np.float32))


BATCHES = {
    "one molecule": [cluster("low", "CH3CH2OH", 0)],
    "several, two fidelities": [cluster("high", "CH4", 1), crystal("low"), single("low"), cluster("low", "C2H2", 2)],
    "one crystal": [crystal("low")],
    "one atom, no edges": [single("low")],
}


def to_batch(structures: list[Structure], dtype: torch.dtype = torch.float64) -> Batch:
    """Return the structures, each at the fidelity that is its key."""
    fidelities = [structure.key for structure in structures]
    return collate(structures, fidelities=fidelities, fidelity_index=INDEX, cutoff=CUTOFF).to("cpu", dtype)


def assert_equal(found: Prediction, expected: Prediction, tolerance: float) -> None:
    for name, value in vars(expected).items():
        result = getattr(found, name)
        if value is None:
            assert result is None
            continue
        finite = value[value.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 0.0
        assert result.dtype == value.dtype and not result.requires_grad
        torch.testing.assert_close(result, value, rtol=0, atol=tolerance * max(scale, 1.0), equal_nan=True, msg=name)


@pytest.mark.parametrize("structures", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_it_equals_autograd_through_the_references(
    direct_of: DirectOf, structures: list[Structure], shape: dict[str, Any]
) -> None:
    potential = make_potential(**shape)
    batch = to_batch(structures)
    expected = potential(batch, stress=True)
    assert_equal(direct_of(potential)(batch, stress=True), expected, TOLERANCE[torch.float64])
    single = direct_of(potential.float())(to_batch(structures, torch.float32), stress=True)
    dtypes = {name: value.dtype for name, value in vars(single).items()}
    assert dtypes == {name: torch.float64 if "energy" in name else torch.float32 for name in dtypes}
    widened = Prediction(**{name: value.double() for name, value in vars(single).items()})
    assert_equal(widened, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_masks_that_share_out_the_atoms_add_up_to_the_whole(direct_of: DirectOf, shape: dict[str, Any]) -> None:
    """A mask's forces are those of the energies it keeps: autograd through a sum over these atoms."""
    potential = make_potential(**shape)
    batch = to_batch(BATCHES["several, two fidelities"])
    whole = potential(batch, stress=True)
    first = torch.rand(batch.num_atoms, generator=torch.Generator().manual_seed(0)) < 0.5
    direct = direct_of(potential)
    for evaluate in (potential, direct, lambda *a, **k: direct(batch, direct.composition(batch), **k)):
        parts = [evaluate(batch, stress=True, owned_N=mask) for mask in (first, ~first)]
        added = {name: getattr(parts[0], name) + getattr(parts[1], name) for name in vars(whole)}
        assert_equal(Prediction(**added), whole, TOLERANCE[torch.float64])
        assert torch.equal(parts[0].atomic_energy != 0, first)
        energies = evaluate(batch, forces=False, owned_N=first)
        torch.testing.assert_close(energies.energy, parts[0].energy, rtol=0, atol=1e-10)
    positions = batch.positions.clone().requires_grad_()
    moving = dataclasses.replace(batch, positions=positions)
    energy_N = potential.train()(moving, forces=False).atomic_energy
    (gradient,) = torch.autograd.grad(energy_N[first].sum(), positions)
    torch.testing.assert_close(parts[0].forces, -gradient, rtol=0, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("structures", BATCHES.values(), ids=BATCHES.keys())
def test_it_equals_autograd_through_the_references_on_a_gpu(structures: list[Structure]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    potential, batch = make_potential().cuda(), to_batch(structures).to("cuda")
    with use_backend("native"):
        operations = operations_of(potential)
    assert operations is not None
    found = DirectPotential(potential, operations)(batch, stress=True)
    assert_equal(found, potential(batch, stress=True), TOLERANCE[torch.float64])


def test_what_is_not_asked_for_is_none_and_a_composition_is_of_any_geometry(direct_of: DirectOf) -> None:
    potential = make_potential()
    direct, batch = direct_of(potential), to_batch(BATCHES["several, two fidelities"])
    for asked in ({"forces": False}, {"stress": True, "forces": False}, {}):
        assert_equal(direct(batch, **asked), potential(batch, **asked), TOLERANCE[torch.float64])
    moved = dataclasses.replace(batch, positions=batch.positions + 0.01 * torch.randn_like(batch.positions))
    assert_equal(direct(moved, direct.composition(batch)), potential(moved), TOLERANCE[torch.float64])


@pytest.mark.parametrize("changes", [{"l_max": 1}, {"l_max": 2}, {"num_radial": 5, "channels": 48}])
def test_other_sizes(direct_of: DirectOf, changes: dict[str, int]) -> None:
    potential, batch = make_potential(**changes), to_batch(BATCHES["several, two fidelities"])
    expected = potential(batch, stress=True)
    assert_equal(direct_of(potential)(batch, stress=True), expected, TOLERANCE[torch.float64])


def test_forces_are_the_finite_difference_of_the_energy(direct_of: DirectOf) -> None:
    direct, batch = direct_of(make_potential()), to_batch(BATCHES["several, two fidelities"])
    forces = direct(batch).forces
    assert forces is not None
    for atom, axis in ((0, 1), (5, 2), (9, 0)):
        energies = []
        for step in (1e-4, -1e-4):
            positions = batch.positions.clone()
            positions[atom, axis] += step
            energies.append(direct(dataclasses.replace(batch, positions=positions), forces=False).energy.sum())
        expected = -(energies[0] - energies[1]) / 2e-4
        torch.testing.assert_close(forces[atom, axis], expected, rtol=1e-6, atol=1e-6)


def test_it_is_a_snapshot(direct_of: DirectOf) -> None:
    potential, batch = make_potential(), to_batch(BATCHES["one molecule"])
    direct = direct_of(potential)
    before = direct(batch)
    train(potential)
    assert_equal(direct(batch), before, 0.0)
    assert_equal(direct_of(potential)(batch), potential(batch), TOLERANCE[torch.float64])


@pytest.fixture
def native() -> Iterator[None]:
    """Compute with the native kernels, skip where they cannot be built."""
    skip_without_compiler()
    with use_backend("native"):
        yield


def test_predict_always_uses_the_weights_as_they_are(native: None) -> None:
    potential, structures = make_potential(), BATCHES["one molecule"]
    for _ in range(2):
        [found] = predict(potential, structures, "low")
        expected = potential(to_batch(structures))
        assert found.energy == pytest.approx(expected.energy.item(), abs=1e-9)
        np.testing.assert_allclose(found.forces, expected.forces.numpy(), atol=1e-9)
        train(potential)


def test_the_calculator_follows_what_it_is_given(native: None) -> None:
    """One calculator keeps what does not depend on the geometry, as long as it may."""
    potential = make_potential()
    calculator = RungCalculator(Checkpoint(potential, {}, {}, None), "low", dtype="float64")
    atoms, other = molecule("CH3CH2OH"), molecule("C2H2")
    found = []
    for target, charge in ((atoms, 0), (atoms, 0), (atoms, 1), (other, 0), (atoms, 0)):
        target.positions += 0.01
        target.positions[0] += 0.01
        target.info["charge"], target.calc = charge, calculator
        found.append(target.get_potential_energy())
        structure = Structure("a", "a", target.numbers.astype(np.uint8), target.positions, charge=charge)
        [expected] = predict(potential, [structure], "low")
        assert found[-1] == pytest.approx(expected.energy, abs=1e-9)
        np.testing.assert_allclose(target.get_forces(), expected.forces, atol=1e-9)
    assert len(set(found)) == len(found)
    crystal = bulk("C", "diamond", a=3.6)
    crystal.rattle(0.05, seed=1)
    crystal.calc = calculator
    found_stress = crystal.get_stress()
    with use_backend("reference"):
        calculator.reset()  # type: ignore[no-untyped-call]
        np.testing.assert_allclose(found_stress, crystal.get_stress(), atol=1e-12)


def test_dynamics_conserve_energy(native: None) -> None:
    """The error of velocity Verlet, which is of second order in the time step, is all that is seen."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = RungCalculator(Checkpoint(make_potential(), {}, {}, None), "low", dtype="float64")
    width = np.sqrt(300 * units.kB / atoms.get_masses())[:, None]  # Maxwell-Boltzmann at 300 K
    atoms.set_velocities(width * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    start, changes = atoms.get_total_energy(), []
    for time_step in (0.25, 0.125):
        moving = atoms.copy()
        moving.calc = atoms.calc
        VelocityVerlet(moving, time_step * units.fs).run(round(10 / time_step))
        changes.append(abs(moving.get_total_energy() - start))
    assert changes[1] < 1e-2 * atoms.get_kinetic_energy()
    assert changes[1] < changes[0] / 3


def train(potential: Potential) -> None:
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter *= 1.01
