"""Layers built on the attention ops; each can be used alone."""

from fa3_train.modules.attention import FlashAttention, SelfAttention
from fa3_train.modules.layer import TransformerLayer
from fa3_train.modules.loss import LMHead, chunked_cross_entropy
from fa3_train.modules.mlp import SwiGLU
from fa3_train.modules.norm import RMSNorm
from fa3_train.modules.preprocess import RopeHadamardQuantize
from fa3_train.modules.rope import Rope

__all__ = [
    "FlashAttention",
    "LMHead",
    "RMSNorm",
    "Rope",
    "RopeHadamardQuantize",
    "SelfAttention",
    "SwiGLU",
    "TransformerLayer",
    "chunked_cross_entropy",
]
