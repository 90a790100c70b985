"""The command line in a process of its own: what it prints, where it reads from, how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fa3_train import cli
from fa3_train.train import plan
from fa3_train.train.compose import load

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, cwd: Path, env: dict[str, str] | None = None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", "fa3_train", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_list_of_recipes(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("description: my own\ndefaults: [base, _self_]")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(names) and {"quickstart", "llama3_405b_layer", "mine"} <= set(names)
    assert all(len(line.split()) > 3 for line in lines)
    assert next(line for line in lines if line.startswith("mine")).endswith("recipes/mine.yaml]")


def test_help_names_every_group(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("recipe=", "dryrun=true", "deepspeed", "llama3_8b", "fa3_train.doctor"):
        assert word in text


def test_dryrun_from_any_folder_writes_nothing(tmp_path):
    done = run("recipe=llama3_8b", "dryrun=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "hidden_size: 4096",
        "8,030,261,248",
        "1 sequences x 8 GPUs x 16 accumulation = 128 sequences = 1,048,576 tokens a step",
        "GiB a GPU",
        "FLOPs/token 5.147e+10",
    ):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_dryrun_says_what_the_machine_lacks(tmp_path):
    done = run("recipe=llama3_8b_fp8", "dryrun=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "linear=te_fp8 needs an NVIDIA GPU" in done.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["model.hiden_size=3"], "model.hidden_size"),
        (["data.micro_batch=3"], "data.global_batch"),
        (["recipe=llama3_8b_fp8", "data.global_batch=1"], "linear=te_fp8"),
        (["run.device=cuda"], "run.device=cuda"),
        (["attention=hopper", "precision=bf16"], "attention.backend=hopper"),
    ],
)
def test_a_mistake_costs_one_line_and_nothing_else(tmp_path, words, part):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert part in done.stderr and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_speaks(tmp_path):
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = run("model.hiden_size=3", "--local_rank=1", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    done = run("dryrun=true", "data.global_batch=16", "--local_rank=1", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_launchers_world_size_is_judged(tmp_path):
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}
    done = run("dryrun=true", cwd=tmp_path, env=env)
    assert done.returncode == 2 and "data-parallel ranks (3)" in done.stderr


# ---- the plan ---------------------------------------------------------------------------------


def test_memory_of_a_single_process_is_bytes_per_parameter():
    config = load(["recipe=tiny_gpu"])
    memory = plan.memory_estimate(config, 1)
    n = config.model_config().num_parameters()
    # bf16 weight, fp32 gradient, fp32 master, two fp32 moments.
    assert memory.weights + memory.gradients + memory.optimizer == 18 * n


def test_memory_falls_with_shards_and_checkpointing():
    def estimate(world: int, *words: str) -> plan.Memory:
        return plan.memory_estimate(load(["recipe=llama3_8b", *words]), world)

    assert estimate(8).optimizer == pytest.approx(estimate(64).optimizer * 8)
    none, selective, full = (
        estimate(8, f"model.activation_checkpointing={word}").activations
        for word in ("none", "selective", "full")
    )
    assert none > selective > full > 0
    deepspeed = ["engine=deepspeed", "checkpoint.async_save=false"]
    stages = [estimate(8, *deepspeed, f"engine.zero_stage={s}").total for s in range(4)]
    assert stages == sorted(stages, reverse=True) and len(set(stages)) == 4
    offload = estimate(8, *deepspeed, "engine.zero_stage=2", "engine.offload_optimizer=true")
    assert offload.optimizer == 0


def test_plan_takes_the_launcher_before_the_recipe():
    config = load(["recipe=llama3_8b"])
    assert plan.plan_world(config, 1) == 8
    assert plan.plan_world(config, 16) == 16
    assert plan.plan_world(load([]), 1) == 1
