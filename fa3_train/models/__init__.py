"""Models: configurations, the language model and Hugging Face weights."""

from fa3_train.models.config import MODELS, ModelConfig, model_config

__all__ = ["MODELS", "ModelConfig", "model_config"]
