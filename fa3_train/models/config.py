"""Architecture of a Llama-style decoder as plain data: one dataclass and a table of named models.

The dataclass holds integers and strings only, so it can be read on any machine (command line,
dry runs, FLOP counts) without building a module.  `ModelConfig.validate` is called by
`TransformerLM` and by the training configuration, so that an impossible model is refused with the
name of the field before any memory is allocated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

ATTENTION_BACKENDS = ("auto", "hopper", "sdpa", "reference")
ATTENTION_PRECISIONS = ("bf16", "fp8")
LINEARS = ("torch", "te", "te_fp8")
TE_RECIPES = ("current", "delayed", "block")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
FP8_HEAD_DIMS = (64, 96, 128, 192, 256)  # Hadamard transforms: powers of two, 3 x 32 and 3 x 64
_LLAMA3_ROPE_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass
class ModelConfig:
    """Sizes and options of a decoder (RMSNorm, GQA attention with RoPE, SwiGLU).

    Lengths are in tokens, sizes in elements.  `validate()` raises ValueError with the field name.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    ffn_hidden_size: int = 704
    max_seq_len: int = 2048  # longest document piece; sizes the RoPE table
    rope_theta: float = 10_000.0
    # Llama-3.1 frequency scaling: factor, low_freq_factor, high_freq_factor,
    # original_max_position_embeddings; None keeps the plain frequencies.
    rope_scaling: dict[str, Any] | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm over head_dim of q and k, before RoPE
    tie_embeddings: bool = True
    init_std: float = 0.02
    window_size: int | None = None  # sliding window: keys a query sees, itself included; None: all
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: off
    attention_backend: str = "auto"  # one of ATTENTION_BACKENDS
    attention_deterministic: bool = False  # gradients bitwise repeatable
    attention_precision: str = "bf16"  # "fp8": RoPE + Hadamard + e4m3 forward, 16-bit backward
    linear: str = "torch"  # one of LINEARS
    te_recipe: str = "current"  # FP8 scaling of linear=te_fp8, one of TE_RECIPES
    activation_checkpointing: str = "none"  # one of ACTIVATION_CHECKPOINTING
    compile_layers: bool = False  # torch.compile every TransformerLayer
    loss_chunk_tokens: int = 0  # tokens whose logits exist at once; 0: chosen from the vocabulary

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def layer_parameters(self) -> int:
        """Parameters of one TransformerLayer, norms included."""
        h = self.hidden_size
        attention = h * (self.q_size + 2 * self.kv_size) + self.q_size * h
        norms = 2 * h + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * h * self.ffn_hidden_size + norms

    def embedding_parameters(self) -> int:
        """Parameters of the token embedding (the same again for an untied head)."""
        return self.vocab_size * self.hidden_size

    def num_parameters(self) -> int:
        """All trained parameters; a tied head is counted once."""
        tables = self.embedding_parameters() * (1 if self.tie_embeddings else 2)
        return tables + self.num_layers * self.layer_parameters() + self.hidden_size

    def matmul_parameters(self) -> int:
        """Parameters that take part in a matrix product per token (the N of 6 N FLOPs per token).

        Every weight matrix of the layers plus the output head; the embedding is a lookup and the
        norms are element-wise, so neither is counted.
        """
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        layers = self.num_layers * (self.layer_parameters() - norms)
        return layers + self.embedding_parameters()

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def validate(self) -> None:
        """Refuse an impossible architecture: ValueError with field, rule and actual value."""
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "ffn_hidden_size", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads must be a multiple of model.num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 8 or self.head_dim > 256:
            raise ValueError(
                f"model.head_dim must be a multiple of 8 up to 256, got {self.head_dim}"
            )
        for name, floor in (("rope_theta", 0.0), ("norm_eps", 0.0), ("init_std", 0.0)):
            if not getattr(self, name) > floor:
                raise ValueError(f"model.{name} must be positive, got {getattr(self, name)!r}")
        if self.softcap < 0:
            raise ValueError(f"model.softcap must be >= 0 (0 is off), got {self.softcap}")
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(
                f"model.window_size must be >= 1 or null (no window), got {self.window_size}"
            )
        if self.loss_chunk_tokens < 0:
            raise ValueError(
                f"model.loss_chunk_tokens must be >= 0 (0 chooses), got {self.loss_chunk_tokens}"
            )
        self._validate_choices()
        self._validate_rope_scaling()
        self._validate_combinations()

    def _validate_choices(self) -> None:
        choices = {
            "attention_backend": ATTENTION_BACKENDS,
            "attention_precision": ATTENTION_PRECISIONS,
            "linear": LINEARS,
            "te_recipe": TE_RECIPES,
            "activation_checkpointing": ACTIVATION_CHECKPOINTING,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    def _validate_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("rope_type", "llama3")
        if kind != "llama3":
            raise ValueError(f"model.rope_scaling.rope_type must be llama3, got {kind!r}")
        missing = [key for key in _LLAMA3_ROPE_KEYS if key not in self.rope_scaling]
        unknown = sorted(set(self.rope_scaling) - {*_LLAMA3_ROPE_KEYS, "rope_type"})
        if missing or unknown:
            raise ValueError(
                f"model.rope_scaling must have exactly the keys {', '.join(_LLAMA3_ROPE_KEYS)}; "
                f"missing: {missing}, unknown: {unknown}"
            )
        low = self.rope_scaling["low_freq_factor"]
        high = self.rope_scaling["high_freq_factor"]
        if not high > low > 0:
            raise ValueError(
                "model.rope_scaling.high_freq_factor must exceed low_freq_factor > 0, "
                f"got {high} and {low}"
            )

    def _validate_combinations(self) -> None:
        if self.attention_precision == "fp8" and self.softcap:
            raise ValueError(
                "model.softcap is not available with model.attention_precision=fp8, "
                f"got softcap={self.softcap}"
            )
        if self.attention_precision == "fp8" and self.head_dim not in FP8_HEAD_DIMS:
            raise ValueError(
                "model.attention_precision=fp8 needs model.head_dim to be one of "
                f"{', '.join(map(str, FP8_HEAD_DIMS))}, got {self.head_dim}"
            )
        if self.linear == "te_fp8":
            for name in ("hidden_size", "ffn_hidden_size"):
                if getattr(self, name) % 16:
                    raise ValueError(
                        f"model.linear=te_fp8 needs model.{name} to be a multiple of 16, "
                        f"got {getattr(self, name)}"
                    )
            if self.te_recipe == "delayed" and self.activation_checkpointing != "none":
                raise ValueError(
                    "model.te_recipe=delayed keeps amax history that recomputation would update "
                    "twice: use te_recipe=current or activation_checkpointing=none, got "
                    f"activation_checkpointing={self.activation_checkpointing}"
                )


def _llama31_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama3(factor: float, **sizes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=128_256,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=_llama31_rope(factor),
        **sizes,
    )


MODELS: dict[str, ModelConfig] = {
    # 4.0 M parameters, the byte-level vocabulary of the default corpus: trains on a CPU.
    "tiny": ModelConfig(),
    "100m": ModelConfig(
        vocab_size=32_768, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=4,
        head_dim=64, ffn_hidden_size=2048, max_seq_len=8192,
    ),
    # Sizes of Llama 3.2 1B and Llama 3.1 8B / 70B / 405B (Meta's model cards; arXiv 2407.21783,
    # table 3).
    "llama3_1b": _llama3(
        32.0, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
        ffn_hidden_size=8192, tie_embeddings=True,
    ),
    "llama3_8b": _llama3(
        8.0, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        ffn_hidden_size=14_336, tie_embeddings=False,
    ),
    "llama3_70b": _llama3(
        8.0, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128,
        ffn_hidden_size=28_672, tie_embeddings=False,
    ),
    "llama3_405b": _llama3(
        8.0, hidden_size=16_384, num_layers=126, num_heads=128, num_kv_heads=8, head_dim=128,
        ffn_hidden_size=53_248, tie_embeddings=False,
    ),
    # GPT-3 175B (arXiv 2005.14165, table 2.1): 96 layers, 12288 wide, 96 heads of 128, context 2048
    # and a tied head.  Three things differ because this is a Llama block: RoPE instead of learned
    # positions, RMSNorm without biases, and SwiGLU.  SwiGLU has three matrices where GPT-3's MLP
    # has two, so 8/3 * 12288 = 32768 keeps parameters and FLOPs of a layer at 12 h^2 exactly.
    # The vocabulary 50257 is padded to a multiple of 128.
    "gpt3_175b": ModelConfig(
        vocab_size=50_304, hidden_size=12_288, num_layers=96, num_heads=96, num_kv_heads=96,
        head_dim=128, ffn_hidden_size=32_768, max_seq_len=2048, tie_embeddings=True,
    ),
}


def model_config(name: str) -> ModelConfig:
    """A fresh copy of a named configuration; ValueError lists the names when it is unknown."""
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    chosen = MODELS[name]
    scaling = None if chosen.rope_scaling is None else dict(chosen.rope_scaling)
    return chosen.replace(rope_scaling=scaling)
