"""The pretraining loop: rounds of steps; log, evaluate and save by interval; a checkpoint at the end."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rung.data.batch import Budget
from rung.kernels.memory import keep_freed_memory
from rung.model.checkpoint import save_checkpoint
from rung.model.config import to_mapping
from rung.pretrain.config import PretrainConfig
from rung.pretrain.ema import Ema
from rung.pretrain.engine import Engine, connect, disconnect
from rung.pretrain.evaluation import Evaluated, Evaluation
from rung.pretrain.interrupt import Interrupt
from rung.pretrain.interval import Interval
from rung.pretrain.metrics import MetricsWriter
from rung.pretrain.plan import describe, make_plan, make_potential, task_groups
from rung.pretrain.ranks import Ranks
from rung.pretrain.rounds import MODES
from rung.pretrain.schedule import learning_rate
from rung.pretrain.state import TrainingState
from rung.pretrain.state_folder import BEST, state_document, state_tensors
from rung.pretrain.step import StepModule
from rung.pretrain.store import StateStore


def pretrain(config: PretrainConfig, *, resume: bool = False) -> bool:
    """Train as `config` says; every rank of the run calls it. Return False when it was stopped before the end.

    The output folder gets metrics, `state/` and, at the end, `checkpoint/`.

    Raises:
        ValueError: the datasets do not have what the config asks for, or a saved state does not fit it.
        FileExistsError: the folder holds a run and `resume` is not set.
        FloatingPointError: more than `optimizer.max_skipped` steps were not finite.
        OSError: the last state could not be written.
        ConnectionError: a rank is lost or stands still.
    """
    if not resume and (Path(config.output) / "state" / "latest").exists():
        raise FileExistsError(f"{config.output} holds a run: go on with --resume, or choose another output")
    keep_freed_memory()
    ranks = connect(timedelta(minutes=config.world.timeout_minutes), lambda size: task_groups(config, size))
    try:
        with ranks.naming_the_absent(), Run(config, ranks, resume) as run, Interrupt() as interrupt:
            finished = run.train(interrupt)
            if finished:
                run.export()
    finally:
        disconnect()
    return finished


class Run:
    """The parts of one run on one rank, and what happens between rounds."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, resume: bool) -> None:
        self.config = config
        self.ranks = ranks
        self.folder = Path(config.output)
        self.plan = make_plan(config, ranks.world.size)
        self.potential = make_potential(self.plan).to(ranks.device).train()
        self.potential.checkpoint_layers = config.activation_checkpointing
        module = StepModule(self.potential, config.loss, ranks.sum_, ranks.world.data_ranks, len(self.plan.tasks))
        engine = Engine(module, config.optimizer, self.plan.deepspeed, ranks)
        self.rounds = MODES[config.mode](engine, self.plan, config)
        budget = Budget(config.data.max_atoms, config.data.max_edges)
        self.evaluation = Evaluation(self.plan, config.evaluation, ranks, budget)
        self.ema = Ema(self.potential, config.ema_decay)
        identity = {**to_mapping(config), "datasets": list(self.plan.datasets)}
        self.state = TrainingState(engine, self.ema, self.rounds, identity, self.plan.steps_per_round)
        self.store = StateStore(self.folder / "state", ranks, config.keep_states, tell=print)
        note = ""
        if resume:
            place = self.store.find()
            note = f"resumed from {place}; {self.state.load(place)}".rstrip("; ")
        self.writer = MetricsWriter(
            self.folder, ranks.rank, self.state.step, self.plan.steps, wandb=config.wandb, config=to_mapping(config)
        )
        self.writer.print(describe(self.plan, config))
        self.writer.print(f"kernels {self.potential.kernels()}")
        if note:
            self.writer.print(note)
        self.interval = Interval(self.plan, config.loss, ranks, self.rounds.data_wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close files, threads and loader processes, however the run ended."""
        self.writer.close()
        self.store.close()
        self.rounds.loader.close()

    def train(self, interrupt: Interrupt) -> bool:
        """Run the rounds that are left; return False when stopped before the last.

        Rounds follow one another without a look at the device. Where a log line is due, the ranks read what they have
        added up; all see the same numbers, and so agree on whether to stop.
        """
        config, plan, state = self.config, self.plan, self.state
        for index in range(state.step // plan.steps_per_round, plan.rounds):
            self.interval.add(self.rounds.run(index, interrupt.requested))
            self.ema.update()
            state.step += plan.steps_per_round
            self.writer.advance(plan.steps_per_round)
            last = index == plan.rounds - 1
            stop = config.stop_at is not None and state.step >= config.stop_at
            if self._due(config.log_every) or last or stop:
                stop |= self._log()
            best = self._due(config.evaluation.every) and not last and self._evaluate()
            if self._due(config.save_every) or best or last or stop:
                self.store.save(state.step, state.snapshot(), state.document(), best=best)
            if stop and not last:
                self.store.wait()
                self.writer.print(f"stopped at step {state.step} of {plan.steps}; go on with --resume")
                return False
        return True

    def export(self) -> None:
        """Evaluate the averaged weights and write them as a checkpoint, the raw ones beside.

        When an earlier evaluation was better, those weights become a second checkpoint.
        """
        with self.ema.applied():
            last = self.evaluation.run(self.potential)
        self.writer.evaluation(self.state.step, last.metrics, last.criterion)
        self._write_checkpoint("checkpoint", last)
        self.store.wait()
        if self.state.best is not None and last.criterion is not None and self.state.best < last.criterion:
            place = self.store.folder.path / self.store.folder.pointer(BEST)
            step = state_document(place)["step"]
            self.ema.load(state_tensors(place, "ema.safetensors"), 0)
            with self.ema.applied():
                best = self.evaluation.run(self.potential)
            self.writer.print(f"step {step} was better than the last: criterion {best.criterion:.4g}")
            self._write_checkpoint("checkpoint_best", best)
        self.ranks.barrier()

    def _due(self, interval: int) -> bool:
        """Return whether the round that just ended crossed a multiple of `interval` steps."""
        return self.state.step // interval > (self.state.step - self.plan.steps_per_round) // interval

    def _log(self) -> bool:
        """Read and write what the interval added up; return whether some rank was asked to stop."""
        state, limit = self.state, self.config.optimizer.max_skipped
        totals = self.interval.read()
        state.skipped += totals.skipped
        rate = learning_rate(state.step - 1, self.plan.steps, self.config.optimizer)
        self.writer.train(self.interval.close(totals, state.step, state.skipped, rate))
        while (saved := self.store.poll()) is not None:
            if saved.error is not None and self.ranks.rank == 0:
                self.writer.warn(f"{saved.error}; the states before it are as they were")
        if state.skipped > limit:
            self.store.save(state.step, state.snapshot(), state.document())  # skipped steps changed nothing
            self.store.wait()
            raise FloatingPointError(
                f"step {state.step}: {state.skipped} steps had a loss or gradient that is not finite, "
                f"optimizer.max_skipped is {limit}; look for wrong labels ('rung data inspect') or lower optimizer.lr; "
                "the last good weights are saved: go on with --resume and a larger max_skipped"
            )
        return totals.stop > 0

    def _evaluate(self) -> bool:
        """Evaluate the averaged weights; return whether they are the best so far."""
        with self.ema.applied():
            found = self.evaluation.run(self.potential)
        self.writer.evaluation(self.state.step, found.metrics, found.criterion)
        best = math.inf if self.state.best is None else self.state.best
        if found.criterion is None or found.criterion >= best:
            return False
        self.state.best = found.criterion
        return True

    def _write_checkpoint(self, name: str, evaluated: Evaluated) -> None:
        raw = {name: tensor.clone() for name, tensor in self.potential.state_dict().items()}
        with self.ema.applied():
            if self.ranks.rank == 0:
                place = save_checkpoint(
                    self.folder / name,
                    self.potential,
                    fidelities=self.plan.fidelities,
                    training_config=to_mapping(self.config),
                    datasets=self.plan.datasets,
                    evaluation=evaluated.metrics,
                    raw_state=raw,
                )
                self.writer.print(f"checkpoint {place}")
