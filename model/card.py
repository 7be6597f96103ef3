"""The model card: what a checkpoint is, what it was trained on and where its limits are, for its README.md.

Also what of rung.yaml others may see (`without_secrets`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

# Licences that a Hugging Face hub knows by these names; any other is "other" with a name of its own.
HUB_LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense",
)  # fmt: skip

WITHHELD = "(withheld)"
_SECRET = (
    r"(?:token|secret|password|passwd|passphrase|credentials?|authorization|(?:api|access|secret|private)?[_-]?key)"
)
_SECRET_NAME = re.compile(rf"(?:.*[_.-])?{_SECRET}(?:[_.-].*)?", re.IGNORECASE)
_SECRET_TEXTS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        # user:password@ of an address; the second form has a '/' or '?' in the password. A path may have an '@', too.
        (r"://(?:[^\s/?#]*|[^\s/?#:@]*:(?!\d*(?:[/?#\s]|$))\S*)@", "://"),
        (r"([a-z][a-z0-9+.-]*://[^\s?#]*)[?#]\S*", r"\1"),
        (r"(\bauthorization[\"']?\s*[:=]\s*)[^\n\"']+", rf"\1{WITHHELD}"),
        (r"(\bbearer\s+)\S+", rf"\1{WITHHELD}"),
        (
            rf"((?<![a-z])(?:[a-z0-9]+[_-])*{_SECRET}(?:[_-][a-z0-9]+)*[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+",
            rf"\1{WITHHELD}",
        ),
        (rf"(--(?:[a-z0-9]+-)*{_SECRET}\s+)\S+", rf"\1{WITHHELD}"),
    )
)


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


def data_licences(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the distinct (data set, licence), "" where none is stated.

    Entries with the same digest are the same data, whatever they are called; of those without one nothing is known
    but what they say.
    """
    stated = {data_digest(data): data["licence"] for data in info["datasets"] if data.get("licence")}
    stated.pop(None, None)
    pairs = (
        (str(data.get("name", "unnamed")), data.get("licence") or stated.get(data_digest(data), ""))
        for data in info["datasets"]
    )
    return list(dict.fromkeys(pairs))


def data_digest(dataset: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of a file or of a dataset's manifest, from an entry of `datasets`; None where it has none."""
    return dataset.get("manifest_sha256") or dataset.get("sha256")


def without_secrets(value: Any) -> Any:
    """Return rung.yaml's contents without passwords, tokens, the queries of addresses and the commands of shards."""
    if isinstance(value, dict):
        return {
            key: WITHHELD if item and _SECRET_NAME.fullmatch(str(key)) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return f"pipe:{WITHHELD}"
    for pattern, replacement in _SECRET_TEXTS:
        value = pattern.sub(replacement, value)
    return value


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
    unstated = [name for name, licence in data_licences(info) if not licence]
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
        *(
            _evaluation_row(name, metrics)
            for name, metrics in sorted(evaluation.items())
            if isinstance(metrics, Mapping)
        ),
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
