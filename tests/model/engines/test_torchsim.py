"""The model in torch-sim's own checks, integrators, optimizers and autobatchers, against the ASE calculator."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

from rung.model.ase_calculator import RungCalculator
from rung.model.checkpoint import Checkpoint
from rung.model.config import ModelConfig
from rung.model.potential import Potential

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script and vesin.torch, as it is imported
    torch_sim = pytest.importorskip("torch_sim", reason="needs rung[torchsim]")

from torch_sim.models.interface import validate_model_outputs  # noqa: E402

from rung.model.engines.torchsim import RungModel  # noqa: E402

CPU = torch.device("cpu")
CHANNELS = [pytest.param(4, id="reference"), pytest.param(16, id="native")]  # few channels run on the reference
NATIVE = pytest.mark.parametrize("checkpoint", CHANNELS[1:], indirect=True)


@pytest.fixture(params=CHANNELS)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    """Return a small smooth potential in which fidelity, charge and multiplicity matter."""
    shape = {"elements": (1, 6, 8, 14, 26), "fidelities": ("low", "high")}
    states = {"charges": (0, 1), "multiplicities": (1, 2)}
    sizes = {"channels": request.param, "num_radial": 4, "fidelity_dim": 4, "readout_hidden": 4}
    potential = Potential(ModelConfig(**shape, **states, **sizes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in potential.parameters():
            if not parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    potential.set_reference("low", {1: -13.6, 6: -1027.0, 8: -2040.0, 14: -7800.0, 26: -34000.0})
    potential.set_reference("high", {1: -13.7, 6: -1029.5})
    potential.set_scale(5.0)
    return Checkpoint(potential.eval(), info={}, evaluation={}, raw_state=None)


@pytest.fixture
def molecules() -> list[Atoms]:
    """Return displaced molecules of different sizes, one of them a radical cation."""
    frames = [molecule(name) for name in ("CH3CH2OH", "H2O", "CH4")]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.05, seed=seed)
    frames[1].info.update(charge=1, multiplicity=2)
    return frames


@pytest.fixture
def crystals() -> list[Atoms]:
    """Return two strained, displaced diamonds, with neighbours across all faces."""
    frames = [bulk("C", "diamond", a=3.6), bulk("C", "diamond", a=3.5).repeat((2, 1, 1))]
    strain = np.eye(3) + [[0.02, 0.01, 0], [0, -0.03, 0.02], [0, 0, 0.01]]
    for seed, atoms in enumerate(frames):
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.rattle(0.05, seed=seed)
    return frames


def cation_model(checkpoint: Checkpoint, **options: Any) -> RungModel:
    """Return a model that knows what `molecules` says of water."""
    settings = {"charge": {"OH2": 1}, "multiplicity": {"H2O": 2}, "dtype": torch.float64} | options
    return RungModel(checkpoint, "low", **settings)


def state_of(frames: list[Atoms], dtype: torch.dtype = torch.float64) -> Any:
    return torch_sim.io.atoms_to_state(frames, CPU, dtype)


def by_ase(checkpoint: Checkpoint, frames: list[Atoms], fidelity: str = "low") -> tuple[list[float], Tensor, Tensor]:
    """Return energies, forces of all atoms and (periodic) stresses by the calculator, in float64."""
    energies, forces, stresses = [], [], []
    calculator = RungCalculator(checkpoint, fidelity, dtype="float64")
    for atoms in frames:
        atoms = atoms.copy()
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(torch.from_numpy(atoms.get_forces()))
        stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else np.full((3, 3), np.nan)
        stresses.append(torch.from_numpy(stress))
    return energies, torch.cat(forces), torch.stack(stresses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_sims_own_check_passes(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    model = RungModel(checkpoint, "low", dtype=dtype, compute_forces=False, compute_stress=False)
    validate_model_outputs(model, CPU, dtype)
    assert model.compute_forces and model.compute_stress  # the check switched them on


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", ["molecules", "crystals"])
def test_a_batch_equals_the_calculator(
    kind: str, dtype: torch.dtype, tolerance: float, checkpoint: Checkpoint, request: pytest.FixtureRequest
) -> None:
    frames = request.getfixturevalue(kind)
    results = cation_model(checkpoint, dtype=dtype)(state_of(frames, dtype))
    energies, forces, stress = by_ase(checkpoint, frames)
    assert results["energy"].dtype == torch.float64 and results["forces"].dtype == results["stress"].dtype == dtype
    assert results["energy"].tolist() == pytest.approx(energies, abs=tolerance)
    torch.testing.assert_close(results["forces"].double(), forces, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(results["stress"].double(), stress, atol=tolerance, rtol=tolerance, equal_nan=True)


def test_fidelity_charge_and_multiplicity_matter(checkpoint: Checkpoint) -> None:
    water = molecule("H2O")
    state = state_of([water, molecule("CH4")])
    neutral, cation = RungModel(checkpoint, "low", dtype=torch.float64)(state), cation_model(checkpoint)(state)
    assert neutral["energy"][0] != cation["energy"][0] and neutral["energy"][1] == cation["energy"][1]
    everywhere = RungModel(checkpoint, "low", charge=1, multiplicity=2, dtype=torch.float64)(state)
    assert everywhere["energy"][0] == pytest.approx(cation["energy"][0].item())
    assert everywhere["energy"][1] != cation["energy"][1]
    methane = state_of([molecule("CH4")])
    high = RungModel(checkpoint, "high", dtype=torch.float64)(methane)["energy"]
    assert high.tolist() == pytest.approx(by_ase(checkpoint, [molecule("CH4")], "high")[0], abs=1e-9)


def test_a_box_around_molecules_without_periodicity_changes_nothing(
    checkpoint: Checkpoint, molecules: list[Atoms]
) -> None:
    model = cation_model(checkpoint)
    free = model(state_of(molecules))
    for atoms in molecules:
        atoms.set_cell([4.0, 4.0, 4.0])
    boxed = model(state_of(molecules))
    assert torch.equal(free["energy"], boxed["energy"]) and torch.equal(free["forces"], boxed["forces"])
    assert boxed["stress"].isnan().all()


@NATIVE
@pytest.mark.parametrize("kind", ["molecules", "crystals"])
def test_dynamics_of_several_systems_conserve_the_energy_and_equal_ase(
    kind: str, checkpoint: Checkpoint, request: pytest.FixtureRequest
) -> None:
    frames, model = request.getfixturevalue(kind), cation_model(checkpoint)
    start, step = torch_sim.nve(
        model, dt=torch.tensor(0.2 * 1e-3 * torch_sim.units.UnitSystem.metal.time), kT=torch.tensor(0.03), seed=1
    )
    state = start(state_of(frames))
    totals, potentials = [], []
    for number in range(41):
        if number % 20 == 0:
            moved = [atoms.copy() for atoms in frames]
            for atoms, now in zip(moved, state.to_atoms(), strict=True):
                atoms.positions, atoms.cell = now.positions, now.cell
            energies, forces, _ = by_ase(checkpoint, moved)
            assert state.energy.tolist() == pytest.approx(energies, abs=1e-5)
            torch.testing.assert_close(state.forces, forces, atol=1e-5, rtol=0)
        kinetic = torch_sim.calc_kinetic_energy(momenta=state.momenta, masses=state.masses, system_idx=state.system_idx)
        potentials.append(state.energy.clone())
        totals.append(state.energy + kinetic)
        state = step(state)
    drift, swing = torch.stack(totals), torch.stack(potentials)
    assert ((swing.amax(0) - swing.amin(0)) > 1e-3).all()  # the atoms did move
    assert ((drift.amax(0) - drift.amin(0)) < 0.05 * (swing.amax(0) - swing.amin(0))).all()


@NATIVE
@pytest.mark.parametrize("batched", [False, True], ids=["together", "swapped in flight"])
def test_fire_finds_minima_of_molecules(checkpoint: Checkpoint, batched: bool) -> None:
    frames = [molecule(name) for name in ("O3", "H2O", "O2", "OH")]  # of the few that this potential binds
    model = RungModel(checkpoint, "low", dtype=torch.float64)
    batcher = torch_sim.InFlightAutoBatcher(model, memory_scales_with=model.memory_scales_with, max_memory_scaler=6)
    before = model(state_of(frames))["energy"]
    final = torch_sim.optimize(
        state_of(frames),
        model,
        optimizer=torch_sim.optimizers.fire,
        convergence_fn=torch_sim.generate_force_convergence_fn(0.02, include_cell_forces=False),
        max_steps=400,
        autobatcher=batcher if batched else False,
    )
    assert (final.energy < before).all()
    relaxed = final.to_atoms()
    assert [str(atoms.symbols) for atoms in relaxed] == [str(atoms.symbols) for atoms in frames]
    energies, forces, _ = by_ase(checkpoint, relaxed)
    assert final.energy.tolist() == pytest.approx(energies, abs=1e-5)
    assert forces.norm(dim=1).max() < 0.02


@NATIVE
@pytest.mark.filterwarnings("ignore:Optimize has reached max steps")
def test_a_cell_relaxes_to_lower_pressure(checkpoint: Checkpoint, crystals: list[Atoms]) -> None:
    model = RungModel(checkpoint, "low", dtype=torch.float64)
    before = model(state_of(crystals))
    final = torch_sim.optimize(
        state_of(crystals), model, optimizer=torch_sim.optimizers.frechet_cell_fire, max_steps=20, autobatcher=False
    )
    assert (final.energy < before["energy"]).all()
    energies, _, _ = by_ase(checkpoint, final.to_atoms())  # with its new cells
    assert final.energy.tolist() == pytest.approx(energies, abs=1e-5)


def test_states_that_change_between_calls_are_seen(checkpoint: Checkpoint, molecules: list[Atoms]) -> None:
    model = RungModel(checkpoint, "low", dtype=torch.float64)
    state = state_of(molecules)
    model(state)
    state.positions += 0.1 * torch.randn(state.positions.shape, dtype=torch.float64)
    state.atomic_numbers[0] = 8  # in place: ethanol's first carbon
    fresh = RungModel(checkpoint, "low", dtype=torch.float64)(state)
    assert torch.equal(model(state)["energy"], fresh["energy"])
    fewer = state_of(molecules[:2])
    assert model(fewer)["energy"].shape == (2,)


def test_a_dictionary_is_a_state(checkpoint: Checkpoint, molecules: list[Atoms]) -> None:
    model, state = cation_model(checkpoint), state_of(molecules)
    names = ("positions", "cell", "pbc", "atomic_numbers", "system_idx")
    results = model({name: getattr(state, name) for name in names})
    assert torch.equal(results["energy"], model(state)["energy"])


def test_what_is_switched_off_is_not_there(checkpoint: Checkpoint, crystals: list[Atoms]) -> None:
    model = RungModel(checkpoint, "low", dtype=torch.float64, compute_forces=False, compute_stress=False)
    assert model(state_of(crystals)).keys() == {"energy"}
    model.compute_stress = True
    assert model(state_of(crystals)).keys() == {"energy", "stress"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fidelity": "lo"}, "did you mean 'low'"),
        ({"fidelity": None}, "name one: low, high"),
        ({"dtype": torch.float16}, "dtype: expected torch.float32 or torch.float64, found torch.float16"),
        ({"device": "nothing"}, "device 'nothing'"),
        ({"charge": {"water": 1}}, "charge: 'water' is not a chemical formula"),
    ],
)
def test_bad_options_are_errors(options: dict[str, Any], message: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=message):
        RungModel(checkpoint, **{"fidelity": "low", **options})


def test_bad_states_are_errors_that_name_the_system(checkpoint: Checkpoint) -> None:
    model = RungModel(checkpoint, "low")
    methane, helium = molecule("CH4"), Atoms("He")
    with pytest.raises(ValueError, match=r"'He \(system 1\)': fidelity 'low' was not trained on He"):
        model(state_of([methane, helium], torch.float32))
    with pytest.raises(ValueError, match=r"expected the model's torch.float32 on cpu, found torch.float64 on cpu"):
        model(state_of([methane]))
    with pytest.raises(ValueError, match=r"'CH4 \(system 0\)': charge 5 is not known"):
        RungModel(checkpoint, "low", charge=5)(state_of([methane], torch.float32))
    state = state_of([methane, methane], torch.float32)
    state.positions[7] = torch.nan
    with pytest.raises(ValueError, match=r"'CH4 \(system 1\)': expected finite numbers"):
        model(state)
    state.positions[7] = state.positions[6]
    with pytest.raises(ValueError, match=r"'CH4 \(system 1\)': .*same place"):
        model(state)
    with pytest.raises(ValueError, match="make a new one"):
        model.to(torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["molecules", "crystals"])
def test_a_gpu_gives_what_the_cpu_gives(kind: str, checkpoint: Checkpoint, request: pytest.FixtureRequest) -> None:
    state = state_of(request.getfixturevalue(kind))
    expected, model = cation_model(checkpoint)(state), cation_model(checkpoint, device="cuda")
    moved = state.clone().to(torch.device("cuda"))
    for _ in range(3):  # periodic systems keep neighbours from the second call on
        results = {name: value.cpu() for name, value in model(moved).items()}
    torch.testing.assert_close(results, expected, atol=1e-9, rtol=1e-9, equal_nan=True)
