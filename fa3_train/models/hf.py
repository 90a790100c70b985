"""Hugging Face Llama checkpoints: `config.json` and safetensors, one file or shards with an index.

Their layout keeps q, k, v and gate, up apart; ours has one matrix for each group, rows in the same
order.  RoPE is half-split in both, so no row is permuted:

    model.embed_tokens.weight                        embedding.weight
    model.layers.N.input_layernorm.weight            layers.N.attention.qkv.norm.weight
    model.layers.N.self_attn.{q,k,v}_proj.weight     layers.N.attention.qkv.linear.weight, stacked
    model.layers.N.self_attn.o_proj.weight           layers.N.attention.out_proj.weight
    model.layers.N.post_attention_layernorm.weight   layers.N.mlp.norm.weight
    model.layers.N.mlp.{gate,up}_proj.weight         layers.N.mlp.mlp.gate_up_proj.weight, stacked
    model.layers.N.mlp.down_proj.weight              layers.N.mlp.mlp.down_proj.weight
    model.norm.weight                                norm.weight
    lm_head.weight (absent when tied)                head.weight

With `linear=te` the right-hand names are TransformerEngine's; the table below has both.  QK-norm
uses Qwen3's names (self_attn.q_norm, k_norm).  Tensors are read one at a time from the memory map:
the peak is the model plus one matrix.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fa3_train.models.config import ModelConfig

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def _layer_table(linear: str, qk_norm: bool) -> dict[str, tuple[str, ...]]:
    """Our parameter of a layer -> their names, to be stacked by rows in this order."""
    torch_names: dict[str, tuple[str, ...]] = {
        "attention.qkv.norm.weight": ("input_layernorm.weight",),
        "attention.qkv.linear.weight": (
            "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
        ),
        "attention.out_proj.weight": ("self_attn.o_proj.weight",),
        "mlp.norm.weight": ("post_attention_layernorm.weight",),
        "mlp.mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.mlp.down_proj.weight": ("mlp.down_proj.weight",),
    }
    te_names = {
        "attention.qkv.norm.weight": "attention.qkv.layer_norm_weight",
        "attention.qkv.linear.weight": "attention.qkv.weight",
        "mlp.norm.weight": "mlp.layer_norm_weight",
        "mlp.mlp.gate_up_proj.weight": "mlp.fc1_weight",
        "mlp.mlp.down_proj.weight": "mlp.fc2_weight",
    }
    rename = te_names if linear != "torch" else {}
    table = {rename.get(ours, ours): theirs for ours, theirs in torch_names.items()}
    if qk_norm:
        table["attention.q_norm.weight"] = ("self_attn.q_norm.weight",)
        table["attention.k_norm.weight"] = ("self_attn.k_norm.weight",)
    return table


def name_table(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Every parameter of ours -> the Hugging Face tensors that are stacked to make it."""
    table: dict[str, tuple[str, ...]] = {"embedding.weight": ("model.embed_tokens.weight",)}
    layer = _layer_table(config.linear, config.qk_norm)
    for index in range(config.num_layers):
        for ours, theirs in layer.items():
            table[f"layers.{index}.{ours}"] = tuple(f"model.layers.{index}.{t}" for t in theirs)
    table["norm.weight"] = ("model.norm.weight",)
    if not config.tie_embeddings:
        table["head.weight"] = ("lm_head.weight",)
    return table


def _row_counts(config: ModelConfig, ours: str) -> list[int]:
    """Rows of each Hugging Face tensor inside one of our stacked matrices."""
    if ours.endswith(("attention.qkv.linear.weight", "attention.qkv.weight")):
        return [config.q_size, config.kv_size, config.kv_size]
    return [config.ffn_hidden_size, config.ffn_hidden_size]


# ---------------------------------------------------------------------------- configuration


def config_from_hf(raw: dict[str, Any], **overrides: Any) -> ModelConfig:
    """ModelConfig of a `config.json`; ValueError for what this model has no counterpart of."""
    kind = raw.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise ValueError(f"config.json: model_type must be llama or qwen3, got {kind!r}")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(f"config.json: {key} must be false (no biases here), got {raw[key]}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act must be silu, got {raw['hidden_act']!r}")
    if raw.get("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window must be false, got true")
    theta, scaling = _rope_from_hf(raw)
    fields: dict[str, Any] = {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": raw["num_attention_heads"],
        "num_kv_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        "ffn_hidden_size": raw["intermediate_size"],
        "max_seq_len": raw["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "qk_norm": kind == "qwen3",
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "init_std": raw.get("initializer_range", 0.02),
    }
    config = ModelConfig(**{**fields, **overrides})
    config.validate()
    return config


def _rope_from_hf(raw: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    # transformers 5 keeps everything in rope_parameters; before that it was two keys.
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(scaling.pop("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json: rope_type must be default or llama3, got {kind!r}")
    return theta, {"rope_type": "llama3", **scaling}


def config_to_hf(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The `config.json` of a model; ValueError for options that Llama has not."""
    for field, off in (("softcap", 0.0), ("window_size", None)):
        if getattr(config, field) != off:
            raise ValueError(
                f"model.{field} must be {off} in a Hugging Face Llama checkpoint, "
                f"got {getattr(config, field)}"
            )
    rope = dict(config.rope_scaling or {"rope_type": "default"})
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_seq_len,
        # Both spellings: transformers 5 reads rope_parameters, 4 the other two.
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_config(folder: str | Path, **overrides: Any) -> ModelConfig:
    """ModelConfig of a checkpoint folder; `overrides` set fields such as attention_backend."""
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: not a Hugging Face checkpoint folder")
    return config_from_hf(json.loads(path.read_text()), **overrides)


# ------------------------------------------------------------------------------------ weights


class _Shards:
    """Tensors of a checkpoint folder by name, opened shard by shard as they are needed."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        index = self.folder / _INDEX
        single = self.folder / _SINGLE
        if index.is_file():
            self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as stream:
                self.files = {name: _SINGLE for name in stream.keys()}  # noqa: SIM118
        else:
            raise ValueError(f"{self.folder} holds neither {_SINGLE} nor {_INDEX}")
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.files[name]
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{_INDEX} names the shard {path}, which does not exist")
            self._open = {file: safe_open(path, framework="pt")}  # one shard mapped at a time
        return self._open[file].get_tensor(name)


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fill a `TransformerLM` from a checkpoint folder, converting to each parameter's dtype.

    Parameters may be on any device, also sharded as DTensor. Raises ValueError, before anything is
    written, when a tensor is missing or left over; and for a wrong shape.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    shards = _Shards(folder)
    table = name_table(config)
    wanted = {theirs for group in table.values() for theirs in group}
    missing = sorted(wanted - set(shards.files))
    # A tied checkpoint may still carry the head; old ones carry the inverse frequencies.
    left = sorted(
        name
        for name in set(shards.files) - wanted
        if not name.endswith("rotary_emb.inv_freq")
        and not (config.tie_embeddings and name == "lm_head.weight")
    )
    if missing or left:
        raise ValueError(
            f"{folder} does not fit the model: missing {missing[:3]} ({len(missing)} in all), "
            f"unknown {left[:3]} ({len(left)} in all)"
        )
    parameters = dict(model.named_parameters())
    for ours, theirs in table.items():
        parts = [shards[name] for name in theirs]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        target = parameters[ours]
        if tuple(value.shape) != tuple(target.shape):
            raise ValueError(
                f"{' + '.join(theirs)} has the shape {tuple(value.shape)}, but {ours} needs "
                f"{tuple(target.shape)}: config.json and model differ"
            )
        _assign(target, value)


def _assign(target: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(target, "device_mesh"):  # DTensor: every rank reads, and keeps its own shard
        from torch.distributed.tensor import distribute_tensor

        local = value.to(device=target.device, dtype=target.dtype)
        value = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 << 30,
    weight: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Write a `TransformerLM` as a folder that `LlamaForCausalLM.from_pretrained` reads.

    `weight` turns a parameter into its full value (gathers a shard); default: DTensor's
    `full_tensor` where it is one. All ranks must then call this; only rank 0 writes. Every file is
    written under a temporary name and renamed, the index and config.json last.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    raw_config = config_to_hf(config, dtype)
    out = Path(folder).expanduser()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    writes = not distributed or torch.distributed.get_rank() == 0
    if writes:
        out.mkdir(parents=True, exist_ok=True)
    files: list[list[str]] = []  # names in each finished shard
    pending: dict[str, torch.Tensor] = {}
    size = total = 0
    for name, tensor in _exported(model, config, dtype, weight or _full):
        if not writes:
            continue  # took part in the gathering
        bytes_ = tensor.numel() * tensor.element_size()
        if pending and size + bytes_ > max_shard_bytes:
            files.append(_write_shard(out, len(files), pending))
            pending, size = {}, 0
        pending[name] = tensor
        size += bytes_
        total += bytes_
    if not writes:
        return
    files.append(_write_shard(out, len(files), pending))
    if len(files) == 1:
        os.replace(out / "shard-0.part", out / _SINGLE)
        (out / _INDEX).unlink(missing_ok=True)
    else:
        weight_map = {}
        for number, names in enumerate(files):
            final = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
            os.replace(out / f"shard-{number}.part", out / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(out / _INDEX, json.dumps(index, indent=1))
        (out / _SINGLE).unlink(missing_ok=True)
    _write_text(out / "config.json", json.dumps(raw_config, indent=1))


def _exported(
    model: nn.Module,
    config: ModelConfig,
    dtype: torch.dtype,
    weight: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = dict(model.named_parameters())
    for ours, theirs in name_table(config).items():
        value = weight(parameters[ours]).detach().to(device="cpu", dtype=dtype)
        parts = [value] if len(theirs) == 1 else value.split(_row_counts(config, ours))
        for name, part in zip(theirs, parts, strict=True):
            yield name, part.contiguous()


def _full(parameter: torch.Tensor) -> torch.Tensor:
    full = getattr(parameter, "full_tensor", None)
    return parameter if full is None else full()


def _write_shard(out: Path, number: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    save_file(tensors, str(out / f"shard-{number}.part"), metadata={"format": "pt"})
    return list(tensors)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)
