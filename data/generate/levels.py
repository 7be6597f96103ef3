"""The levels of theory the label engine computes: one row per fidelity, each by a well-kept library.

Positions enter in angstrom and leave as eV and eV/angstrom; the libraries work in atomic units. Both conversions use
`ase.units` (CODATA 2014), here and nowhere else. A calculation that does not converge, or whose numbers cannot be
right, raises `LabelError`: the caller records the reason instead of a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rung.data.structure import MAX_FORCE

Settings = Mapping[str, Any]
# Energy in hartree and forces [n, 3] in hartree/bohr (None where the level has energies only).
AtomicUnits = tuple[float, NDArray[np.float64] | None]
Compute = Callable[[NDArray[np.uint8], NDArray[np.float64], int, Settings], AtomicUnits]

# 2S + 1 of the isolated atoms' ground states (NIST Atomic Spectra Database).
ATOM_MULTIPLICITY = {1: 2, 6: 3, 7: 4, 8: 3}


class LabelError(Exception):
    """A label could not be computed; the message is the reason that is counted."""


@dataclass(frozen=True)
class Level:
    """One level of theory and how it is computed; `settings` are all that is passed to the code."""

    name: str
    method: str
    basis: str
    dispersion: str
    code: str
    description: str
    has_forces: bool
    compute: Compute
    settings: Settings


def compute_label(
    level: Level, numbers: NDArray[np.uint8], positions: NDArray[np.float32], multiplicity: int = 1
) -> tuple[float, NDArray[np.float32] | None]:
    """Energy (eV) and forces [n, 3] (eV/angstrom) of a neutral molecule; no forces at energy-only levels or of an atom.

    Raises LabelError when the code does not converge, returns NaN, or a force exceeds MAX_FORCE.
    """
    from ase.units import Bohr, Hartree

    try:
        energy, forces = level.compute(numbers, positions.astype(np.float64) / Bohr, multiplicity, level.settings)
    except (ArithmeticError, RuntimeError, np.linalg.LinAlgError) as error:  # numerical trouble inside the code
        raise LabelError(f"{type(error).__name__} in {level.code}") from error
    if not np.isfinite(energy) or (forces is not None and not np.isfinite(forces).all()):
        raise LabelError("NaN or infinity in the result")
    if forces is None or len(numbers) == 1:
        return float(energy) * Hartree, None
    forces_ev = np.asarray(forces * (Hartree / Bohr), np.float32)
    if np.abs(forces_ev).max() > MAX_FORCE:
        raise LabelError(f"a force beyond {MAX_FORCE:g} eV/angstrom")
    return float(energy) * Hartree, forces_ev


def _tblite(
    numbers: NDArray[np.uint8], bohr: NDArray[np.float64], multiplicity: int, settings: Settings
) -> AtomicUnits:
    from tblite.exceptions import TBLiteRuntimeError
    from tblite.interface import Calculator

    calculator = Calculator(settings["method"], numbers.astype(np.int32), bohr, charge=0.0, uhf=multiplicity - 1)
    calculator.set("verbosity", 0)
    calculator.set("accuracy", settings["accuracy"])
    calculator.set("max-iter", settings["max_iter"])
    try:
        result = calculator.singlepoint()
    except TBLiteRuntimeError as error:
        raise LabelError("SCF not converged") from error
    return float(result.get("energy")), -np.asarray(result.get("gradient"))


def _molecule(numbers: NDArray[np.uint8], bohr: NDArray[np.float64], multiplicity: int, basis: str) -> Any:
    from pyscf import gto, lib

    lib.num_threads(1)
    atoms = [(int(number), position) for number, position in zip(numbers, bohr, strict=True)]
    return gto.M(atom=atoms, unit="Bohr", basis=basis, spin=multiplicity - 1, verbose=0, max_memory=4000)


def _converge(mean_field: Any, settings: Settings) -> Any:
    mean_field.conv_tol = settings["conv_tol"]
    mean_field.max_cycle = settings["max_cycle"]
    mean_field.chkfile = None  # nothing is restarted from disk
    mean_field.kernel()
    if not mean_field.converged:
        raise LabelError("SCF not converged")
    return mean_field


def _kohn_sham(
    numbers: NDArray[np.uint8], bohr: NDArray[np.float64], multiplicity: int, settings: Settings
) -> AtomicUnits:
    from pyscf import dft

    molecule = _molecule(numbers, bohr, multiplicity, settings["basis"])
    mean_field = (dft.RKS(molecule) if multiplicity == 1 else dft.UKS(molecule)).density_fit()
    mean_field.xc = settings["xc"]
    mean_field.grids.level = settings["grid_level"]
    _converge(mean_field, settings)
    if len(numbers) == 1:
        return float(mean_field.e_tot), None
    return float(mean_field.e_tot), -np.asarray(mean_field.nuc_grad_method().kernel())


def _hartree_fock(
    numbers: NDArray[np.uint8], bohr: NDArray[np.float64], multiplicity: int, settings: Settings
) -> tuple[Any, int]:
    """The converged reference and the number of frozen core orbitals (one 1s per heavy atom)."""
    from pyscf import scf

    molecule = _molecule(numbers, bohr, multiplicity, settings["basis"])
    mean_field = scf.RHF(molecule) if multiplicity == 1 else scf.UHF(molecule)
    return _converge(mean_field, settings), int((numbers > 2).sum())


def _moller_plesset(
    numbers: NDArray[np.uint8], bohr: NDArray[np.float64], multiplicity: int, settings: Settings
) -> AtomicUnits:
    from pyscf import mp

    mean_field, frozen = _hartree_fock(numbers, bohr, multiplicity, settings)
    if numbers.tolist() == [1]:
        return float(mean_field.e_tot), None  # one electron has no correlation energy
    correlated = mp.MP2(mean_field, frozen=frozen or None)
    correlated.kernel()
    if len(numbers) == 1:
        return float(correlated.e_tot), None
    return float(correlated.e_tot), -np.asarray(correlated.nuc_grad_method().kernel())


def _coupled_cluster(
    numbers: NDArray[np.uint8], bohr: NDArray[np.float64], multiplicity: int, settings: Settings
) -> AtomicUnits:
    from pyscf import cc

    mean_field, frozen = _hartree_fock(numbers, bohr, multiplicity, settings)
    if numbers.tolist() == [1]:
        return float(mean_field.e_tot), None
    correlated = cc.CCSD(mean_field, frozen=frozen or None)
    correlated.conv_tol = settings["cc_conv_tol"]
    correlated.conv_tol_normt = settings["cc_conv_tol_amplitudes"]
    correlated.max_cycle = settings["max_cycle"]
    correlated.kernel()
    if not correlated.converged:
        raise LabelError("CCSD not converged")
    return float(correlated.e_tot + correlated.ccsd_t()), None


_XTB = {"accuracy": 0.1, "max_iter": 250}
# Measured against exact integrals on formamide: 1 meV and 4 meV/angstrom; against the finest grid on acetaldehyde:
# 0.2 meV and 3 meV/angstrom.
_DFT = {"integrals": "density fitting", "grid_level": 3, "conv_tol": 1e-9, "max_cycle": 100}
_HF = {"basis": "cc-pvdz", "conv_tol": 1e-10, "max_cycle": 100}
_CC = {"cc_conv_tol": 1e-8, "cc_conv_tol_amplitudes": 1e-6}

LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level(
            name="gfn1_xtb",
            method="GFN1-xTB",
            basis="",
            dispersion="D3(BJ)",
            code="tblite",
            description="semi-empirical tight binding (10.1021/acs.jctc.7b00118)",
            has_forces=True,
            compute=_tblite,
            settings={"method": "GFN1-xTB", **_XTB},
        ),
        Level(
            name="gfn2_xtb",
            method="GFN2-xTB",
            basis="",
            dispersion="D4",
            code="tblite",
            description="semi-empirical tight binding (10.1021/acs.jctc.8b01176)",
            has_forces=True,
            compute=_tblite,
            settings={"method": "GFN2-xTB", **_XTB},
        ),
        Level(
            name="pbe_def2svp",
            method="PBE",
            basis="def2-SVP",
            dispersion="",
            code="PySCF",
            description="gradient-corrected density functional, density-fitted integrals",
            has_forces=True,
            compute=_kohn_sham,
            settings={"xc": "pbe", "basis": "def2-svp", **_DFT},
        ),
        Level(
            name="wb97x_631gd",
            method="wB97X",
            basis="6-31G*",
            dispersion="",
            code="PySCF",
            description="range-separated hybrid functional, density-fitted integrals (ANI-1x: exact)",
            has_forces=True,
            compute=_kohn_sham,
            settings={"xc": "wb97x", "basis": "6-31g*", **_DFT},
        ),
        Level(
            name="mp2_ccpvdz",
            method="MP2",
            basis="cc-pVDZ",
            dispersion="",
            code="PySCF",
            description="second-order perturbation theory on Hartree-Fock, frozen core",
            has_forces=True,
            compute=_moller_plesset,
            settings=_HF,
        ),
        Level(
            name="ccsdt_ccpvdz",
            method="CCSD(T)",
            basis="cc-pVDZ",
            dispersion="",
            code="PySCF",
            description="coupled cluster on Hartree-Fock, frozen core, energies only",
            has_forces=False,
            compute=_coupled_cluster,
            settings={**_HF, **_CC},
        ),
    )
}
