"""Models: configurations, the language model and Hugging Face weights.

`TransformerLM` is looked up on first use: the configurations are also read where torch should not
be imported (dry runs).
"""

from typing import TYPE_CHECKING, Any

from fa3_train.models.config import MODELS, ModelConfig, model_config

if TYPE_CHECKING:
    from fa3_train.models.transformer import TransformerLM

__all__ = ["MODELS", "ModelConfig", "TransformerLM", "model_config"]


def __getattr__(name: str) -> Any:
    if name == "TransformerLM":
        from fa3_train.models.transformer import TransformerLM

        return TransformerLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
