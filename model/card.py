"""The model card: what a checkpoint is, what it was trained on and where its limits are, for its README.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

# Licences that a Hugging Face hub knows by these names; any other is "other" with a name of its own.
HUB_LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense",
)  # fmt: skip


def model_card(info: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Return the card in Markdown, written from rung.yaml's contents and the evaluation (set -> metrics).

    With `publication` (name, licence, repository) in `info` it begins with the YAML that a Hugging Face hub reads.
    """
    publication = info.get("publication", {})
    sections = [
        _front_matter(info, publication) if publication else [],
        [f"# {publication.get('name') or 'Interatomic potential, trained with Rung'}", ""],
        _summary(info, publication),
        _use(info, publication),
        _levels(info),
        _data(info),
        _errors(evaluation),
        _limits(info),
    ]
    return "\n".join(line for section in sections for line in section)


def data_licences(info: Mapping[str, Any]) -> dict[str, str]:
    """Return data set -> licence ("" where none is stated); entries with the same digest are the same data."""
    digest_keys = ("manifest_sha256", "sha256")
    digests = [next((data[key] for key in digest_keys if key in data), None) for data in info["datasets"]]
    stated = {sha: data["licence"] for sha, data in zip(digests, info["datasets"], strict=True) if data.get("licence")}
    licences: dict[str, str] = {}
    for sha, data in zip(digests, info["datasets"], strict=True):
        name = str(data.get("name", "unnamed"))
        licences[name] = data.get("licence") or stated.get(sha) or licences.get(name, "")
    return licences


def _front_matter(info: Mapping[str, Any], publication: Mapping[str, Any]) -> list[str]:
    licence = publication["licence"]
    known = licence.lower() in HUB_LICENCES
    values = {
        "license": licence.lower() if known else "other",
        **({} if known else {"license_name": licence.lower().replace(" ", "-")}),
        "library_name": "rung",
        "tags": ["chemistry", "interatomic-potential", "machine-learning-force-field", *info["fidelities"]],
    }
    return ["---", yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _summary(info: Mapping[str, Any], publication: Mapping[str, Any]) -> list[str]:
    model = info["model"]
    bars = ", ".join(f"{name} ({entry['kind']})" for name, entry in info.get("uncertainty", {}).items())
    return [
        *([f"- licence: {publication['licence']}"] if publication else []),
        f"- elements: {_symbols(model['elements'])}",
        f"- charges: {_join(model['charges'])}; spin multiplicities: {_join(model['multiplicities'])}",
        f"- cut-off: {model['cutoff']:g} angstrom per layer, {model['num_layers']} layers",
        f"- error bars of energies at: {bars or 'no level of theory'}",
        "- units: eV, eV/angstrom, eV/angstrom^3",
        f"- trained with Rung {info['versions']['rung']}, commit {info['git_commit'] or 'unknown'}",
        "",
    ]


def _use(info: Mapping[str, Any], publication: Mapping[str, Any]) -> list[str]:
    repository = publication.get("repository")
    name = f"{repository}@COMMIT" if repository else "path/to/this/folder"
    fidelity = info["model"]["fidelities"][0]
    lines = [
        "## Use",
        "",
        "    import rung.model",
        "    from rung.model.ase_calculator import RungCalculator",
        "",
        f'    checkpoint = rung.model.load("{name}")',
        f'    atoms.calc = RungCalculator(checkpoint, fidelity="{fidelity}")',
        "",
    ]
    if repository:
        lines += [
            "COMMIT stands for a commit of this repository (its history lists them); without `@COMMIT` the newest is",
            "taken and logged. Files are held to the digests in SHA256SUMS and kept on the machine.",
            "",
        ]
    if publication:
        lines += [
            f"`rung publish --verify {name}` computes the energies and forces in reference.json again and compares.",
            "",
        ]
    return lines


def _levels(info: Mapping[str, Any]) -> list[str]:
    return [
        "## Levels of theory",
        "",
        "| fidelity | method | basis | dispersion | code | elements |",
        "|---|---|---|---|---|---|",
        *(_fidelity_row(name, entry) for name, entry in info["fidelities"].items()),
        "",
        "Energies are totals of each method: compare structures at one level, never levels with one another.",
        "",
    ]


def _data(info: Mapping[str, Any]) -> list[str]:
    unstated = [name for name, licence in data_licences(info).items() if not licence]
    lines = ["## Training data", "", *(_dataset_line(dataset) for dataset in info["datasets"]), ""]
    if unstated:
        lines += [f"No licence is stated for: {', '.join(unstated)}.", ""]
    return lines


def _errors(evaluation: Mapping[str, Any]) -> list[str]:
    return [
        "## Errors on held-out structures",
        "",
        "| set | energies | energy MAE (meV/atom) | force MAE (meV/angstrom) |",
        "|---|---|---|---|",
        *(_evaluation_row(name, metrics) for name, metrics in evaluation.items() if isinstance(metrics, Mapping)),
        "",
    ]


def _limits(info: Mapping[str, Any]) -> list[str]:
    model = info["model"]
    reach = model["cutoff"] * model["num_layers"]
    return [
        "## Limits",
        "",
        "Only the elements listed for a fidelity, and the charges and multiplicities above, can be computed; others",
        "are an error. Structures unlike the training data may be wrong without warning. An atom feels others within",
        f"{reach:g} angstrom, through neighbours of neighbours; electrostatics and dispersion end there.",
        "",
    ]


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
