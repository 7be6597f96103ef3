"""The model card: what a checkpoint is, what it was trained on and where its limits are, for its README.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def model_card(info: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Return the card in Markdown, written from rung.yaml's contents and the evaluation (set -> metrics)."""
    model = info["model"]
    return "\n".join(
        [
            "# Interatomic potential, trained with Rung",
            "",
            f"- elements: {_symbols(model['elements'])}",
            f"- charges: {_join(model['charges'])}; spin multiplicities: {_join(model['multiplicities'])}",
            f"- cut-off: {model['cutoff']:g} angstrom per layer, {model['num_layers']} layers",
            "- units: eV, eV/angstrom, eV/angstrom^3",
            "",
            "## Levels of theory",
            "",
            "| fidelity | method | basis | dispersion | code | elements |",
            "|---|---|---|---|---|---|",
            *(_fidelity_row(name, entry) for name, entry in info["fidelities"].items()),
            "",
            "## Training data",
            "",
            *(_dataset_line(dataset) for dataset in info["datasets"]),
            "",
            "## Errors on held-out structures",
            "",
            "| set | energies | energy MAE (meV/atom) | force MAE (meV/angstrom) |",
            "|---|---|---|---|",
            *(_evaluation_row(name, metrics) for name, metrics in evaluation.items() if isinstance(metrics, Mapping)),
            "",
            "## Limits",
            "",
            "Only the elements listed for a fidelity can be computed at it. Structures unlike the training data may be",
            "wrong without warning. Interactions beyond the cut-off pass only from neighbour to neighbour.",
            "",
            "## Use",
            "",
            "    from rung.model.ase_calculator import RungCalculator",
            f'    atoms.calc = RungCalculator("path/to/this/folder", fidelity="{model["fidelities"][0]}")',
            "",
        ]
    )


def _symbols(numbers: Iterable[int]) -> str:
    from ase.data import chemical_symbols

    return ", ".join(chemical_symbols[number] for number in numbers)


def _join(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _fidelity_row(name: str, entry: Mapping[str, Any]) -> str:
    text = [entry[key] for key in ("method", "basis", "dispersion", "code")]
    cells = [name, *text, _symbols(entry["e0"])]
    return f"| {' | '.join(cells)} |"


def _dataset_line(dataset: Mapping[str, Any]) -> str:
    return "- " + ", ".join(f"{key}: {value}" for key, value in dataset.items())


def _evaluation_row(name: str, metrics: Mapping[str, Any]) -> str:
    shown = [metrics.get(key) for key in ("num_energies", "energy_mae_mev_per_atom", "force_mae_mev_per_angstrom")]
    return f"| {name} | {' | '.join('-' if value is None else f'{value:.4g}' for value in shown)} |"
