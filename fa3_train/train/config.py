"""The run configuration: one typed schema, read by the engines, filled by Hydra.

`TrainConfig` is a tree of plain dataclasses. `resolve()` merges a composed (untyped) config into
it with OmegaConf in struct mode, so an unknown key or a wrong type is an error that names the
key; `check()` in `config_rules.py` then judges the values together, before a device is touched.

Conventions: a unit stands in the field's name or its comment; `None` means "derived from the
rest", and `null` in YAML; closed sets of words carry `choices` in the field's metadata; counts
of steps are optimizer steps. Nothing here imports torch, so that `dryrun` starts quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

# Processes on this machine, as torchrun and DeepSpeed's launcher say it.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")

__all__ = [
    "AttentionSection",
    "CheckpointSection",
    "ConfigError",
    "DataSection",
    "EngineSection",
    "LoggingSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "PrecisionSection",
    "RopeScaling",
    "RunSection",
    "ScheduleSection",
    "TrainConfig",
    "near_misses",
    "resolve",
    "schema_paths",
]


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the key, the rule and the value."""


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass
class RopeScaling:
    """Llama-3.1 frequency scaling; names and meaning as in Hugging Face's `rope_scaling`."""

    rope_type: str = _choice("llama3")
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class ModelSection:
    """Shape of the network, as in `fa3_train.models.ModelConfig`; `conf/model/*.yaml` fill it."""

    name: str = "tiny"
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    ffn_hidden_size: int = 704
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    window_size: int | None = None  # keys that a query sees, itself included; None = all
    softcap: float = 0.0  # 0 = off
    activation_checkpointing: str = _choice("none", "selective", "full")
    loss_chunk_tokens: int = 0  # tokens whose logits exist at once; 0 = chosen from the vocabulary
    init_from: str | None = None  # folder with Hugging Face Llama safetensors to start from


@dataclass
class AttentionSection:
    """Which attention runs. A backend that cannot serve the request is an error, not a switch."""

    backend: str = _choice("auto", "hopper", "sdpa", "reference")
    precision: str = _choice("bf16", "fp8")  # fp8: e4m3 forward, bf16 backward
    deterministic: bool = False  # gradients bitwise repeatable; run.deterministic implies it


@dataclass
class DataSection:
    """Where tokens come from and how they are packed into batches."""

    kind: str = _choice("stdlib", "text", "megatron", "hf", "random")
    path: str | None = None  # text: folder or glob; megatron: prefix of .bin/.idx; hf: data set
    text_field: str = "text"  # column of a jsonl line or HF row
    hf_config: str | None = None
    hf_split: str = "train"
    tokenizer: str | None = None  # a tokenizer.json; None trains byte-level BPE on the corpus
    bpe_vocab_size: int = 4096  # entries of a tokenizer that is trained here
    cache_dir: str | None = None  # None: $XDG_CACHE_HOME/fa3_train
    val_fraction: float = 0.02  # of the documents
    shuffle: bool = True
    seq_len: int = 256  # tokens of one packed sequence
    micro_batch: int = 4  # sequences on one GPU in one forward
    global_batch: int = 4  # sequences in one optimizer step, over all GPUs
    random_doc_len: int = 0  # random: mean tokens of a document; 0 = one document a sequence


@dataclass
class EngineSection:
    """Who drives the step."""

    name: str = _choice("torch", "deepspeed")
    strategy: str = _choice("ddp", "fsdp2")  # torch under torchrun; ignored by one process
    compile: bool = False  # torch.compile of each layer
    reshard_after_forward: bool = True  # fsdp2; false keeps 16-bit weights whole within a step
    reduce_each: bool = True  # fsdp2; false keeps the gradient whole (reduce's dtype) within a step
    zero_stage: int = 0  # deepspeed
    optimizer: str = _choice("adamw", "fused_adam")  # fused_adam: DeepSpeed's own CUDA kernel
    offload_optimizer: bool = False  # deepspeed: optimizer state in host memory
    overlap_comm: bool = True  # deepspeed
    timeout_s: int = 600  # of a collective, and of a rank's setup or checkpoint
    hang_s: int = 40  # a rank that stands still while others wait ends the run; 0 = never
    dead_s: int = 15  # ... as does one without a sign of life


@dataclass
class ParallelSection:
    """Splits other than data parallelism."""

    context: int = 1  # ranks that share each sequence; 0 = all of a machine
    method: str = _choice("auto", "ulysses", "ring", "gather")  # auto: ulysses if heads divide


@dataclass
class OptimizerSection:
    name: str = _choice("adamw")
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # not on norms and embeddings' 1-d parameters
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
    fused: bool = True  # torch's fused AdamW where the device has it


@dataclass
class ScheduleSection:
    name: str = _choice("cosine", "linear", "constant", "wsd")
    warmup_steps: int = 0
    min_ratio: float = 0.1  # last learning rate / peak
    decay_fraction: float = 0.2  # wsd: share of the steps in the final decay


@dataclass
class PrecisionSection:
    compute: str = _choice("bf16", "fp32")  # forward and backward
    params: str = _choice("fp32", "bf16")  # master weights and optimizer state
    reduce: str = _choice("fp32", "bf16")  # gradient reduction across ranks
    te_recipe: str = _choice("current", "delayed", "block")  # FP8 scaling of linear=te_fp8


@dataclass
class LoggingSection:
    every: int = 10  # steps between two log lines (and host syncs); metrics.jsonl has each step
    progress: str = _choice("auto", "rich", "plain", "off")
    attention_every: int = 50  # steps between two samples of the attention share; 0 = never
    wandb: str = _choice("auto", "offline", "online", "off")  # auto: online only with a login
    wandb_project: str = "fa3_train"
    tensorboard: bool = False
    plots: bool = True
    hfu: bool = False  # also log hardware utilisation, which counts recomputation


@dataclass
class CheckpointSection:
    dir: str | None = None  # None: <run.dir>/checkpoints
    every: int = 0  # steps; 0 = only at the end
    keep: int = 2  # newest checkpoints that stay
    async_save: bool = False  # engine=torch: write while the next steps run
    hash: bool = True  # SHA-256 of every file in the manifest, checked when resuming
    save_last: bool = True
    export_hf: bool = False  # at the end: weights as a Hugging Face folder, <run.dir>/hf
    resume: str = "auto"  # auto | never | path of a checkpoint


@dataclass
class RunSection:
    name: str | None = None  # None: the recipe's name
    dir: str | None = None  # None: runs/<name>
    steps: int = 100
    seed: int = 1234
    device: str = _choice("auto", "cpu", "cuda")
    gpus: int = 0  # size this recipe was tuned for; 0 = any. Other sizes run, and say so
    threads: int = 0  # CPU threads of a process; 0 = torch's choice
    eval_every: int = 0  # steps; 0 = only before the first and after the last step
    eval_batches: int = 8  # micro-batches of one evaluation; 0 = no evaluation
    deterministic: bool = False
    guard: bool = True  # stop before the optimizer step when loss or gradient is not finite


@dataclass
class TrainConfig:
    """Everything a run needs. Field groups are described at their classes."""

    recipe: str = "quickstart"
    description: str = ""
    dryrun: bool = False
    linear: str = _choice("torch", "te", "te_fp8")  # norms, linears and MLP of the layers
    model: ModelSection = field(default_factory=ModelSection)
    attention: AttentionSection = field(default_factory=AttentionSection)
    data: DataSection = field(default_factory=DataSection)
    engine: EngineSection = field(default_factory=EngineSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    run: RunSection = field(default_factory=RunSection)

    def grad_accum(self, world_size: int) -> int:
        """Micro-batches of one optimizer step on each of `world_size` ranks.

        Raises ConfigError when `data.global_batch` is not a multiple of micro_batch * ranks.
        """
        ranks = world_size // self.context_ranks(world_size)
        per_pass = self.data.micro_batch * ranks
        if per_pass <= 0 or self.data.global_batch % per_pass:
            raise ConfigError(
                f"data.global_batch={self.data.global_batch} is not a multiple of "
                f"data.micro_batch ({self.data.micro_batch}) x data-parallel ranks ({ranks}) "
                f"= {per_pass} sequences"
            )
        return self.data.global_batch // per_pass

    def context_ranks(self, world_size: int) -> int:
        """Ranks that share one sequence; `parallel.context=0` takes all ranks of a machine (of
        eight, where no launcher says how many it has)."""
        if self.parallel.context:
            return self.parallel.context
        local = next((os.environ[n] for n in _LOCAL_SIZES if os.environ.get(n)), "8")
        return max(1, min(world_size, int(local)))

    def context_method(self, ranks: int) -> str:
        """How `ranks` ranks share a sequence: "ulysses", "ring" or "gather"."""
        if self.parallel.method != "auto":
            return self.parallel.method
        if not self.model.num_heads % ranks and not self.model.num_kv_heads % ranks:
            return "ulysses"
        return "ring" if self.model.window_size is None else "gather"

    def tokens_per_step(self) -> int:
        """Packed tokens in one optimizer step, over all GPUs."""
        return self.data.global_batch * self.data.seq_len

    def run_name(self) -> str:
        return self.run.name or self.recipe

    def run_dir(self) -> str:
        """Folder for everything that the run writes, relative to the working folder."""
        return self.run.dir or f"runs/{self.run_name()}"

    def checkpoint_dir(self) -> str:
        return self.checkpoint.dir or f"{self.run_dir()}/checkpoints"

    def model_config(self) -> Any:
        """The `fa3_train.models.ModelConfig` of this run (imports torch)."""
        from fa3_train.models.config import ModelConfig

        shape = dataclasses.asdict(self.model)
        for key in ("name", "init_from"):
            shape.pop(key)
        return ModelConfig(
            **shape,
            attention_backend=self.attention.backend,
            attention_deterministic=self.attention.deterministic or self.run.deterministic,
            attention_precision=self.attention.precision,
            linear=self.linear,
            te_recipe=self.precision.te_recipe,
            compile_layers=self.engine.compile,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for YAML, wandb and the checkpoint."""
        return dataclasses.asdict(self)


def _section_of(annotation: Any) -> type | None:
    """The dataclass behind an annotation such as `RopeScaling | None`; None for a leaf."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None


def schema_paths(cls: type = TrainConfig, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every dotted key of the schema, sections included, with its dataclass field."""
    hints = typing.get_type_hints(cls)
    paths: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(cls):
        path = f"{prefix}{item.name}"
        paths[path] = item
        section = _section_of(hints[item.name])
        if section is not None:
            paths.update(schema_paths(section, f"{path}."))
    return paths


def near_misses(key: str, known: typing.Iterable[str], limit: int = 3) -> list[str]:
    """Known keys that a mistyped or misplaced `key` may mean, the likeliest first.

    A key whose last part is right but whose section is wrong (`lr` for `optimizer.lr`) counts
    before one that is only spelt alike.
    """
    names = list(known)
    leaf = key.rsplit(".", 1)[-1]
    exact = [name for name in names if name.rsplit(".", 1)[-1] == leaf]
    close = difflib.get_close_matches(key, names, n=limit, cutoff=0.6)
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in names}
    alike = [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, n=limit, cutoff=0.75)]
    return list(dict.fromkeys(exact + close + alike))[:limit]


def unknown_key(key: str, where: str = "") -> ConfigError:
    """The error for a key that the schema lacks."""
    hints = near_misses(key, schema_paths())
    text = f"unknown key '{key}'{where}"
    return ConfigError(text + (f"; did you mean {', '.join(hints)}?" if hints else ""))


def resolve(raw: DictConfig | dict[str, Any]) -> TrainConfig:
    """Typed config from a composed one. Judges keys, types and words, not combinations.

    Raises ConfigError for an unknown key (with near misses), a wrong type or a word outside of
    its choices. Interpolations (`${data.seq_len}`) are resolved.
    """
    schema = OmegaConf.structured(TrainConfig)
    try:
        merged = OmegaConf.merge(schema, raw)
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise unknown_key(error.full_key or str(error)) from None
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key or 'config'}: {reason}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    assert isinstance(config, TrainConfig)
    _check_choices(config)
    return config


def _check_choices(node: Any, prefix: str = "") -> None:
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        path = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{path}.")
            continue
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{path}={value!r} is not one of {', '.join(choices)}{hint}")
