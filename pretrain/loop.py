"""The pretraining loop: rounds of steps; log, evaluate and save by interval; a checkpoint at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from rung.data.batch import Budget
from rung.kernels.memory import keep_freed_memory
from rung.model.checkpoint import save_checkpoint
from rung.model.config import to_mapping
from rung.pretrain.config import PretrainConfig
from rung.pretrain.ema import Ema
from rung.pretrain.engine import connect, disconnect, make_engine
from rung.pretrain.evaluation import Evaluated, Evaluation
from rung.pretrain.exit_status import RunFailed
from rung.pretrain.interrupt import Interrupt
from rung.pretrain.interval import Interval
from rung.pretrain.metrics import MetricsWriter
from rung.pretrain.plan import describe, make_plan, make_potential, task_groups
from rung.pretrain.ranks import Ranks
from rung.pretrain.rounds import MODES
from rung.pretrain.schedule import learning_rate
from rung.pretrain.state import TrainingState
from rung.pretrain.state_folder import BEST, STATE_FILE, state_document, state_tensors
from rung.pretrain.store import StateStore


def pretrain(config: PretrainConfig, *, resume: bool = False) -> bool:
    """Train as `config` says; every rank of the run calls it. Return False when it was stopped before the end.

    The output folder gets metrics, `state/` and, at the end, `checkpoint/`.

    Raises:
        ValueError: the datasets do not have what the config asks for, or a saved state does not fit it.
        FileExistsError: the folder holds a run and `resume` is not set.
        FloatingPointError: more than `optimizer.max_skipped` steps were not finite.
        RunFailed: what a training run met on its way: the last state could not be written, a shard is gone.
        ConnectionError: a rank is lost or stands still.
    """
    if not resume and (Path(config.output) / "state" / "latest").exists():
        raise FileExistsError(f"{config.output} holds a run: go on with --resume, or choose another output")
    keep_freed_memory()
    ranks = connect(timedelta(minutes=config.world.timeout_minutes), lambda size: task_groups(config, size))
    try:
        with Interrupt() as interrupt:
            with ranks.naming_the_absent():
                run = Run(config, ranks, resume)
            with run, ranks.naming_the_absent(), failing_as_a_run():
                return run.train(interrupt) and run.export()
    finally:
        disconnect()


@contextmanager
def failing_as_a_run() -> Iterator[None]:
    """Turn an OSError within the block into a RunFailed: what could be read at the start is gone, a disk is full."""
    try:
        yield
    except (ConnectionError, TimeoutError, RunFailed):
        raise
    except OSError as error:
        raise RunFailed(str(error)) from error


class Run:
    """The parts of one run on one rank, and what happens between rounds."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, resume: bool) -> None:
        self.config = config
        self.ranks = ranks
        self.folder = Path(config.output)
        torch.manual_seed(config.seed + ranks.rank)  # else torch begins at random
        self.plan = make_plan(config, ranks.world.size)
        self.potential = make_potential(self.plan).to(ranks.device)
        engine = make_engine(self.potential, self.plan, config, ranks)
        self.rounds = MODES[config.mode](engine, self.plan, config)
        budget = Budget(config.data.max_atoms, config.data.max_edges)
        self.evaluation = Evaluation(self.plan, config.evaluation, ranks, budget)
        self.ema = Ema(self.potential, config.ema_decay)
        identity = {**to_mapping(config), "datasets": list(self.plan.datasets)}
        self.state = TrainingState(
            engine, self.ema, self.rounds, identity, self.plan.steps_per_round, partial(self.plan.readers, config)
        )
        self.store = StateStore(self.folder / "state", ranks, config.keep_states, tell=self._tell)
        self.skipped_lately = 0  # in the latest log intervals that all have some
        note = ""
        if resume:
            place = self.store.find()
            note = f"resumed from {place}; {self.state.load(place)}".rstrip("; ")
        if config.stop_at is not None and self.state.step >= config.stop_at:
            raise ValueError(f"stop_at: the state is of step {self.state.step}; expected a later one, or none")
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
            evaluate = self._due(config.evaluation.every) and not last
            save = self._due(config.save_every) or last or stop
            if self._due(config.log_every) or evaluate or save:
                stop |= self._log()
            best = evaluate and self._evaluate()
            if save or best or stop:
                self.store.save(state.step, state.snapshot(), state.document(), best=best)
            if stop and not last:
                self._wait_for_state()
                self.writer.print(f"stopped at step {state.step} of {plan.steps}; go on with --resume")
                return False
        return True

    def export(self) -> bool:
        """Evaluate the averaged weights and write them as a checkpoint, the raw ones beside; return True.

        When an earlier evaluation was better, those weights become a second checkpoint.
        """
        with self.ema.applied():
            last = self.evaluation.run(self.potential)
        self.writer.evaluation(self.state.step, last.metrics, last.criterion)
        self._write_checkpoint("checkpoint", last)
        self._wait_for_state()
        if (place := self._better_state(last.criterion)) is not None:
            self.ema.load(state_tensors(place, "ema.safetensors"), 0)
            with self.ema.applied():
                best = self.evaluation.run(self.potential)
            self.writer.print(f"{place.name} was better than the last: criterion {best.criterion:.4g}")
            self._write_checkpoint("checkpoint_best", best)
        self.ranks.barrier()
        return True

    def _better_state(self, criterion: float | None) -> Path | None:
        """Return the state of the best evaluation if it was better than this; all ranks agree."""
        place = self.store.folder.path / self.store.folder.pointer(BEST)
        found = state_document(place)["best"] if (place / STATE_FILE).is_file() else None
        value = torch.tensor([math.inf if found is None else found], dtype=torch.float64, device=self.ranks.device)
        worst = self.ranks.max_all_(value).item()  # infinite where one rank does not see it
        return place if criterion is not None and worst < criterion else None

    def _wait_for_state(self) -> None:
        """Wait until the state is on the disk, on all ranks; rank 0 serves them until then."""
        self.store.wait()
        self.ranks.barrier()

    def _tell(self, text: str) -> None:
        writer = getattr(self, "writer", None)  # there is none yet while a state is looked for
        print(text) if writer is None else writer.print(text)

    def _due(self, interval: int) -> bool:
        """Return whether the round that just ended crossed a multiple of `interval` steps."""
        return self.state.step // interval > (self.state.step - self.plan.steps_per_round) // interval

    def _log(self) -> bool:
        """Read and write what the interval added up; return whether some rank was asked to stop."""
        state, limit = self.state, self.config.optimizer.max_skipped
        totals = self.interval.read()
        state.skipped += totals.skipped
        self.skipped_lately = self.skipped_lately + totals.skipped if totals.skipped else 0
        rate = learning_rate(state.step - 1, self.plan.steps, self.config.optimizer)
        self.writer.train(self.interval.close(totals, state.step, state.skipped, rate))
        while (saved := self.store.poll()) is not None:
            if saved.error is not None and self.ranks.rank == 0:
                self.writer.warn(f"{saved.error}; the states before it are as they were")
        if self.skipped_lately > limit:
            self._wait_for_state()
            raise FloatingPointError(
                f"step {state.step}: {self.skipped_lately} steps had a loss or gradient that is not finite, "
                f"optimizer.max_skipped is {limit}; look for wrong labels ('rung data inspect') or lower optimizer.lr; "
                "none of them changed the weights: --resume goes on from the last state"
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
