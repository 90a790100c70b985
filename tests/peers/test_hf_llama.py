"""transformers' own tests of a model, run for Llama with our function as its attention.

They are not part of its wheel, only of its source distribution, so this file is skipped unless
``FA3_TRAIN_HF_TESTS`` names the folder:

    pip download --no-deps --no-binary :all: transformers==5.24.0
    tar xzf transformers-5.24.0.tar.gz
    FA3_TRAIN_HF_TESTS=transformers-5.24.0/tests python -m pytest tests/peers

``FA3_TRAIN_HF_ATTENTION``: ``reference``, ``hopper`` or another backend of ours, registered in the
place of ``sdpa``, which is what transformers takes when nothing is said and what its equivalence
tests compare with eager; or ``sdpa`` for transformers' own, to see which tests fail by themselves.
Default: ``hopper`` on a GPU, ``reference`` elsewhere. ``FA3_TRAIN_HF_POLICY``: ``error`` (default)
or ``warn``, under which tests that ask for the attention matrix get it from plain attention.

The tests need accelerate and parameterized. Generation and export have folders of their own, which
the source distribution leaves out: their mix-ins are empty here.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch

FOLDER = os.environ.get("FA3_TRAIN_HF_TESTS")
if not FOLDER:
    pytest.skip("FA3_TRAIN_HF_TESTS does not name transformers' tests", allow_module_level=True)
ATTENTION = os.environ.get("FA3_TRAIN_HF_ATTENTION") or (
    "hopper" if torch.cuda.is_available() else "reference"
)


def _load(folder: str):
    """``test_modeling_common`` of that folder, as a package under another name than ours."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(Path(folder).resolve())]
    sys.modules[package.__name__] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        if not (Path(folder) / f"{name.replace('.', '/')}.py").is_file():
            empty = types.ModuleType(f"{package.__name__}.{name}")
            setattr(empty, mixin, type(mixin, (), {}))
            parent = types.ModuleType(empty.__name__.rsplit(".", 1)[0])
            parent.__path__ = []
            sys.modules[parent.__name__], sys.modules[empty.__name__] = parent, empty
    return importlib.import_module(f"{package.__name__}.test_modeling_common")


common = _load(FOLDER)
import transformers  # noqa: E402

from fa3_train.integrations import hf  # noqa: E402

calls = {"ours": 0}


class _Tester:
    """What ModelTesterMixin asks for: a small configuration, and inputs with padding."""

    batch_size, seq_length, is_training = 13, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def prepare_config_and_inputs_for_common(self):
        config = transformers.LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        ids = common.ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        return config, {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class LlamaTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (
        transformers.LlamaModel,
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
        transformers.LlamaForTokenClassification,
    )

    @classmethod
    def setUpClass(cls):
        super().setUpClass() if hasattr(super(), "setUpClass") else None
        if ATTENTION == "sdpa":
            return

        def counted(*args, **kwargs):
            calls["ours"] += 1
            return forward(*args, **kwargs)

        from transformers import AttentionInterface

        forward = hf.attention_forward
        hf.register(
            "sdpa", backend=ATTENTION, policy=os.environ.get("FA3_TRAIN_HF_POLICY", "error")
        )
        AttentionInterface.register("sdpa", counted)

    def setUp(self):
        self.model_tester = _Tester()
        self.before = calls["ours"]

    def tearDown(self):
        compared = any(word in self.id() for word in ("matches_sdpa_inference", "ours_"))
        if compared and ATTENTION != "sdpa" and not self._skipped():
            assert calls["ours"] > self.before, "the test never reached our function"

    def _skipped(self) -> bool:
        return bool(getattr(self._outcome.result, "skipped", None))

    # The checks that transformers runs for a flash attention of a given name.

    def test_ours_inference_equivalence_left_padding(self):
        self.flash_attn_inference_equivalence("sdpa", padding_side="left")

    def test_ours_inference_equivalence_right_padding(self):
        self.flash_attn_inference_equivalence("sdpa", padding_side="right")
