"""Two ranks train as one process does: every strategy and ZeRO stage, loss by loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import evaluations, launch, loss_tensor, losses, torchrun

from fa3_train.numerics import assert_as_good

HERE = Path(__file__).resolve().parent
RUNS = {
    "ddp": [],
    "fsdp2": ["engine=fsdp2"],
    "fsdp2-keep": [
        "engine=fsdp2",
        "engine.reshard_after_forward=false",
        "engine.reduce_each=false",
    ],
    **{f"zero{s}": ["engine=deepspeed", f"engine.zero_stage={s}"] for s in range(4)},
}
# bf16 at stage 0 keeps no fp32 master weights in DeepSpeed: other numbers by design.
BF16 = [name for name in RUNS if name != "zero0"]
EXPORTS = ["ddp", "fsdp2", "zero2", "zero3"]
COMMON = ["checkpoint=none", "run.steps=5", "checkpoint.export_hf=true"]

pytestmark = pytest.mark.distributed


def run_all(ranks: int, folder: Path, runs: dict[str, list[str]]) -> None:
    jobs = [",".join([name, *COMMON, *words]) for name, words in runs.items()]
    command = torchrun(ranks, str(HERE / "many_runs.py"), str(folder), *jobs)
    done = launch(command, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs, each once in fp32 and once in bf16, on two ranks and (plain) on one."""
    folder = tmp_path_factory.mktemp("parity")
    bf16 = {f"{name}-bf16": [*RUNS[name], "precision=bf16"] for name in BF16}
    run_all(2, folder, RUNS | bf16)
    alone = {f"from-{n}": [f"model.init_from={folder / n / 'hf'}"] for n in EXPORTS}
    run_all(1, folder, {"one": [], "one-bf16": ["precision=bf16"]} | alone)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_fp32(folder, name):
    ours, one = loss_tensor(folder / name), loss_tensor(folder / "one")
    assert_as_good(ours, one.double(), what="same", name=f"loss of {name}")
    assert losses(folder / name).keys() == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("name", BF16)
def test_bf16(folder, name):
    """As near to the fp32 run as one bf16 process is, by the project's factor of two."""
    ours, one = loss_tensor(folder / f"{name}-bf16"), loss_tensor(folder / "one-bf16")
    truth = loss_tensor(folder / "one").double()
    assert_as_good(ours, truth, baseline=one, what="out", name=f"loss of {name} in bf16")


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_weights(folder, name):
    """Gathered from shards into a Hugging Face folder, they have the run's validation loss."""
    last, first = evaluations(folder / name)[-1], evaluations(folder / f"from-{name}")[0]
    assert last != evaluations(folder / name)[0]
    ours, theirs = torch.tensor([first]), torch.tensor([last], dtype=torch.float64)
    assert_as_good(ours, theirs, what="same", name=f"validation loss from {name}")


def test_training_moves_the_loss(folder):
    """The comparisons above would also hold for runs that do nothing."""
    one = loss_tensor(folder / "one")
    assert (one[1:] - one[:-1]).abs().min() > 1e-4


def test_model_drawn_shard_by_shard(tmp_path):
    """What a model too large for one device does: no rank ever holds the whole of it."""
    done = launch(torchrun(2, str(HERE / "born_sharded.py"), str(tmp_path)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    loss = loss_tensor(tmp_path)
    assert len(loss) == 6 and (loss - math.log(96)).abs().max() < 0.3
