"""The training loop: data -> engine -> metrics, with evaluation, checkpoints and signals.

One step queues work on the device and reads nothing back: whether its loss was finite the host
learns a fixed number of steps later (status.py). Things that need a settled state (checkpoint, end)
first drain that queue, so a checkpoint is never taken of a step that turned out bad. What the ranks
must agree on beforehand (number of labels, "somebody got SIGTERM", "my background checkpoint is
written") is three integers that they sum on the host, over gloo, while the device is busy.

The loss of a step is the mean over all its labels, on all ranks and in all micro-batches: each
micro-batch counts by its labels, so the way a global batch is cut changes nothing but rounding.

A run is a function of its config and its position: batches follow from the data position, the
learning rate from the step, so "resume" is: load the engine's state, seek the data, go on. On the
CPU the continued losses are bitwise those of the uninterrupted run.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fa3_train.models.hf import load_weights, save_pretrained
from fa3_train.models.transformer import TransformerLM
from fa3_train.train.checkpoint import Checkpointer, CheckpointError, Manifest
from fa3_train.train.config import ConfigError, TrainConfig
from fa3_train.train.context import ContextParallel
from fa3_train.train.data import IGNORE_INDEX, Batch, DataLoader
from fa3_train.train.data.build import build_data
from fa3_train.train.engines import Engine, World, create_engine, start_world, stop_world
from fa3_train.train.engines.base import LOSS, NORM, STATUS_SIZE
from fa3_train.train.guard import NonFiniteError, diagnose
from fa3_train.train.loggers import RunLogger
from fa3_train.train.metrics import StepMeter
from fa3_train.train.schedule import learning_rate
from fa3_train.train.signals import StopSignal
from fa3_train.train.status import StatusReader, StepStatus
from fa3_train.train.watch import Watch

__all__ = ["Trainer", "run", "train"]

log = logging.getLogger(__name__)


def run(config: TrainConfig) -> int:
    """Train and return an exit code: 0 when done or stopped by a signal, 1 for a failed run
    (non-finite values, a checkpoint that cannot be written or read) with the reason on stderr."""
    try:
        paths = train(config)
    except (NonFiniteError, CheckpointError) as error:
        print(f"fa3_train: {error}", file=sys.stderr, flush=True)
        return 1
    width = max(map(len, paths), default=0)
    for name, path in paths.items():
        print(f"{name:<{width}}  {path}", flush=True)
    return 0


def train(config: TrainConfig) -> dict[str, str]:
    """Train as `config` says; returns the paths of what the run wrote (empty but on rank 0).

    Raises NonFiniteError, CheckpointError or ConfigError. SIGTERM and SIGUSR1 end it early, after
    a checkpoint.
    """
    with StopSignal() as stop:
        world = start_world(config)
        engine = config.engine
        watch = Watch(
            world, hang_s=engine.hang_s, dead_s=engine.dead_s, timeout_s=engine.timeout_s
        )
        try:
            paths = Trainer(config, world, stop, watch).run()
            watch.close()
            return paths
        except (NonFiniteError, CheckpointError):  # raised on all ranks
            watch.close()
            raise
        except Exception as error:
            watch.failed(error)
            raise
        finally:
            stop_world()


class Trainer:
    """Everything of one run, wired up and resumed; `run()` trains to the end."""

    def __init__(
        self, config: TrainConfig, world: World, stop: StopSignal, watch: Watch | None = None
    ) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.watch = watch or Watch(world)
        with self.watch.slowly("setup"):
            self._set_up(config, world)

    def _set_up(self, config: TrainConfig, world: World) -> None:
        _seed(config)
        self.context = ContextParallel(config, world)
        self.data = build_data(
            config.data,
            vocab_size=config.model.vocab_size,
            seed=config.run.seed,
            dp_rank=self.context.dp_rank,
            dp_size=self.context.dp_size,
            pin_memory=world.device.type == "cuda",
            shard=self.context.shard if self.context.size > 1 else None,
        )
        self.loader: DataLoader = self.data.train
        model_config = config.model_config()
        model = build_model(config, world)
        self.context.install(model)
        self.engine: Engine = create_engine(config, world)
        self.engine.context = self.context
        on_meta = any(param.is_meta for param in model.parameters())
        self.engine.setup(model)
        if on_meta:  # the engine has drawn its shards; they are filled in place
            _load_initial_weights(model, config)
        self.checkpointer = Checkpointer(config, self.engine)
        resumed = self.checkpointer.resume()
        self.step = self._restore(resumed)
        progress = resumed.progress if resumed else {}
        self.meter = StepMeter(
            config,
            model_config,
            device=world.device,
            world_size=world.size,
            model=model,
            tokens_seen=progress.get("tokens", 0),
        )
        info = self.meter.describe() | self.engine.describe()
        info |= self.context.describe() | {"data": self.data.description}
        self.logger = RunLogger(
            config,
            run_info=info,
            rank=world.rank,
            start_step=self.step,
            state=progress.get("logger"),
        )
        self.status = StatusReader(world.device)
        self._stop_agreed = False

    # -- the loop --------------------------------------------------------------------------

    def run(self) -> dict[str, str]:
        """Train to `run.steps` or to a stop request; paths of what was written."""
        try:
            self._train()
        except (NonFiniteError, CheckpointError) as error:
            self.logger.message(f"stopped: {error}")
            raise
        finally:
            with self.watch.slowly("closing"):
                self.data.close()
                self.checkpointer.close()
                paths = self.logger.close()
                self.engine.close()
        if paths and (newest := self.checkpointer.newest()) is not None:
            paths["checkpoint"] = str(newest)
        return paths

    def _train(self) -> None:
        config = self.config
        if self.step == 0:
            self._evaluate()
        while self.step < config.run.steps and self.advance():
            last = self.step == config.run.steps
            if last or (config.run.eval_every and self.step % config.run.eval_every == 0):
                self._evaluate()
            if config.checkpoint.every and self.step % config.checkpoint.every == 0:
                self._checkpoint(background=config.checkpoint.async_save and not last)
        if self._stop_agreed:
            self.logger.message(
                f"stop requested ({self.stop.received or 'by another rank'}): saving after step "
                f"{self.step}; run the same command to continue"
            )
        if self.step > 0 and (self._stop_agreed or config.checkpoint.save_last):
            self._checkpoint(background=False)
        with self.watch.slowly("the end of the run"):
            self._announce(self.checkpointer.finish())
            if config.checkpoint.export_hf and self.step == config.run.steps:
                self._export()

    def advance(self) -> bool:
        """One step and what the loop does about every step: read statuses, write log lines.
        False when the ranks have agreed to stop, and no step was taken."""
        position = self.loader.samples
        self.watch.at(f"step {self.step + 1}, data")
        self.meter.start_step(self.step + 1)
        with self.meter.phase("data"):
            batches = [next(self.loader) for _ in range(self.engine.accumulation)]
            labels = [_count_labels(batch) for batch in batches]
        with self.watch.waiting():
            all_labels = self._agree(sum(labels))
        if self._stop_agreed:
            self.loader.seek(position)  # these batches are for the run that continues
            return False
        self.step += 1
        share = self.engine.accumulation * self.world.size / all_labels
        self._one_step(batches, [count * share for count in labels])
        self.watch.warmed_up()
        last = self.step == self.config.run.steps
        self._read_statuses(drain=last)
        # As late as statuses are read: the device has the steps in between while this is written.
        lag = 0 if last else self.status.lag
        if last or (self.step - lag) % self.config.logging.every == 0:
            self.logger.log(self.meter.flush(keep=lag))
        return True

    def _one_step(self, batches: list[Batch], weights: list[float]) -> None:
        """Queue one optimizer step. `weights`: of the micro-batches' losses in the engine's mean
        over micro-batches and ranks; 1.0 where all have the same number of labels."""
        engine, meter = self.engine, self.meter
        lr = learning_rate(self.step, self.config)
        for index, batch in enumerate(batches):
            meter.count(batch)
            batches[index] = batch.to(self.world.device, non_blocking=True)
        total: torch.Tensor | None = None
        for index, batch in enumerate(batches):
            self.watch.at(f"step {self.step}, forward of micro-batch {index}")
            with meter.phase("forward"):
                loss = engine.forward(batch)
                if weights[index] != 1.0:
                    loss = loss * weights[index]
            self.watch.at(f"step {self.step}, backward of micro-batch {index}")
            with meter.phase("backward"):
                last = index == engine.accumulation - 1
                engine.backward(loss, first=index == 0, last=last)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        self.watch.at(f"step {self.step}, optimizer")
        with meter.phase("optimizer"):
            status = torch.zeros(STATUS_SIZE, device=self.world.device)
            status[LOSS] = total / (engine.accumulation * self.world.size)
            status = engine.step(lr, status)
        meter.end_step(loss=status[LOSS], grad_norm=status[NORM], lr=lr)
        self.status.push(self.step, status, batches)

    def _agree(self, labels: int) -> int:
        """Sum the label count over the ranks; act on what else they say. Host only."""
        sums = [labels, int(self.stop.received is not None), int(self.checkpointer.local_done())]
        if self.world.size > 1:
            vector = torch.tensor(sums)
            dist.all_reduce(vector)
            sums = vector.tolist()
        self._stop_agreed = self._stop_agreed or sums[1] > 0
        if self.checkpointer.saving and sums[2] == self.world.size:
            self._announce(self.checkpointer.advance())
        return max(1, sums[0])

    def _read_statuses(self, drain: bool = False) -> None:
        for status in self.status.pop(all_of_them=drain):
            if status.blocked:
                self._stop_for(status)

    def _stop_for(self, status: StepStatus) -> None:
        self.logger.log(self.meter.flush())
        text = diagnose(self.engine, status.batches, status.step, status.loss, status.norm)
        raise NonFiniteError(text)

    # -- between steps ---------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Mean loss over the first `run.eval_batches` validation batches, shared out to the
        data-parallel ranks (rounded up): the same number of them on another number of ranks."""
        loader = self.data.val
        count = -(-self.config.run.eval_batches // self.context.dp_size)
        if loader is None or count == 0:
            return
        with self.watch.slowly(f"evaluation after step {self.step}"):
            mean = self._mean_loss(loader, count)
        self.logger.event("eval", step=self.step, val_loss=mean)
        self.meter.restart()

    def _mean_loss(self, loader: DataLoader, count: int) -> float:
        """Mean loss over `count` micro-batches of each data-parallel rank."""
        loader.seek(0)
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # loss, labels
        for _ in range(count):
            self.watch.at(f"evaluation after step {self.step}")
            batch = next(loader)
            labels = _count_labels(batch)
            loss = self.engine.evaluate(batch.to(self.world.device, non_blocking=True))
            sums[0] += loss.double() * labels
            sums[1] += labels
        loader.close()
        if self.world.size > 1:
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _checkpoint(self, background: bool) -> None:
        """Save the state after the current step. Everything queued is waited for first."""
        with self.watch.slowly(f"checkpoint of step {self.step}"):
            self._save(background)

    def _save(self, background: bool) -> None:
        self._read_statuses(drain=True)
        # On disk before the checkpoint, or a kill would leave a gap in metrics.jsonl.
        self.logger.log(self.meter.flush())
        progress = {
            "data": self.loader.state_dict(),
            "tokens": self.meter.tokens_seen,
            "logger": self.logger.state(),
        }
        if background:
            self._announce(self.checkpointer.finish())
            self.checkpointer.save_async(self.step, progress)
        else:
            self._announce(self.checkpointer.finish())
            self._announce(self.checkpointer.save(self.step, progress))
        self.meter.restart()

    def _export(self) -> None:
        """Weights in the names and layout of Hugging Face's Llama; collective."""
        folder = Path(self.config.run_dir()) / "hf"
        dtype = torch.float32 if self.config.precision.compute == "fp32" else torch.bfloat16
        save_pretrained(self.engine.model, folder, dtype=dtype, weight=self.engine.full_weight)
        self.logger.event("export", step=self.step, path=str(folder))

    def _announce(self, path: Path | None) -> None:
        if path is not None:
            self.logger.event("checkpoint", step=int(path.name.split("_")[1]), path=str(path))

    def _restore(self, manifest: Manifest | None) -> int:
        if manifest is None:
            return 0
        try:
            self.loader.load_state_dict(manifest.progress["data"])
        except ValueError as error:
            raise CheckpointError(f"checkpoint of step {manifest.step}: {error}") from error
        before = manifest.config.get("data", {}).get("global_batch")
        if before != self.config.data.global_batch:
            log.warning(
                "data.global_batch was %s when step %d was saved and is %s now: the data go on "
                "where they were, with steps of another size",
                before,
                manifest.step,
                self.config.data.global_batch,
            )
        return manifest.step


def build_model(config: TrainConfig, world: World) -> nn.Module:
    """The model in fp32 on the rank's device, the same on every rank (seeded by run.seed); or,
    where it is too large for that, on the meta device, and the engine draws its shards."""
    meta = _born_sharded(config, world)
    with torch.device("meta" if meta else world.device):
        model = TransformerLM(config.model_config())
    if not meta:
        _load_initial_weights(model, config)
    return model


def _load_initial_weights(model: nn.Module, config: TrainConfig) -> None:
    if config.model.init_from:
        try:
            load_weights(model, config.model.init_from)
        except ValueError as error:
            raise ConfigError(f"model.init_from={config.model.init_from}: {error}") from error


def _born_sharded(config: TrainConfig, world: World) -> bool:
    """Whether no rank ever holds the whole model: it would fill a quarter of the device in fp32.

    Smaller ones are built whole, so that a run starts from the same weights under any strategy.
    Raises ConfigError where the model is too large and the engine cannot do otherwise.
    """
    if world.device.type != "cuda":
        return False
    needed = 4 * config.model_config().num_parameters()
    memory = torch.cuda.get_device_properties(world.device).total_memory
    shards = config.engine.name == "torch" and config.engine.strategy == "fsdp2" and world.size > 1
    if shards and not config.model.tie_embeddings:
        return bool(needed > memory / 4)
    if needed > memory:
        raise ConfigError(
            f"model.name={config.model.name} takes {needed / 1e9:.0f} GB in fp32 and "
            f"{world.device} has {memory / 1e9:.0f} GB: only engine=fsdp2 on several ranks, with "
            "model.tie_embeddings=false, makes weights shard by shard"
        )
    return False


def _count_labels(batch: Batch) -> int:
    """Labels that the loss of a micro-batch is the mean of; on the host, before it moves."""
    return int((batch.labels != IGNORE_INDEX).sum())


def _seed(config: TrainConfig) -> None:
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)

