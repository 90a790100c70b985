"""Several ranks on one sequence train as one process does: every engine with every method, packed
documents of uneven length, alone and with data parallelism beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from context_runs import run
from tiny_runs import launch, loss_tensor, losses, one_thread, torchrun  # noqa: F401

from fa3_train.numerics import assert_as_good

HERE = Path(__file__).resolve().parent
COMMON = ["checkpoint=none", "run.steps=2", "run.eval_batches=0", "optimizer.clip_norm=0"]
ENGINES = {
    "ddp": ["engine=torch"],
    "fsdp2": ["engine=fsdp2"],
    "zero1": ["engine=deepspeed", "engine.zero_stage=1"],
    "zero3": ["engine=deepspeed", "engine.zero_stage=3"],
}
METHODS = {
    "ulysses": ["parallel.method=ulysses"],
    "ring": ["parallel.method=ring", "attention=reference"],
    "gather": ["parallel.method=gather", "attention=reference", "model.window_size=7"],
}
# (processes, ranks on a sequence): engines and methods. Two kv heads do not divide by four.
CASES = {
    (2, 2): [(e, m) for e in ENGINES for m in METHODS if m != "gather" or e == "fsdp2"],
    (4, 2): [(e, m) for e in ("fsdp2", "zero1", "zero3") for m in ("ulysses", "ring")],
    (4, 4): [("fsdp2", "ring"), ("zero3", "ring"), ("fsdp2", "gather")],
}
ALL = [(n, c, e, m) for (n, c), pairs in CASES.items() for e, m in pairs]

pytestmark = pytest.mark.distributed


def run_all(ranks: int, folder: Path, runs: dict[str, list[str]]) -> None:
    jobs = [",".join([name, *COMMON, *words]) for name, words in runs.items()]
    command = torchrun(ranks, str(HERE / "context_runs.py"), str(folder), *jobs)
    done = launch(command, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def name_of(processes: int, context: int, engine: str, method: str) -> str:
    return f"{processes}-{context}-{engine}-{method}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    for name, words in {"one": [], "one-window": ["model.window_size=7"]}.items():
        run(folder / name, [*COMMON, *words])
    for processes in (2, 4):
        runs = {
            name_of(n, c, e, m): [*ENGINES[e], *METHODS[m], f"parallel.context={c}"]
            for n, c, e, m in ALL
            if n == processes
        }
        run_all(processes, folder, runs)
    return folder


def truth_of(folder: Path, method: str) -> Path:
    return folder / ("one-window" if method == "gather" else "one")


@pytest.mark.parametrize(("processes", "context", "engine", "method"), ALL)
def test_losses(folder, processes, context, engine, method):
    many, one = folder / name_of(processes, context, engine, method), truth_of(folder, method)
    assert losses(many).keys() == {1, 2}
    assert_as_good(loss_tensor(many), loss_tensor(one).double(), what="same", name="loss")


@pytest.mark.parametrize(("processes", "context", "engine", "method"), ALL)
def test_gradients(folder, processes, context, engine, method):
    many, one = folder / name_of(processes, context, engine, method), truth_of(folder, method)
    ours, truth = (torch.load(x / "gradients.pt", weights_only=True) for x in (many, one))
    assert ours.keys() == truth.keys()
    for name, gradient in ours.items():
        whole = truth[name].double()
        assert whole.abs().max() > 0
        assert_as_good(gradient.view(whole.shape), whole, what="same", name=f"gradient of {name}")


def test_a_window_changes_the_losses(folder):
    """Or the runs with it would prove nothing."""
    difference = loss_tensor(folder / "one") - loss_tensor(folder / "one-window")
    assert difference.abs().max() > 1e-5
