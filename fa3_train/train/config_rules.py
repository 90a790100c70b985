"""Rules about values taken together, judged before a device is touched.

`check_combination` needs nothing but the numbers, so it also guards `dryrun` on a laptop.
`check_machine` asks what this machine has (packages, a GPU) and runs only before a real run; it
returns the same sentences that a dry run prints as notes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from fa3_train.train.config import ConfigError, TrainConfig

TE_INSTALL = "pip install --no-build-isolation 'fa3_train[te]' (after torch; needs nvcc)"


def check_combination(config: TrainConfig, world_size: int = 1) -> None:
    """Raise ConfigError for the first impossible combination, naming key, rule and value."""
    for complaint in combination_complaints(config, world_size):
        raise ConfigError(complaint)


def check_machine(config: TrainConfig, device: str) -> None:
    """Raise ConfigError when this machine cannot run `config` on `device` ("cpu" or "cuda")."""
    for complaint in machine_complaints(config, device):
        raise ConfigError(complaint)


def combination_complaints(config: TrainConfig, world_size: int = 1) -> Iterator[str]:
    """One sentence per broken rule, in the order of the schema."""
    yield from _ranges(config)
    yield from _model(config)
    yield from _data(config)
    yield from _parallel(config, world_size)
    yield from _engine(config)
    yield from _precision(config)
    yield from _schedule(config)


def _ranges(config: TrainConfig) -> Iterator[str]:
    at_least = {
        "run.steps": (config.run.steps, 1),
        "run.gpus": (config.run.gpus, 0),
        "run.threads": (config.run.threads, 0),
        "run.seed": (config.run.seed, 0),
        "run.eval_every": (config.run.eval_every, 0),
        "run.eval_batches": (config.run.eval_batches, 0),
        "data.seq_len": (config.data.seq_len, 2),
        "data.micro_batch": (config.data.micro_batch, 1),
        "data.global_batch": (config.data.global_batch, 1),
        "data.random_doc_len": (config.data.random_doc_len, 0),
        "data.bpe_vocab_size": (config.data.bpe_vocab_size, 257),
        "engine.zero_stage": (config.engine.zero_stage, 0),
        "engine.timeout_s": (config.engine.timeout_s, 1),
        "engine.hang_s": (config.engine.hang_s, 0),
        "engine.dead_s": (config.engine.dead_s, 2),
        "logging.every": (config.logging.every, 1),
        "logging.attention_every": (config.logging.attention_every, 0),
        "checkpoint.every": (config.checkpoint.every, 0),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "schedule.warmup_steps": (config.schedule.warmup_steps, 0),
    }
    for key, (value, floor) in at_least.items():
        if value < floor:
            yield f"{key} must be >= {floor}, got {value}"
    if config.engine.zero_stage > 3:
        yield f"engine.zero_stage must be 0, 1, 2 or 3, got {config.engine.zero_stage}"
    if not config.optimizer.lr > 0:
        yield f"optimizer.lr must be > 0, got {config.optimizer.lr}"
    if config.optimizer.clip_norm < 0:
        yield f"optimizer.clip_norm must be >= 0 (0 is off), got {config.optimizer.clip_norm}"
    if config.optimizer.weight_decay < 0:
        yield f"optimizer.weight_decay must be >= 0, got {config.optimizer.weight_decay}"
    for key in ("beta1", "beta2"):
        value = getattr(config.optimizer, key)
        if not 0 <= value < 1:
            yield f"optimizer.{key} must be in [0, 1), got {value}"
    if not 0 <= config.data.val_fraction < 1:
        yield f"data.val_fraction must be in [0, 1), got {config.data.val_fraction}"


def _model(config: TrainConfig) -> Iterator[str]:
    try:
        config.model_config().validate()
    except ValueError as error:
        text = str(error)
        # ModelConfig holds these too, but the user writes them under other keys.
        for field, key in {
            "model.attention_precision": "attention.precision",
            "model.attention_backend": "attention.backend",
            "model.linear": "linear",
            "model.te_recipe": "precision.te_recipe",
        }.items():
            text = text.replace(field, key)
        yield text


def _data(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if data.seq_len > config.model.max_seq_len:
        yield (
            f"data.seq_len={data.seq_len} exceeds model.max_seq_len={config.model.max_seq_len}, "
            "the length of the RoPE table"
        )
    if data.kind in ("text", "megatron", "hf") and not data.path:
        yield f"data.kind={data.kind} needs data.path"
    if data.kind in ("stdlib", "random") and data.path:
        yield (
            f"data.path={data.path} is not read by data.kind={data.kind}: "
            "choose data=text, data=megatron or data=hf"
        )
    trains_bpe = data.tokenizer is None and data.kind in ("stdlib", "text", "hf")
    if trains_bpe and data.bpe_vocab_size > config.model.vocab_size:
        yield (
            f"data.bpe_vocab_size={data.bpe_vocab_size} exceeds "
            f"model.vocab_size={config.model.vocab_size}"
        )
    if config.run.eval_batches and data.val_fraction == 0 and data.kind != "random":
        yield (
            "data.val_fraction=0 leaves no documents to evaluate on: "
            f"set run.eval_batches=0 (it is {config.run.eval_batches})"
        )


def _parallel(config: TrainConfig, world_size: int) -> Iterator[str]:
    data, model = config.data, config.model
    if config.parallel.context < 0:
        yield f"parallel.context must be >= 0 (0: all of a machine), got {config.parallel.context}"
        return
    ranks = config.context_ranks(world_size)
    if world_size % ranks:
        yield f"parallel.context={ranks} must divide the number of ranks, {world_size}"
    elif data.micro_batch > 0 and data.global_batch > 0:
        try:
            config.grad_accum(world_size)
        except ConfigError as error:
            yield str(error)
    if ranks == 1:
        return
    method = config.context_method(ranks)
    how = f"parallel.method={method} over parallel.context={ranks} ranks"
    row, parts = data.micro_batch * data.seq_len, ranks if method == "ulysses" else 2 * ranks
    if row % parts:
        yield f"{how} cuts a row into {parts}: data.micro_batch x data.seq_len = {row} does not"
    elif config.linear == "te_fp8" and row // ranks % 16:
        yield f"linear=te_fp8 needs a multiple of 16 tokens on a rank, {how} leaves {row // ranks}"
    if method == "ulysses":
        for key in ("num_heads", "num_kv_heads"):
            if getattr(model, key) % ranks:
                yield f"{how} divides heads: model.{key}={getattr(model, key)} does not"
    else:
        if config.attention.precision == "fp8":
            yield f"attention.precision=fp8 needs parallel.method=ulysses, {how} is not"
        if config.attention.backend == "sdpa":
            yield f"{how} needs attention.backend hopper or reference (log-sum-exp), got sdpa"
        if model.softcap:
            yield f"model.softcap={model.softcap} needs parallel.method=ulysses, {how} is not"
        if method == "ring" and model.window_size is not None:
            yield (
                f"model.window_size={model.window_size} needs parallel.method ulysses or gather, "
                "got ring"
            )
    if config.engine.compile:
        yield f"engine.compile=true is not available with parallel.context > 1, got {ranks}"


def _engine(config: TrainConfig) -> Iterator[str]:
    engine = config.engine
    if engine.name == "torch":
        if engine.zero_stage:
            yield (
                f"engine.zero_stage={engine.zero_stage} belongs to engine=deepspeed; with "
                "engine=torch, engine.strategy=fsdp2 shards parameters, gradients and optimizer"
            )
        if engine.offload_optimizer:
            yield "engine.offload_optimizer=true belongs to engine=deepspeed, got engine=torch"
        if not engine.reduce_each and engine.strategy != "fsdp2":
            yield f"engine.reduce_each=false belongs to engine=fsdp2, got {engine.strategy}"
    else:
        if not engine.reduce_each:
            yield "engine.reduce_each=false belongs to engine=fsdp2, got engine=deepspeed"
        if engine.strategy == "fsdp2":
            yield (
                "engine.strategy=fsdp2 belongs to engine=torch; with engine=deepspeed, "
                "engine.zero_stage=3 does the same"
            )
        if engine.offload_optimizer and engine.zero_stage == 0:
            yield "engine.offload_optimizer=true needs engine.zero_stage >= 1, got 0"
        if config.checkpoint.async_save:
            yield (
                "checkpoint.async_save=true is available with engine=torch only, "
                "got engine=deepspeed"
            )
    resume = config.checkpoint.resume
    if not resume:
        yield "checkpoint.resume must be auto, never or the path of a checkpoint, got ''"


def _precision(config: TrainConfig) -> Iterator[str]:
    attention, precision = config.attention, config.precision
    if precision.params == "bf16" and precision.compute == "fp32":
        yield "precision.params=bf16 needs precision.compute=bf16, got precision.compute=fp32"
    if precision.compute == "fp32":
        if attention.precision == "fp8":
            yield "attention.precision=fp8 needs precision.compute=bf16, got fp32"
        if attention.backend == "hopper":
            yield (
                "attention.backend=hopper computes in bf16: set precision=bf16, or "
                "attention.backend=sdpa for fp32"
            )
        if config.linear == "te_fp8":
            yield "linear=te_fp8 needs precision.compute=bf16, got fp32"
    if attention.precision == "fp8" and attention.backend == "sdpa":
        yield (
            "attention.precision=fp8 is served by attention.backend hopper or reference, got sdpa"
        )
    if config.run.device == "cpu":
        if attention.backend == "hopper":
            yield "attention.backend=hopper needs a Hopper GPU, got run.device=cpu"
        if config.linear != "torch":
            yield f"linear={config.linear} needs a GPU, got run.device=cpu"


def _schedule(config: TrainConfig) -> Iterator[str]:
    schedule = config.schedule
    if not 0 <= schedule.min_ratio <= 1:
        yield f"schedule.min_ratio must be in [0, 1], got {schedule.min_ratio}"
    if schedule.name == "wsd" and not 0 < schedule.decay_fraction <= 1:
        yield f"schedule.decay_fraction must be in (0, 1], got {schedule.decay_fraction}"


def machine_complaints(config: TrainConfig, device: str) -> Iterator[str]:
    """What this machine lacks for `config`: one sentence each, with the way to get it."""
    if config.linear != "torch" and not _has("transformer_engine"):
        yield (
            f"linear={config.linear} needs TransformerEngine, which is not installed: {TE_INSTALL}"
        )
    if config.linear != "torch" and device == "cpu":
        yield f"linear={config.linear} needs an NVIDIA GPU, and none is visible here"
    if config.engine.name == "deepspeed" and not _has("deepspeed"):
        yield "engine=deepspeed needs the package deepspeed: pip install 'deepspeed>=0.19,<0.20'"
    if config.data.kind == "hf" and not _has("datasets"):
        yield "data.kind=hf needs the package datasets: pip install datasets"
    if config.logging.tensorboard and not _has("tensorboard"):
        yield "logging.tensorboard=true needs the package tensorboard: pip install tensorboard"
    if config.attention.backend == "hopper" and device == "cpu":
        yield "attention.backend=hopper needs a Hopper GPU (sm_90), and none is visible here"
    if config.run.device == "cuda" and device == "cpu":
        yield "run.device=cuda, but torch sees no CUDA device (run.device=auto takes the CPU then)"


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
