"""Schema, composition and cross-field rules: a mistake is named, with the key and near misses."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from fa3_train.models.config import MODELS
from fa3_train.train import compose
from fa3_train.train.compose import load
from fa3_train.train.config import ConfigError, TrainConfig, near_misses, resolve, schema_paths
from fa3_train.train.config_rules import (
    check_combination,
    combination_complaints,
    machine_complaints,
)

RECIPES = [
    "quickstart",
    "tiny_gpu",
    "llama3_1b",
    "llama3_8b",
    "llama3_8b_32k",
    "llama3_8b_fp8",
    "llama3_8b_128k",
    "llama3_70b",
    "llama3_405b_layer",
]


def fails(words: list[str]) -> str:
    """The message that refuses a command line, from composition or from the rules."""
    with pytest.raises(ConfigError) as caught:
        check_combination(load(words))
    return str(caught.value)


# ---- recipes and groups ---------------------------------------------------------------------


def test_shipped_recipes_are_those_promised():
    assert sorted(compose.recipes()) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_composes_at_the_size_it_was_made_for(name):
    config = load([f"recipe={name}"])
    assert config.recipe == name
    assert config.description and "\n" not in config.description
    assert list(combination_complaints(config, max(1, config.run.gpus))) == []


def test_default_recipe_is_quickstart():
    assert load([]) == load(["recipe=quickstart"])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_file_holds_the_named_model(name):
    config = load([f"model={name}", "precision=bf16"])
    expected = dataclasses.asdict(MODELS[name])
    actual = dataclasses.asdict(config.model_config())
    assert actual == expected
    assert config.model.name == name


def test_every_group_option_composes():
    for group, options in compose.groups().items():
        for option in options:
            if group == "attention" and option in ("fp8", "hopper"):
                load([f"{group}={option}", "precision=bf16"])
            else:
                load([f"{group}={option}"])


def test_every_key_in_every_yaml_is_in_the_schema():
    known = schema_paths()
    for path in compose.conf_dir().glob("*/*.yaml"):
        section = path.parent.name
        for key in yaml.safe_load(path.read_text()):
            assert f"{section}.{key}" in known, path


def test_group_value_recipe_and_command_line_win_in_that_order():
    group = yaml.safe_load((compose.conf_dir() / "optimizer" / "adamw.yaml").read_text())
    recipe = yaml.safe_load((compose.recipe_dirs()[-1] / "quickstart.yaml").read_text())
    values = {group["lr"], recipe["optimizer"]["lr"], 1e-5}
    assert len(values) == 3
    assert load(["recipe=llama3_8b"]).optimizer.lr == group["lr"]
    assert load([]).optimizer.lr == recipe["optimizer"]["lr"]
    assert load(["optimizer.lr=1e-5"]).optimizer.lr == 1e-5
    assert load(["optimizer.lr=1e-5", "optimizer=adamw"]).optimizer.lr == 1e-5


def test_recipe_on_top_of_a_recipe():
    base, long = load(["recipe=llama3_8b"]), load(["recipe=llama3_8b_32k"])
    assert long.tokens_per_step() == base.tokens_per_step()
    assert long.data.seq_len == 32768 and long.model.hidden_size == base.model.hidden_size


def test_own_recipe_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "description: my own\n"
        "defaults:\n  - llama3_8b\n  - override attention: sdpa\n  - _self_\n"
        "run:\n  steps: 7\n"
    )
    monkeypatch.chdir(tmp_path)
    config = load(["recipe=mine"])
    assert (config.run.steps, config.attention.backend, config.model.name) == (
        7,
        "sdpa",
        "llama3_8b",
    )
    assert not compose.recipes()["mine"].shipped
    assert load(["recipe=quickstart"]).recipe == "quickstart"


def test_own_recipe_with_a_wrong_key_names_it(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "bad.yaml").write_text(
        "defaults:\n  - base\n  - _self_\noptimizer:\n  learning_rate: 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "optimizer.learning_rate" in fails(["recipe=bad"])


def test_own_recipe_that_is_not_yaml_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "bad.yaml").write_text("a: [1\n")
    monkeypatch.chdir(tmp_path)
    assert "bad.yaml" in fails(["recipe=bad"])


# ---- unknown keys, wrong types, wrong words ---------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model.hiden_size=3"], ["model.hiden_size", "model.hidden_size"]),
        (["lr=1"], ["'lr'", "optimizer.lr"]),
        (["optimiser.lr=1"], ["optimiser.lr", "optimizer.lr"]),
        (["data.seq_length=8"], ["data.seq_length", "data.seq_len"]),
        (["model.rope_scaling.faktor=2"], ["model.rope_scaling.faktor", "factor"]),
        (["run={stepz: 2}"], ["run.stepz", "run.steps"]),
        (["recipe=lama3_8b"], ["recipe=lama3_8b", "llama3_8b"]),
        (["model=llama8b"], ["model=llama8b", "llama3_8b"]),
        (["engine=deepsped"], ["engine=deepsped", "deepspeed"]),
        (["engine.strategy=fsdp"], ["engine.strategy='fsdp'", "fsdp2"]),
        (["attention.backend=flash"], ["attention.backend='flash'", "hopper"]),
        (["run.steps=many"], ["run.steps", "many"]),
        (["run.steps=1.5"], ["run.steps", "1.5"]),
        (["run.guard=perhaps"], ["run.guard", "perhaps"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["model.num_layers=null"], ["model.num_layers", "None"]),
        (["quickstrat"], ["quickstrat", "quickstart"]),
        (["+data.new=1"], ["+data.new=1", "key=value"]),
        (["~data"], ["~data"]),
        (["data.seq_len=128,256"], ["data.seq_len=128,256"]),
        (["data.path=a=b"], ["data.path=a=b", "quote"]),
    ],
)
def test_wrong_words_are_named(words, parts):
    message = fails(words)
    for part in parts:
        assert part in message


def test_near_misses_put_the_same_leaf_first():
    assert near_misses("lr", schema_paths())[0] == "optimizer.lr"
    assert near_misses("zzzzzz", schema_paths()) == []


def test_values_keep_their_types():
    config = load(["data.path='a, b'", "data=text", "run.name=2024", "model.rope_scaling.factor=4"])
    assert config.data.path == "a, b"
    assert config.run.name == "2024"
    assert config.model.rope_scaling.factor == 4.0
    assert config.model.rope_scaling.original_max_position_embeddings == 8192
    assert load(["recipe=llama3_8b", "model.rope_scaling=null"]).model.rope_scaling is None


def test_interpolation_and_its_failure():
    assert load(["data=text", "data.path=${run.seed}"]).data.path == "1234"
    assert "run.sed" in fails(["data=text", "data.path=${run.sed}"])


def test_resolve_takes_back_what_to_dict_gives():
    config = load(["recipe=llama3_8b_fp8"])
    assert resolve(config.to_dict()) == config


# ---- combinations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model.num_heads=6", "model.num_kv_heads=4"], ["num_heads", "num_kv_heads", "6", "4"]),
        (["model.head_dim=60"], ["head_dim", "multiple of 8", "60"]),
        (["data.seq_len=4096"], ["data.seq_len=4096", "max_seq_len=2048"]),
        (["data.micro_batch=3"], ["data.global_batch=8", "data.micro_batch (3)"]),
        (["data.global_batch=0"], ["data.global_batch", ">= 1", "0"]),
        (["data=text"], ["data.kind=text", "data.path"]),
        (["data.path=/x"], ["data.path=/x", "stdlib"]),
        (["data.bpe_vocab_size=9000"], ["bpe_vocab_size=9000", "vocab_size=4096"]),
        (["data.val_fraction=0"], ["data.val_fraction=0", "run.eval_batches"]),
        (["data.val_fraction=1.0"], ["data.val_fraction", "[0, 1)"]),
        (["parallel.context=2"], ["parallel.context", "2"]),
        (["engine.zero_stage=3"], ["engine.zero_stage=3", "deepspeed", "fsdp2"]),
        (["engine=deepspeed", "engine.zero_stage=4"], ["zero_stage", "4"]),
        (
            ["engine=deepspeed", "engine.zero_stage=3", "engine.strategy=fsdp2"],
            ["engine.strategy=fsdp2", "engine=torch"],
        ),
        (["engine.offload_optimizer=true"], ["offload_optimizer", "deepspeed"]),
        (["engine=deepspeed", "engine.zero_stage=0", "engine.offload_optimizer=true"], ["offload"]),
        (["engine=deepspeed", "checkpoint.async_save=true"], ["checkpoint.async_save"]),
        (["attention=fp8"], ["attention.precision=fp8", "precision.compute"]),
        (["attention=hopper"], ["attention.backend=hopper", "bf16"]),
        (
            ["attention=fp8", "attention.backend=sdpa", "precision=bf16"],
            ["attention.precision=fp8", "sdpa"],
        ),
        (
            ["attention=fp8", "precision=bf16", "model.head_dim=72"],
            ["attention.precision=fp8", "head_dim", "72"],
        ),
        (
            ["attention=fp8", "precision=bf16", "model.softcap=30"],
            ["softcap", "attention.precision=fp8"],
        ),
        (["attention=hopper", "precision=bf16", "run.device=cpu"], ["hopper", "run.device=cpu"]),
        (["linear=te", "run.device=cpu"], ["linear=te", "run.device=cpu"]),
        (["linear=te_fp8"], ["linear=te_fp8", "bf16"]),
        (
            ["linear=te_fp8", "precision=bf16", "model.ffn_hidden_size=680"],
            ["linear=te_fp8", "ffn_hidden_size", "680"],
        ),
        (["precision.params=bf16"], ["precision.params=bf16", "compute=fp32"]),
        (["schedule.warmup_steps=-1"], ["schedule.warmup_steps", ">= 0", "-1"]),
        (["schedule.min_ratio=2"], ["schedule.min_ratio", "2"]),
        (["schedule=wsd", "schedule.decay_fraction=0"], ["schedule.decay_fraction", "0"]),
        (["run.steps=0"], ["run.steps", ">= 1"]),
        (["optimizer.lr=0"], ["optimizer.lr", "> 0"]),
        (["optimizer.lr=.nan"], ["optimizer.lr", "nan"]),
        (["optimizer.beta2=1"], ["optimizer.beta2", "[0, 1)"]),
        (["optimizer.clip_norm=-1"], ["optimizer.clip_norm", "-1"]),
        (["checkpoint.keep=0"], ["checkpoint.keep", ">= 1"]),
        (["logging.every=0"], ["logging.every", ">= 1"]),
        (["checkpoint.resume=''"], ["checkpoint.resume"]),
    ],
)
def test_impossible_combinations_are_named(words, parts):
    message = fails(words)
    for part in parts:
        assert part in message


def test_a_short_trial_of_a_long_recipe_is_possible():
    """It ends inside the warm-up, which is no reason to refuse it."""
    check_combination(load(["recipe=llama3_8b", "run.steps=10"]), 8)


def test_batch_arithmetic():
    config = load(["recipe=llama3_8b"])
    assert config.grad_accum(8) == 16
    assert config.grad_accum(64) == 2
    assert config.grad_accum(128) == 1
    for ranks in (3, 256):
        with pytest.raises(ConfigError, match="data.global_batch=128"):
            config.grad_accum(ranks)


def test_rules_see_the_world_size():
    config = load([])
    assert list(combination_complaints(config, 1)) == []
    assert "data-parallel ranks (3)" in next(combination_complaints(config, 3))


def test_what_the_machine_lacks_is_no_combination(monkeypatch):
    config = load(["recipe=llama3_8b_fp8", "data=hf", "data.path=owner/name"])
    assert list(combination_complaints(config, 8)) == []
    monkeypatch.setattr("fa3_train.train.config_rules._has", lambda package: False)
    text = "\n".join(machine_complaints(config, "cpu"))
    assert "TransformerEngine" in text and "datasets" in text and "GPU" in text


def test_model_section_follows_the_model_config():
    """A field that the model gains must be reachable from the configuration."""
    section = {f.name for f in dataclasses.fields(TrainConfig().model)} - {"name", "init_from"}
    elsewhere = {
        "attention_backend",
        "attention_deterministic",
        "attention_precision",
        "linear",
        "te_recipe",
        "compile_layers",
    }
    assert section | elsewhere == {f.name for f in dataclasses.fields(MODELS["tiny"])}
