"""The loop on a GPU: no host synchronisation inside a step, the guard's lag, saves, precision."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_runs import config, losses

from fa3_train.train import checkpoint_files as files
from fa3_train.train import loop
from fa3_train.train.engines import start_world
from fa3_train.train.guard import NonFiniteError
from fa3_train.train.loop import Trainer, train
from fa3_train.train.signals import StopSignal
from fa3_train.train.status import LAG

pytestmark = pytest.mark.gpu

# One document a sequence, so that torch's attention needs no lengths on the host.
GPU = [
    "run.device=cuda",
    "run.steps=10",
    "precision=bf16",
    "logging.every=100",
    "data.random_doc_len=0",
    "data.seq_len=128",
    "model.hidden_size=128",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=64",
    "model.ffn_hidden_size=256",
]


def gpu_config(folder, *more):
    return config(folder, *GPU, *more)


@pytest.mark.parametrize("backend", ["sdpa", "hopper"])
def test_step_never_waits_for_the_device(tmp_path, backend):
    settings = gpu_config(tmp_path, "checkpoint=none", f"attention={backend}")
    with StopSignal() as stop:
        trainer = Trainer(settings, start_world(settings), stop)
        for _ in range(3):  # allocations, compilation, the status queue fills
            trainer.advance()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                trainer.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.run()
    assert losses(tmp_path).keys() == set(range(1, 11))


def test_guard_stops_with_the_state_before_the_bad_step(tmp_path, monkeypatch):
    """The host learns of it LAG steps later; the update of none of them has happened."""
    build, bad_step, queued = loop.build_model, 4, []

    def build_bad(settings, world):
        model = build(settings, world)
        calls = 0

        def count(module, args):
            nonlocal calls
            calls += module.training

        def poison(module, args, output):
            if calls > 4 * (bad_step - 1):
                output = output.clone()
                output.view(-1)[5] = float("nan")
            return output

        model.register_forward_pre_hook(count)
        model.layers[1].mlp.register_forward_hook(poison)
        return model

    monkeypatch.setattr(loop, "build_model", build_bad)
    with StopSignal() as stop:
        settings = gpu_config(tmp_path, "checkpoint=none", "attention=sdpa")
        trainer = Trainer(settings, start_world(settings), stop)
        for _ in range(bad_step - 1):
            trainer.advance()
        before = [master.detach().clone() for master in trainer.engine.masters]
        with pytest.raises(NonFiniteError, match=r"step 4: loss nan.*output of layers\.1\.mlp"):
            for _ in range(LAG + 1):
                queued.append(trainer.advance())
        trainer.data.close()
    assert len(queued) == LAG
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.engine.masters, strict=True))


@pytest.mark.parametrize("background", [False, True])
def test_checkpoint_holds_every_bit(tmp_path, background):
    words = [f"checkpoint.async_save={str(background).lower()}", "attention=reference"]
    words += ["run.deterministic=true", "checkpoint.every=4"]
    train(gpu_config(tmp_path, *words))
    before = losses(tmp_path)
    assert [step for step, _ in files.complete(tmp_path / "checkpoints")] == [10, 8, 4]
    for step in (8, 10):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    train(gpu_config(tmp_path, *words))
    assert losses(tmp_path) == before
