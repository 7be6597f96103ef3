"""The quickstart's table and summary; the runs behind them are tested in tests/pretrain and tests/finetune."""

from __future__ import annotations

from typing import Any

from rung.launch.quickstart import summarise, table


def metrics(force: float | None) -> dict[str, Any]:
    def errors(energy: float) -> dict[str, float | None]:
        return {"energy_mae_mev_per_atom": energy, "force_mae_mev_per_angstrom": force, "num_energies": 70}

    target = {"before": errors(3.0), "after": errors(1.25), "scratch": errors(20.0)}
    return {"target": target, "labels": 200, "fidelity": "mp2_ccpvdz", "plots": []}


def test_summary_has_both_ways_of_training() -> None:
    assert summarise(metrics(55.0)) == {
        "scratch": {"energy_mae_mev_per_atom": 20.0, "force_mae_mev_per_angstrom": 55.0},
        "finetuned": {"energy_mae_mev_per_atom": 1.25, "force_mae_mev_per_angstrom": 55.0},
        "labels": 200,
        "fidelity": "mp2_ccpvdz",
        "test_structures": 70,
    }


def test_table_says_what_was_measured() -> None:
    text = table(summarise(metrics(55.04)))
    assert "mp2_ccpvdz: trained on 200 energies (no forces), tested on 70 structures" in text
    scratch, finetuned = (line.split() for line in text.splitlines() if line.endswith("55.0"))
    assert scratch[-2:] == ["20.0", "55.0"] and finetuned[-2:] == ["1.2", "55.0"]


def test_a_fidelity_without_forces_says_so() -> None:
    assert "no labels" in table(summarise(metrics(None)))
