"""Every setting of a fine-tuning run.

The defaults were chosen on the built-in data: 200 MP2/cc-pVDZ energies, a checkpoint pretrained 2,000 steps on GFN1,
GFN2, PBE and wB97X, tested on 173 structures of 29 unseen molecules. Mean of three seeds, energy MAE (meV/atom) and
force MAE (meV/angstrom; no force was trained on), and how far the parent's own forces moved (RMS, meV/angstrom):

    parent + shift of E0                       67.6   372      0
    ridge                                      57.4   319      0
    embedding                                  55.2   316      0
    embedding, lbfgs                           55.1   319      0
    embedding, start=parent                    55.0   307      0
    adapter                                    55.0   273    220
    full                                       55.4   254    280
    full, start=parent                         58.8   283    326
    full, layer_decay 0.5                      55.1   253    282
    full, l2_pull 1e-3 instead of 1e-5         55.4   276    197
    full, with replay of wB97X                 54.8   259     57
    full, split.folds=5                        53.2   254    294

(`python benchmarks/finetune_strategies.py CHECKPOINT`, benchmarks/results/finetune.jsonl; the README has those from
another checkpoint.) With 50 energies: ridge 61.3
and 366, embedding 56.4 and 368, with lbfgs 56.2 and 419, full 58.1 and 321.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rung.data.fidelity import check_name

Strategy = Literal["auto", "parent", "ridge", "embedding", "adapter", "full"]
FROZEN_TRUNK = ("parent", "ridge", "embedding")  # strategies that leave what fidelities share as it is
CLOSED_FORM = ("parent", "ridge")  # strategies without gradient steps
LBFGS_LEAVES = ("learning_rate", "layer_decay", "warmup_steps", "batch_size", "ema", "clip")
AUTO_FOLDS_BELOW = 200  # structures; a smaller set is too small to give some of them away for validation
AUTO_FOLDS = 5
NOT_NEGATIVE = (
    "learning_rate",
    "warmup_steps",
    "patience",
    "tolerance",
    "l2_pull",
    "replay_ratio",
    "replay_weight",
    "replay_limit",
    "max_forgetting",
)


@dataclass(frozen=True)
class SplitConfig:
    """How the target structures are divided; groups (molecules) are never divided."""

    # k of cross-validation; 0: one held-out validation set; -1: 5 below 200 rows and for an ensemble, else 0
    folds: int = -1
    validation_fraction: float = 0.15
    test_fraction: float = 0.15  # used only when the data bring no test set of their own and there are no folds
    max_train: int = 0  # labels of `data` used, training and validation together, drawn at random by `seed`; 0: all
    max_test: int = 500  # test structures evaluated, drawn at random by `seed`; 0: all


@dataclass(frozen=True)
class ChecksConfig:
    """What counts as suspicious in the target set, and whether it stops the run."""

    on_suspicion: Literal["error", "report"] = "error"
    duplicate_tolerance: float = 1e-3  # angstrom, between sorted interatomic distances
    duplicate_energy: float = 1e-3  # eV, between two labels of one geometry
    outlier_z: float = 15.0  # robust z-score of the residual energy per atom
    outlier_floor: float = 0.05  # eV/atom; a smaller residual is never an outlier


@dataclass(frozen=True)
class TrainingConfig:
    """The loop. `learning_rate` 0 takes the strategy's own (adapt.LEARNING_RATES)."""

    optimizer: Literal["soap", "adamw", "lbfgs"] = "soap"  # lbfgs: all labels at every step and a line search
    steps: int = 400
    batch_size: int = 32  # target structures per step
    learning_rate: float = 0.0
    layer_decay: float = 1.0  # the rate of a layer over that of the layer behind it (arXiv:1801.06146); 1: all alike
    warmup_steps: int = 20
    clip: float = 10.0  # largest gradient norm
    ema: float = 0.98  # decay of the weights' average, which is what is evaluated and saved
    evaluate_every: int = 20
    patience: int = 8  # evaluations outside the tolerance before the loop stops; 0: never stop
    tolerance: float = 0.15  # the latest weights within this fraction of the smallest validation error are kept
    l2_pull: float = 1e-5  # strength of the pull to the pretrained weights (L2-SP, arXiv:1802.01483)
    rank: int = 8  # of the updates of strategy `adapter`
    energy_weight: float = 1.0
    forces_weight: float = 1.0  # of target and replay forces, where they are trained on
    replay_ratio: float = 0.5  # replay structures per target structure
    replay_weight: float = 0.003  # of the loss terms of a replay structure, relative to those of a target structure
    replay_limit: int = 20000  # structures of a replay dataset that are held in memory, drawn at random; 0: all
    max_forgetting: float = 0.0  # largest relative growth of the replay fidelities' errors, else training stops; 0: any


@dataclass(frozen=True)
class ScratchConfig:
    """The baseline: the same potential from random weights on the same labels; own rate, as nothing is to protect."""

    steps: int = 1000
    learning_rate: float = 1e-3
    patience: int = 15


@dataclass(frozen=True)
class FinetuneConfig:
    """One run of `rung finetune`; the first three fields have no default."""

    checkpoint: str  # folder, .tar or name of the pretrained checkpoint
    data: str  # a file that ASE reads, a dataset folder, `builtin`, or a file of relative energies
    fidelity: str  # name of the new level of theory
    method: str = ""  # what the fidelity is, for the checkpoint's registry; a dataset's manifest says it itself
    basis: str = ""
    code: str = ""
    parent: str = ""  # fidelity the new one starts from; empty: the one that fits the labels best
    relative: tuple[str, ...] = ()  # files of relative energies that are trained on, too
    strategy: Strategy = "full"
    start: Literal["ridge", "parent"] = "ridge"  # what gradient steps start from: the closed-form read-outs, or none
    test: str = ""  # file or dataset with test structures; a dataset in `data` brings its own
    out: str = "runs/finetune"
    use_forces: bool = False  # train on the forces in `data`; otherwise they are only compared with
    new_elements: bool = False  # accept elements that the checkpoint does not know
    replay: tuple[str, ...] = ()  # DATASET:FIDELITY pairs of the pretraining
    also: tuple[str, ...] = ()  # DATASET:FIDELITY pairs of more new fidelities, learned together with this one
    uncertainty: Literal["last_layer", "ensemble", "none"] = "last_layer"  # ensemble: the folds' potentials
    baseline: Literal["none", "scratch"] = "none"
    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda where there is one
    seed: int = 0
    split: SplitConfig = field(default_factory=SplitConfig)
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)

    def __post_init__(self) -> None:
        check_name(self.fidelity)
        training, split = self.training, self.split
        for name in ("steps", "batch_size", "rank", "evaluate_every", "clip"):
            if getattr(training, name) <= 0:
                raise _bad(f"training.{name}", "a positive number", getattr(training, name))
        for name in NOT_NEGATIVE:
            if getattr(training, name) < 0:
                raise _bad(f"training.{name}", "zero or a positive number", getattr(training, name))
        if not 0 <= training.ema < 1:
            raise _bad("training.ema", "0 <= ema < 1", training.ema)
        if split.folds < -1 or split.folds == 1:
            raise _bad("split.folds", "-1 (automatic), 0 or at least 2", split.folds)
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(split, name) < 0.5:
                raise _bad(f"split.{name}", "a fraction between 0 and 0.5", getattr(split, name))
        for name in ("replay", "also"):
            for task in getattr(self, name):
                if task.count(":") < 1 or not all(task.rpartition(":")[::2]):
                    raise _bad(name, "DATASET:FIDELITY", task)
        if self.use_forces and self.strategy in CLOSED_FORM:
            what = f"strategy embedding, adapter or full: `{self.strategy}` learns from energies"
            raise _bad("use_forces", what, self.strategy)
        if training.optimizer == "lbfgs":
            self._check_lbfgs()
        if self.replay and self.strategy in FROZEN_TRUNK:
            what = f"strategy full or adapter: `{self.strategy}` trains nothing that other fidelities share"
            raise _bad("replay", what, self.strategy)
        if training.max_forgetting and not self.replay:
            raise _bad(
                "training.max_forgetting", "replay=DATASET:FIDELITY, on which forgetting is measured", "no replay"
            )
        if not 0 < training.layer_decay <= 1:
            raise _bad("training.layer_decay", "0 < layer_decay <= 1", training.layer_decay)
        if self.uncertainty == "ensemble" and split.folds == 0:
            raise _bad("uncertainty", "split.folds of at least 2, whose potentials are the ensemble", "split.folds=0")

    def _check_lbfgs(self) -> None:
        """Refuse what L-BFGS, with its line search over all labels, has no use for."""
        default = TrainingConfig()
        given = [name for name in LBFGS_LEAVES if getattr(self.training, name) != getattr(default, name)]
        if given:
            raise _bad(f"training.{given[0]}", "nothing with optimizer=lbfgs", getattr(self.training, given[0]))
        if self.replay or self.also:
            raise _bad("training.optimizer", "soap or adamw with replay or also: lbfgs needs one loss", "lbfgs")


def _bad(name: str, expected: str, found: object) -> ValueError:
    return ValueError(f"finetune config: {name}: expected {expected}, found {found}")
