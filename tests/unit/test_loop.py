"""The loop: schedule, signals, the non-finite guard, what is written when."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from tiny_runs import config, evaluations, losses, one_thread  # noqa: F401

from fa3_train.train import checkpoint_files as files
from fa3_train.train import loop
from fa3_train.train.config import ConfigError
from fa3_train.train.guard import NonFiniteError
from fa3_train.train.loop import run, train
from fa3_train.train.schedule import learning_rate


def at_training_call(monkeypatch, call: int, install) -> None:
    """Let `install(model, reached)` plant something for micro-batch `call` (from 1) of a training.

    `reached()` is true while that very micro-batch is in the model: in the step, and again in the
    second pass of the guard. Evaluation does not count.
    """
    build = loop.build_model

    def build_and_watch(settings, world):
        model = build(settings, world)
        seen, chosen, now = 0, None, None

        def count(module, args):
            nonlocal seen, chosen, now
            if module.training:
                seen, now = seen + 1, args[0]
                chosen = now.clone() if seen == call else chosen

        model.register_forward_pre_hook(count)
        install(model, lambda: chosen is not None and torch.equal(chosen, now))
        return model

    monkeypatch.setattr(loop, "build_model", build_and_watch)


# 4 micro-batches make a step: number 9 is the first of step 3.
STEP_3 = 9


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 1, 0.1),
        ("constant", 10, 1.0),
        ("constant", 100, 1.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.6),
        ("linear", 100, 0.2),
        ("cosine", 55, 0.6),
        ("cosine", 100, 0.2),
        ("cosine", 101, 0.2),
        ("wsd", 80, 1.0),
        ("wsd", 90, 0.6),
        ("wsd", 100, 0.2),
    ],
)
def test_learning_rate(tmp_path, name, step, expected):
    settings = config(
        tmp_path,
        "run.steps=100",
        "optimizer.lr=1.0",
        f"schedule={name}",
        "schedule.warmup_steps=10",
        "schedule.min_ratio=0.2",
        "schedule.decay_fraction=0.2",
    )
    assert learning_rate(step, settings) == pytest.approx(expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_exits_cleanly(tmp_path, monkeypatch, number):
    train(config(tmp_path / "whole", "checkpoint.every=0"))

    def install(model, reached):
        def hook(module, args):
            if reached() and not sent:
                sent.append(True)
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # launchers pass signals on: a rank gets two

        model.layers[0].register_forward_pre_hook(hook)

    sent: list[bool] = []
    at_training_call(monkeypatch, STEP_3, install)
    folder = tmp_path / "cut"
    assert run(config(folder, "checkpoint.every=0")) == 0
    assert sent and losses(folder).keys() == {1, 2, 3}
    assert [step for step, _ in files.complete(folder / "checkpoints")] == [3]
    assert signal.getsignal(number) == signal.SIG_DFL
    assert run(config(folder, "checkpoint.every=0")) == 0
    assert losses(folder) == losses(tmp_path / "whole")


class _Poison(torch.autograd.Function):
    """Identity; its backward returns NaN in one element."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[3] = float("nan")
        return grad


def bad_output(value):
    def install(model, reached):
        def hook(module, args, output):
            if not reached():
                return output
            output = output.clone()
            output.view(-1)[5] = value
            return output

        model.layers[1].attention.register_forward_hook(hook)

    return install


def bad_backward(model, reached):
    mlp = model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x, **kw: forward(_Poison.apply(x) if reached() else x, **kw)


def bad_between(model, reached):
    # Before the probe's own hooks: to them, the poison acts between two modules.
    model.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: (_Poison.apply(args[0]), *args[1:]) if reached() else None
    )


def bad_weight_gradient(model, reached):
    def hook(grad):
        return grad.index_fill(0, torch.tensor([0]), float("inf")) if reached() else grad

    model.norm.weight.register_hook(hook)


CASES = {
    "forward-nan": (
        bad_output(float("nan")),
        r"loss nan.*forward, output of layers\.1\.attention \(SelfAttention\) has 1 NaN and 0 Inf",
    ),
    "forward-inf": (
        bad_output(float("inf")),
        r"forward, output of layers\.1\.attention \(SelfAttention\) has 0 NaN and 1 Inf",
    ),
    "backward": (
        bad_backward,
        r"loss [\d.]+, gradient norm nan.*backward of layers\.1\.mlp .*gradient of its input has 1",
    ),
    "between": (
        bad_between,
        r"norm nan.*: backward: the gradient that reaches layers\.1\.mlp\.norm .* 1 NaN",
    ),
    "weight": (bad_weight_gradient, r"gradient norm inf.*gradient of parameter norm\.weight has"),
}


@pytest.mark.parametrize("words", [[], ["precision=bf16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_non_finite_stops_before_the_update(tmp_path, monkeypatch, case, words):
    install, says = CASES[case]
    with monkeypatch.context() as patch:
        at_training_call(patch, STEP_3 + 1, install)
        settings = config(tmp_path, *words, "checkpoint.every=1")
        with pytest.raises(NonFiniteError, match=says) as caught:
            train(settings)
    assert str(caught.value).startswith("step 3: ")
    assert "rank 0, micro-batch 1" in str(caught.value)
    assert [step for step, _ in files.complete(tmp_path / "checkpoints")] == [2, 1]
    # The state was that after step 2: the checkpoint of step 2 continues like a run without fault.
    train(settings)
    whole = tmp_path / "whole"
    train(config(whole, *words, "checkpoint=none"))
    assert losses(tmp_path) == losses(whole)


def test_finite_second_pass_is_said(tmp_path, monkeypatch):
    """A fault that does not repeat is not blamed on a module."""
    times = []

    def install(model, reached):
        def hook(module, args, output):
            if reached() and not times:
                times.append(1)
                return output * float("nan")
            return output

        model.layers[0].register_forward_hook(hook)

    at_training_call(monkeypatch, STEP_3, install)
    with pytest.raises(NonFiniteError, match=r"step 3: .*second pass.*was finite everywhere"):
        train(config(tmp_path))


def test_failed_run_returns_one_and_says_why(tmp_path, monkeypatch, capsys):
    at_training_call(monkeypatch, STEP_3, bad_output(float("nan")))
    assert run(config(tmp_path)) == 1
    assert "fa3_train: step 3: loss nan" in capsys.readouterr().err


def test_paths_are_printed(tmp_path, capsys):
    assert run(config(tmp_path, "run.steps=2", "schedule.warmup_steps=1")) == 0
    printed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert printed["metrics"] == str(tmp_path / "metrics.jsonl")
    assert printed["checkpoint"] == str(tmp_path / "checkpoints" / "step_00000002")


def test_checkpoint_choices(tmp_path):
    train(config(tmp_path / "a", "checkpoint.every=0", "checkpoint.save_last=false"))
    assert files.complete(tmp_path / "a" / "checkpoints") == []
    train(config(tmp_path / "b", "checkpoint.every=0"))
    assert [s for s, _ in files.complete(tmp_path / "b" / "checkpoints")] == [6]


def test_longer_run_continues(tmp_path):
    """More steps than planned at first: the schedule differs, the data position goes on."""
    train(config(tmp_path, "schedule=constant", "run.steps=4"))
    train(config(tmp_path, "schedule=constant", "run.steps=6"))
    train(config(tmp_path / "whole", "schedule=constant", "run.steps=6"))
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_evaluation_does_not_disturb_training(tmp_path):
    train(config(tmp_path / "a", "run.eval_every=1", "data.kind=random"))
    train(config(tmp_path / "b", "run.eval_batches=0"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    rows = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    evals = [row["step"] for row in rows if row.get("event") == "eval"]
    assert evals == [0, 1, 2, 3, 4, 5, 6]


def test_export_starts_another_run(tmp_path):
    """Hugging Face weights written at the end are the weights that the next run begins with."""
    train(config(tmp_path / "a", "checkpoint.export_hf=true", "data.kind=random"))
    hf = tmp_path / "a" / "hf"
    train(config(tmp_path / "b", f"model.init_from={hf}"))
    assert evaluations(tmp_path / "b")[0] == evaluations(tmp_path / "a")[-1]
    assert evaluations(tmp_path / "a")[0] != evaluations(tmp_path / "a")[-1]
    with pytest.raises(ConfigError, match="model.init_from=.*does not fit the model: missing"):
        train(config(tmp_path / "c", f"model.init_from={hf}", "model.num_layers=3"))


def test_metrics_have_no_gap_after_a_kill(tmp_path):
    """Lines between two log intervals are on disk before the checkpoint that covers them."""
    train(config(tmp_path, "logging.every=100", "checkpoint.every=2"))
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    train(config(tmp_path, "logging.every=100", "checkpoint.every=2"))
    assert losses(tmp_path).keys() == {1, 2, 3, 4, 5, 6}
