"""Temperatures: among how many degrees of freedom the kinetic energy is shared out.

Where the total momentum (in a molecule, the angular momentum too) is conserved and was taken away, the motion of the
structure as a whole never gets its share, and the temperature is that of the other degrees of freedom.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

STRAIGHT = 1e-3  # a molecule is linear where its radius of gyration about one axis is so small, of that about another
UNTOUCHED = 1e-6  # of a motion, by a constraint


def whole_motions(atoms: Atoms) -> NDArray[np.float64]:
    """Return the motions of a structure as a whole that its constraints let through.

    [K, 3 n], orthonormal, of mass-weighted coordinates: three translations and, where nothing is periodic, the two or
    three rotations.
    """
    roots = np.sqrt(atoms.get_masses())[:, None]
    motions = _orthonormal([roots * axis for axis in np.eye(3)])
    if not atoms.pbc.any():
        centred = atoms.positions - atoms.get_center_of_mass()
        motions = np.concatenate([motions, _orthonormal([roots * np.cross(axis, centred) for axis in np.eye(3)])])
    if not atoms.constraints:
        return motions
    stopped = np.array([motion - _constrained(atoms, motion * roots.repeat(3)) for motion in motions])
    left, singular, _ = np.linalg.svd(stopped, full_matrices=False)
    let_through: NDArray[np.float64] = left[:, singular < UNTOUCHED].T @ motions
    return let_through


def resting(atoms: Atoms) -> NDArray[np.float64]:
    """Return the momenta [n, 3] without the motion of the structure as a whole."""
    roots = np.sqrt(atoms.get_masses())[:, None]
    weighted, motions = (atoms.get_momenta() / roots).ravel(), whole_motions(atoms)
    momenta: NDArray[np.float64] = roots * (weighted - (motions @ weighted) @ motions).reshape(-1, 3)
    return momenta


@dataclass(frozen=True)
class Freedom:
    """The degrees of freedom that a temperature is of."""

    count: int
    whole: int  # of the structure as a whole, not counted
    all: int  # 3 n less those of constraints, as ASE counts

    @staticmethod
    def of(atoms: Atoms, *, whole: bool) -> Freedom:
        """Count those of a structure; `whole`: its motion as a whole has its share of the kinetic energy.

        A lone atom has no other motion, so that it counts.
        """
        every = int(atoms.get_number_of_degrees_of_freedom())
        left_out = 0 if whole else len(whole_motions(atoms))
        left_out = 0 if left_out >= every else left_out
        return Freedom(every - left_out, left_out, every)

    def temperature(self, atoms: Atoms) -> float:
        """Return the temperature in K; that of a structure which cannot move is 0."""
        momenta = resting(atoms) if self.whole else atoms.get_momenta()
        kinetic = float((momenta**2 / (2 * atoms.get_masses()[:, None])).sum())
        return 2 * kinetic / (self.count * units.kB) if self.count else 0.0

    def __str__(self) -> str:
        if not self.whole:
            return f"{self.count} degrees of freedom"
        return (
            f"{self.count} degrees of freedom, {self.whole} less than ASE's get_temperature(): the structure as a "
            "whole has no share"
        )


def _orthonormal(rows: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    _, singular, vectors = np.linalg.svd(np.array([row.ravel() for row in rows]), full_matrices=False)
    independent: NDArray[np.float64] = vectors[singular > STRAIGHT * singular.max()]
    return independent


def _constrained(atoms: Atoms, momenta: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what constraints leave of momenta [3 n], mass-weighted."""
    momenta = momenta.reshape(-1, 3).copy()
    for constraint in atoms.constraints:
        constraint.adjust_momenta(atoms, momenta)
    weighted: NDArray[np.float64] = momenta / np.sqrt(atoms.get_masses())[:, None]
    return weighted.ravel()
