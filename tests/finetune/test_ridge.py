"""Ridge regression: against Gaussian-process formulas in the space of rows, and on labels that it can explain."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import multivariate_normal

from rung.data.reaction import Reaction
from rung.data.structure import Structure
from rung.finetune import reference, ridge
from rung.finetune.calibration import last_layer_scores
from rung.finetune.dataset import absolute_rows
from rung.model.potential import Potential
from rung.model.predict import predict, reaction_energies

both_conditionings = pytest.mark.parametrize("potential", ["film", "heads"], indirect=True)
LAYERS, ELEMENTS = 2, 3


@pytest.fixture
def arrays() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Derivatives, residuals and numbers of atoms of 30 rows with 2 x 5 read-outs and 3 elements."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 6, (30, ELEMENTS)).astype(np.float64)
    features = counts.sum(1)[:, None] * generator.normal(0, [1.0] * 5 + [0.2] * 5, (30, 10))
    x = np.concatenate([features, counts], axis=1)
    y = x @ np.concatenate([generator.normal(0, 0.05, 10), [0.3, -2.0, 1.0]]) + 0.02 * counts.sum(1) * generator.normal(
        size=30
    )
    return x, y, counts.sum(1)


def gaussian_process(
    regression: ridge.Regression, x: NDArray[np.float64], log_noise: float, log_prior: list[float]
) -> NDArray[np.float64]:
    """Return the covariance of the rows' energies per atom: the same model, seen from its labels."""
    return x @ np.diag(regression.widths(log_prior) ** 2) @ x.T + np.exp(2 * log_noise) * np.eye(len(x))


def test_mean_and_variance_are_those_of_a_gaussian_process(arrays) -> None:  # type: ignore[no-untyped-def]
    x, y, atoms = arrays
    regression = ridge.Regression.from_arrays(x, y, atoms, LAYERS, ELEMENTS)
    log_noise, log_prior = np.log(0.02), [np.log(0.1), np.log(0.3), np.log(2.0)]
    found = regression.posterior(log_noise, log_prior)
    covariance = gaussian_process(regression, x / atoms[:, None], log_noise, log_prior)
    new = np.random.default_rng(1).normal(size=(4, x.shape[1]))
    cross = new @ np.diag(regression.widths(log_prior) ** 2) @ (x / atoms[:, None]).T
    np.testing.assert_allclose(new @ found.change, cross @ np.linalg.solve(covariance, y / atoms), rtol=1e-7)
    prior = new @ np.diag(regression.widths(log_prior) ** 2) @ new.T
    expected = prior - cross @ np.linalg.solve(covariance, cross.T)
    np.testing.assert_allclose(new @ found.covariance @ new.T, expected, rtol=1e-6, atol=1e-7)


def test_the_evidence_is_the_density_of_the_labels_and_is_maximal(  # type: ignore[no-untyped-def]
    arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, atoms = arrays
    regression = ridge.Regression.from_arrays(x, y, atoms, LAYERS, ELEMENTS)

    def density(log_noise: float, log_prior: list[float]) -> float:
        covariance = gaussian_process(regression, x / atoms[:, None], log_noise, log_prior)
        return float(multivariate_normal.logpdf(y / atoms, cov=covariance))

    points = [(np.log(0.02), np.log([0.1, 0.3, 2.0]).tolist()), (np.log(0.1), np.log([0.5, 0.05, 1.0]).tolist())]
    differences = [density(*point) - regression.evidence(*point) for point in points]
    assert differences[0] == pytest.approx(differences[1], abs=1e-6)

    monkeypatch.setattr(ridge, "WIDTH_LOG_STD", 1e6)  # the evidence alone
    best = regression.most_evident()
    largest = regression.evidence(best[0], best[1:].tolist())
    assert np.exp(best[0]) == pytest.approx(0.02, rel=0.4)  # the noise that the labels have
    for index in range(len(best)):
        for step in (-0.1, 0.1):
            moved = best.copy()
            moved[index] += step
            assert regression.evidence(moved[0], moved[1:].tolist()) <= largest + 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_a_handful_of_labels_does_no_harm(potential: Potential, harder: list[Structure], count: int) -> None:
    """With fewer rows than elements and features everything can be explained: the parent must be kept."""
    rows, test = absolute_rows(harder[:count], "high"), absolute_rows(harder[8:], "high")
    known = set(reference.elements_of(rows))
    test = [row for row in test if set(reference.elements_of([row])) <= known]
    start = reference.with_new_fidelity(potential, "high", reference.choose_parent(potential, rows, ["low"])[0])
    regressed = copy.deepcopy(start)
    ridge.regress(start, rows, "high").apply(regressed, "high")
    labels = np.array([row.energy for row in test])
    before, after = (np.abs(reaction_energies(p, test, "high") - labels).mean() for p in (start, regressed))
    assert after < 1.3 * before + 1e-3


def test_what_no_label_depends_on_is_kept_and_has_no_variance(arrays) -> None:  # type: ignore[no-untyped-def]
    x, y, atoms = arrays
    x = x.copy()
    x[:, -1] = 0.0
    fit = ridge.Regression.from_arrays(x, y, atoms, LAYERS, ELEMENTS).posterior(np.log(0.02), [0.0, 0.0, 0.0])
    assert fit.change[-1] == 0 and not fit.covariance[-1].any()


def test_features_or_labels_that_are_not_finite_are_refused(arrays) -> None:  # type: ignore[no-untyped-def]
    x, y, atoms = arrays
    with pytest.raises(ValueError, match="ridge: expected finite features and labels"):
        ridge.Regression.from_arrays(x, np.where(y > 0, np.nan, y), atoms, LAYERS, ELEMENTS)


@both_conditionings
def test_derivatives_are_exact_for_any_change(potential: Potential, shifted: list[Structure]) -> None:
    potential.add_fidelity("high", "low")
    potential.double()
    phi = ridge.derivatives(potential, absolute_rows(shifted, "high"), "high")
    change = np.random.default_rng(0).normal(0, 0.3, phi.shape[1])
    before = np.array([p.energy for p in predict(potential, shifted, "high")])
    others = np.array([p.energy for p in predict(potential, shifted, "other")])
    potential.change_readouts("high", torch.from_numpy(change))
    after = np.array([p.energy for p in predict(potential, shifted, "high")])
    np.testing.assert_allclose(after - before, phi @ change, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal([p.energy for p in predict(potential, shifted, "other")], others)


@both_conditionings
def test_labels_of_changed_readouts_are_learned_from_total_and_relative_energies(
    potential: Potential, shifted: list[Structure]
) -> None:
    """The labels are another read-out of the same features: what is held out must be predicted, too."""
    potential.add_fidelity("high", "low")
    truth = copy.deepcopy(potential)
    size = ridge.derivatives(potential, absolute_rows(shifted[:1], "high"), "high").shape[1]
    change = np.random.default_rng(0).normal(0, 0.1, size)
    truth.change_readouts("high", torch.from_numpy(change))
    energies = [p.energy for p in predict(truth, shifted, "high")]
    rows = [Reaction.absolute(s, energy) for s, energy in zip(shifted, energies, strict=True)]
    relative = [
        Reaction(f"{a.key} -> {b.key}", a.group, (b.structures[0], a.structures[0]), (1.0, -1.0), b.energy - a.energy)
        for a, b in zip(rows[:8], rows[8:16], strict=True)
    ]
    fit = ridge.regress(potential, [*rows[8:24], *relative], "high")
    learned = copy.deepcopy(potential)
    fit.apply(learned, "high")
    held = rows[24:]
    labels = np.array([row.energy for row in held])
    errors = [np.abs(reaction_energies(p, held, "high") - labels).mean() for p in (potential, learned)]
    assert errors[1] < 0.1 * errors[0]


def test_the_deviation_grows_away_from_the_labels(potential: Potential, harder: list[Structure]) -> None:
    """Stretched molecules of other compositions are less certain than those that were learned."""
    potential.add_fidelity("high", "low")
    known = absolute_rows([s for s in harder if s.group in ("CH4", "C2H6", "C2H4")], "high")
    other = absolute_rows([s for s in harder if s.group in ("H2O2", "HCOOH")], "high")
    posterior = ridge.posterior(potential, known, "high", ridge.regress(potential, known, "high"))
    near, far = (last_layer_scores(potential, posterior, rows, "high") for rows in (known, other))
    assert (far.std / far.num_atoms).min() > 3 * (near.std / near.num_atoms).max()
