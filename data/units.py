"""Conversion factors to eV and angstrom (CODATA 2018), used where labels enter and nowhere else.

Values: E. Tiesinga et al., Rev. Mod. Phys. 93, 025010 (2021); the calorie is the thermochemical one, 4.184 J.
"""

HARTREE = 27.211386245988  # eV
BOHR = 0.529177210903  # angstrom
AVOGADRO_EV = 96485.33212331  # J/mol in one eV (Faraday constant)
KCAL_MOL = 4184.0 / AVOGADRO_EV  # eV
KJ_MOL = 1000.0 / AVOGADRO_EV  # eV
HARTREE_BOHR = HARTREE / BOHR  # eV/angstrom
# What one of a unit is in eV, for labels that name their unit.
ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": KCAL_MOL,
    "kJ/mol": KJ_MOL,
    "hartree": HARTREE,
    "rydberg": HARTREE / 2,
}
GPA = 1e9 / 1.602176634e-19 * 1e-30  # eV/angstrom^3
KBAR = GPA / 10  # eV/angstrom^3
