"""The pretraining loop: rounds of steps; log, evaluate and save by interval; a checkpoint at the end."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from rung.kernels.memory import keep_freed_memory
from rung.model.checkpoint import save_checkpoint
from rung.model.config import to_mapping
from rung.pretrain.config import PretrainConfig
from rung.pretrain.ema import Ema
from rung.pretrain.engine import Engine, connect, disconnect
from rung.pretrain.evaluation import Evaluation
from rung.pretrain.interrupt import Interrupt
from rung.pretrain.metrics import MetricsWriter
from rung.pretrain.plan import describe, make_plan, make_potential
from rung.pretrain.ranks import Ranks
from rung.pretrain.rounds import MODES
from rung.pretrain.schedule import learning_rate
from rung.pretrain.state import TrainingState, load_state, save_state
from rung.pretrain.step import StepModule, StepTotals


def pretrain(config: PretrainConfig, *, resume: bool = False) -> bool:
    """Train as `config` says; every rank of the run calls it. Return False when it was stopped before the end.

    The output folder gets metrics, `state/` and, at the end, `checkpoint/`.

    Raises:
        ValueError: the datasets do not have what the config asks for, or a saved state does not fit it.
        FileExistsError: the folder holds a run and `resume` is not set.
        FloatingPointError: more than `optimizer.max_skipped` steps were not finite.
    """
    if not resume and (Path(config.output) / "state" / "latest").exists():
        raise FileExistsError(f"{config.output} holds a run: go on with --resume, or choose another output")
    keep_freed_memory()
    ranks = connect(timedelta(minutes=config.timeout_minutes))
    try:
        run = Run(config, ranks, resume)
        with Interrupt() as interrupt:
            finished = run.train(interrupt)
            if finished:
                run.export()
        run.close()
    finally:
        disconnect()
    return finished


class Run:
    """The parts of one run on one rank, and what happens between rounds."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, resume: bool) -> None:
        self.config = config
        self.ranks = ranks
        self.folder = Path(config.output)
        self.plan = make_plan(config, ranks.world)
        self.potential = make_potential(self.plan).to(ranks.device).train()
        module = StepModule(self.potential, config.loss, ranks.sum_, ranks.world)
        engine = Engine(module, config.optimizer, self.plan.deepspeed, ranks)
        self.rounds = MODES[config.mode](engine, self.plan, config)
        self.evaluation = Evaluation(self.plan, config.evaluation, ranks)
        self.ema = Ema(self.potential, config.ema_decay)
        identity = {**to_mapping(config), "datasets": list(self.plan.datasets)}
        self.state = TrainingState(engine, self.ema, self.rounds.loaders, identity)
        source = load_state(self.folder / "state", self.state) if resume else None
        self.writer = MetricsWriter(self.folder, ranks.rank, self.state.step, self.plan.steps)
        self.writer.print(describe(self.plan, config))
        self.writer.print(f"kernels {self.potential.kernels()}")
        if source is not None:
            self.writer.print(f"resumed from {source}")

    def train(self, interrupt: Interrupt) -> bool:
        """Run the rounds that are left; return False when stopped before the last."""
        config, plan, state = self.config, self.plan, self.state
        since_log = StepTotals()
        for index in range(state.step // plan.steps_per_round, plan.rounds):
            totals = self.rounds.run(index, interrupt.requested)
            self.ema.update()
            state.step += plan.steps_per_round
            state.skipped += totals.skipped
            since_log += totals
            self.writer.advance(plan.steps_per_round)
            self._check_skipped()
            last = index == plan.rounds - 1
            stop = totals.stop or (config.stop_at is not None and state.step >= config.stop_at)
            if self._due(config.log_every) or last or stop:
                self._log(since_log)
                since_log = StepTotals()
            if self._due(config.evaluation.every) and not last:
                with self.ema.applied():
                    self.writer.evaluation(state.step, self.evaluation.run(self.potential))
            if self._due(config.save_every) or last or stop:
                save_state(self.folder / "state", state, config.keep_states)
            if stop and not last:
                self.writer.print(f"stopped at step {state.step} of {plan.steps}; go on with --resume")
                return False
        return True

    def export(self) -> None:
        """Evaluate the averaged weights and write them as a checkpoint, the raw ones beside."""
        raw = {name: tensor.clone() for name, tensor in self.potential.state_dict().items()}
        with self.ema.applied():
            metrics = self.evaluation.run(self.potential)
            self.writer.evaluation(self.state.step, metrics)
            if self.ranks.rank == 0:
                place = save_checkpoint(
                    self.folder / "checkpoint",
                    self.potential,
                    fidelities=self.plan.fidelities,
                    training_config=to_mapping(self.config),
                    datasets=self.plan.datasets,
                    evaluation=metrics,
                    raw_state=raw,
                )
                self.writer.print(f"checkpoint {place}")
        self.ranks.barrier()

    def close(self) -> None:
        """Close files and loader processes."""
        self.writer.close()
        for loader in self.rounds.loaders:
            loader.close()

    def _due(self, interval: int) -> bool:
        """Return whether the round that just ended crossed a multiple of `interval` steps."""
        return self.state.step // interval > (self.state.step - self.plan.steps_per_round) // interval

    def _log(self, totals: StepTotals) -> None:
        steps = max(1, totals.steps)
        self.writer.train(
            self.state.step,
            totals.structures,
            {
                "loss": totals.loss / steps,
                "energy_loss": totals.energy_loss / steps,
                "forces_loss": totals.forces_loss / steps,
                "grad_norm": totals.grad_norm / steps,
                "learning_rate": learning_rate(self.state.step - 1, self.plan.steps, self.config.optimizer),
                "skipped": self.state.skipped,
            },
        )

    def _check_skipped(self) -> None:
        limit = self.config.optimizer.max_skipped
        if self.state.skipped > limit:
            raise FloatingPointError(
                f"step {self.state.step}: {self.state.skipped} steps had a loss or gradient that is not finite, "
                f"optimizer.max_skipped is {limit}; look for wrong labels ('rung data inspect'), or lower optimizer.lr"
            )
