"""TransformerLM: embedding, decoder layers, final norm, head with chunked loss.

The model knows nothing of data or tensor parallelism: engines wrap it from outside (each
`TransformerLayer` is the unit for FSDP and for torch.compile).  Weights are drawn in
`init_weights`, which also serves a model that was built on the meta device and given memory later.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fa3_train.models.config import ModelConfig
from fa3_train.modules.accumulate import Embedding
from fa3_train.modules.layer import TransformerLayer
from fa3_train.modules.loss import LMHead
from fa3_train.modules.norm import RMSNorm
from fa3_train.modules.rope import Rope, document_positions

# Matrices that write into the residual stream, by the end of their name (torch and TE modules).
_RESIDUAL_WRITERS = ("out_proj.weight", "down_proj.weight", "fc2_weight")


class TransformerLM(nn.Module):
    """A Llama-style language model built from `config` (see `ModelConfig`).

        model = TransformerLM(MODELS["tiny"])
        loss = model(tokens, labels, cu_seqlens=cu, max_seqlen=longest)   # packed (T,)
        logits = model(tokens)                                            # dense (B, S)

    Parameters take torch's default dtype and device; on the meta device nothing is drawn: call
    `to_empty(device=...)`, then `init_weights()`. Raises ValueError for an impossible config.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.rope = Rope(
            config.head_dim, config.max_seq_len, theta=config.rope_theta,
            scaling=config.rope_scaling,
        )
        device = torch.get_default_device()
        # torch's modules draw weights that init_weights would only overwrite (a minute for 8 B on
        # a CPU): build them without memory. TransformerEngine's set themselves up on a device.
        with torch.device("meta") if config.linear == "torch" else contextlib.nullcontext():
            self._build(config)
        if device.type != "meta":
            if config.linear == "torch":
                self.to_empty(device=device)
            self.init_weights()
        if config.compile_layers:
            for layer in self.layers:
                layer.compile()

    def _build(self, config: ModelConfig) -> None:
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.hidden_size, config.ffn_hidden_size, config.num_heads, config.num_kv_heads,
                config.head_dim, rope=self.rope, norm_eps=config.norm_eps, qk_norm=config.qk_norm,
                window_size=config.window_size, softcap=config.softcap, linear=config.linear,
                te_recipe=config.te_recipe, precision=config.attention_precision,
                backend=config.attention_backend, deterministic=config.attention_deterministic,
                activation_checkpointing=config.activation_checkpointing, seed=index,
            )
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = LMHead(
            config.hidden_size, config.vocab_size, chunk_tokens=config.loss_chunk_tokens
        )
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TransformerLM:
        # to_empty() and moves from the meta device make a new Parameter for each name.
        super()._apply(fn, recurse)
        self._tie()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every weight: N(0, init_std^2); norms one.

        Matrices that write into the residual stream get init_std / sqrt(2 * num_layers), so that
        the stream's variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).
        """
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                wide = residual_std if name.endswith(_RESIDUAL_WRITERS) else std
                parameter.normal_(0.0, wide)
        for layer in self.layers:
            layer.attention.core.reset_parameters()

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Mean loss over the labels that are not -100 (FP32 scalar), or logits without labels.

        tokens int64 (B, S), or packed (T,) with cu_seqlens (N + 1,) int32 and max_seqlen: a
        document sees only itself. A (T,) without cu_seqlens is one document. Labels are already
        shifted: labels[t] is the token after tokens[t]. Raises ValueError where a sequence is
        longer than config.max_seq_len.
        """
        if tokens.dim() == 1 and cu_seqlens is None:
            cu_seqlens = torch.tensor(
                [0, tokens.shape[0]], dtype=torch.int32, device=tokens.device
            )
            max_seqlen = tokens.shape[0]
        if cu_seqlens is not None and (tokens.dim() != 1 or max_seqlen is None):
            raise ValueError(
                "cu_seqlens needs packed tokens (T,) and max_seqlen, got tokens "
                f"{tuple(tokens.shape)} and max_seqlen {max_seqlen}"
            )
        longest = max_seqlen if max_seqlen is not None else tokens.shape[-1]
        if longest > self.config.max_seq_len:
            raise ValueError(
                f"a sequence has {longest} tokens, more than model.max_seq_len="
                f"{self.config.max_seq_len} (the RoPE table ends there)"
            )
        if cu_seqlens is not None and cu_seqlens.shape[0] == 2 and max_seqlen == tokens.shape[0]:
            # One document as long as the row: dense kernels need no plan of lengths. (Should it end
            # before the row does, causal rows before its end still see nothing past it.)
            rows = [None if t is None else t[None] for t in (tokens, labels, position_ids)]
            result = self.forward(rows[0], rows[1], position_ids=rows[2])
            return result if labels is not None else result[0]
        if cu_seqlens is not None and position_ids is None:
            position_ids = document_positions(cu_seqlens, tokens.shape[0])
        self.rope.tables(tokens.device)  # outside of the compiled layers
        x = self.embedding(tokens)
        with self._precision():
            for layer in self.layers:
                x = layer(
                    x, position_ids=position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
                )
        return self.head(self.norm(x), labels)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.linear != "te_fp8":
            return contextlib.nullcontext()
        from fa3_train.modules import te

        return te.autocast(self.config.linear, self.config.te_recipe)
