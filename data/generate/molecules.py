"""The molecules of the built-in data: every small H, C, N, O molecule by enumeration, and common larger ones by name.

The enumeration covers neutral closed-shell molecules of one to three heavy atoms. Its rule, stated once here:

* valences C 4, N 3, O 2, no formal charges, no radicals; every connected graph of single, double and triple bonds;
* no O=O (its ground state is a triplet); three heteroatoms only with N in the middle and at least one O
  (nitrous acid stays, trioxidane and triazane go): the others fall apart rather than vibrate;
* a three-membered ring has at most one double bond, no triple bond and at least one carbon.

A molecule that passes but does not survive embedding or GFN2-xTB relaxation is dropped later and counted (sampling.py).
"""

from __future__ import annotations

from itertools import combinations_with_replacement, product

MAX_ENUMERATED_HEAVY_ATOMS = 3
_VALENCE = {"C": 4, "N": 3, "O": 2}

# Common molecules the enumeration does not reach: charge-separated resonance forms, and 4 to 7 heavy atoms.
COMMON: dict[str, str] = {
    "carbon monoxide": "[C-]#[O+]",
    "nitrous oxide": "N#[N+][O-]",
    "hydrazoic acid": "N=[N+]=[N-]",
    "diazomethane": "C=[N+]=[N-]",
    "fulminic acid": "C#[N+][O-]",
    "hydrogen isocyanide": "[C-]#[NH+]",
    "methyl isocyanide": "C[N+]#[C-]",
    "methyl azide": "CN=[N+]=[N-]",
    "methyl nitrite": "CON=O",
    "methyl cyanate": "COC#N",
    "formyl cyanide": "N#CC=O",
    "nitrosoethylene": "C=CN=O",
    "nitramide": "N[N+](=O)[O-]",
    "formohydroxamic acid": "O=CNO",
    "performic acid": "O=COO",
    "butatriene": "C=C=C=C",
    "propadienone": "C=C=C=O",
    "cyclopropenone": "O=C1C=C1",
    "cyclopropanone": "O=C1CC1",
    "methylenecyclopropene": "C=C1C=C1",
    "butane": "CCCC",
    "isobutane": "CC(C)C",
    "but-1-ene": "C=CCC",
    "isobutene": "C=C(C)C",
    "trans-but-2-ene": "C/C=C/C",
    "butadiene": "C=CC=C",
    "but-2-yne": "CC#CC",
    "vinylacetylene": "C=CC#C",
    "diacetylene": "C#CC#C",
    "cyclobutane": "C1CCC1",
    "cyclobutene": "C1=CCC1",
    "acetone": "CC(C)=O",
    "propanal": "CCC=O",
    "acrolein": "C=CC=O",
    "propynal": "C#CC=O",
    "acetic acid": "CC(=O)O",
    "methyl formate": "COC=O",
    "glyoxal": "O=CC=O",
    "carbonic acid": "OC(=O)O",
    "acetamide": "CC(N)=O",
    "N-methylformamide": "CNC=O",
    "urea": "NC(N)=O",
    "guanidine": "N=C(N)N",
    "acetamidine": "CC(=N)N",
    "isopropanol": "CC(C)O",
    "propan-1-ol": "CCCO",
    "methoxyethane": "CCOC",
    "ethylene glycol": "OCCO",
    "ethanolamine": "NCCO",
    "ethylenediamine": "NCCN",
    "trimethylamine": "CN(C)C",
    "nitromethane": "C[N+](=O)[O-]",
    "nitric acid": "O[N+](=O)[O-]",
    "methyl isocyanate": "CN=C=O",
    "acrylonitrile": "C=CC#N",
    "propionitrile": "CCC#N",
    "glycolonitrile": "N#CCO",
    "cyanogen": "N#CC#N",
    "cyanoacetylene": "C#CC#N",
    "cyanamide": "N#CN",
    "oxetane": "C1COC1",
    "azetidine": "C1CNC1",
    "cyclobutanone": "O=C1CCC1",
    "pentane": "CCCCC",
    "neopentane": "CC(C)(C)C",
    "cyclopentane": "C1CCCC1",
    "cyclopentadiene": "C1=CCC=C1",
    "isoprene": "C=CC(C)=C",
    "butanone": "CCC(C)=O",
    "glycine": "NCC(=O)O",
    "lactonitrile": "CC(O)C#N",
    "dimethylformamide": "CN(C)C=O",
    "oxalic acid": "O=C(O)C(=O)O",
    "pyrrole": "c1cc[nH]c1",
    "furan": "c1ccoc1",
    "imidazole": "c1c[nH]cn1",
    "pyrazole": "c1cn[nH]c1",
    "oxazole": "c1cocn1",
    "tetrahydrofuran": "C1CCOC1",
    "benzene": "c1ccccc1",
    "pyridine": "c1ccncc1",
    "pyrimidine": "c1cncnc1",
    "cyclohexane": "C1CCCCC1",
    "alanine": "CC(N)C(=O)O",
    "lactic acid": "CC(O)C(=O)O",
    "toluene": "Cc1ccccc1",
    "phenol": "Oc1ccccc1",
    "aniline": "Nc1ccccc1",
}


def molecules() -> list[str]:
    """Canonical SMILES of all molecules, enumerated and common, without duplicates, sorted."""
    return sorted(set(enumerate_small()) | {canonical(smiles) for smiles in COMMON.values()})


def canonical(smiles: str) -> str:
    """RDKit's canonical SMILES, the identity by which the data are split; ValueError if RDKit rejects it."""
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"SMILES '{smiles}': expected a valid molecule, found one that RDKit rejects; correct it")
    return str(Chem.MolToSmiles(molecule))


def enumerate_small(max_heavy_atoms: int = MAX_ENUMERATED_HEAVY_ATOMS) -> list[str]:
    """Canonical SMILES of H2 and all molecules of 1..`max_heavy_atoms` (<= 3) heavy atoms under the rule above."""
    if not 1 <= max_heavy_atoms <= MAX_ENUMERATED_HEAVY_ATOMS:
        raise ValueError(f"max_heavy_atoms: expected 1..{MAX_ENUMERATED_HEAVY_ATOMS}, found {max_heavy_atoms}")
    found = {"[H][H]"}
    for size in range(1, max_heavy_atoms + 1):
        pairs = [(i, j) for j in range(size) for i in range(j)]
        for elements in combinations_with_replacement("CNO", size):
            for orders in product(range(4), repeat=len(pairs)):
                bonds = {pair: order for pair, order in zip(pairs, orders, strict=True) if order}
                if _is_connected(size, bonds) and _is_wanted(elements, bonds):
                    found.add(_smiles(elements, bonds))
    return sorted(found)


def _is_connected(size: int, bonds: dict[tuple[int, int], int]) -> bool:
    return len(bonds) >= size - 1  # two bonds between three atoms always connect them


def _is_wanted(elements: tuple[str, ...], bonds: dict[tuple[int, int], int]) -> bool:
    """Whether the graph obeys the valences and the rule in the module's docstring."""
    for atom, element in enumerate(elements):
        if sum(order for pair, order in bonds.items() if atom in pair) > _VALENCE[element]:
            return False
    if any(order == 2 and elements[i] == elements[j] == "O" for (i, j), order in bonds.items()):
        return False
    is_ring = len(bonds) == 3
    num_hetero = sum(element != "C" for element in elements)
    if is_ring:
        return max(bonds.values()) < 3 and sum(order == 2 for order in bonds.values()) < 2 and num_hetero < 3
    if num_hetero == 3:
        middle = next(atom for atom in range(3) if sum(atom in pair for pair in bonds) == 2)
        return elements[middle] == "N" and "O" in elements
    return True


def _smiles(elements: tuple[str, ...], bonds: dict[tuple[int, int], int]) -> str:
    from rdkit import Chem

    order_names = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
    molecule = Chem.RWMol()
    for element in elements:
        molecule.AddAtom(Chem.Atom(element))
    for (i, j), order in bonds.items():
        molecule.AddBond(i, j, order_names[order])
    Chem.SanitizeMol(molecule)
    return str(Chem.MolToSmiles(molecule))
