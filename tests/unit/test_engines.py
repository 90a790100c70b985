"""Parts of the engines: guarded AdamW, fp32 gradient buckets, worlds, DeepSpeed's configuration."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import config, loss_tensor, losses, one_thread  # noqa: F401
from torch import nn

from fa3_train.numerics import assert_as_good
from fa3_train.train.config import ConfigError, OptimizerSection
from fa3_train.train.engines.base import BLOCKED, LOSS, NORM, STATUS_SIZE
from fa3_train.train.engines.deepspeed_engine import architectures, deepspeed_config
from fa3_train.train.engines.gradients import GradientBuckets
from fa3_train.train.engines.optimizer import GuardedAdamW, decay_groups, sum_of_squares
from fa3_train.train.engines.torch_engine import TorchEngine
from fa3_train.train.engines.world import World, start_world
from fa3_train.train.loop import build_model, train

CPU = torch.device("cpu")
SETTINGS = OptimizerSection(lr=0.01, clip_norm=0.5)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3, bias=False))


def fill_gradients(net: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * scale


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_clipping_in_the_kernel_is_clip_grad_norm(scale):
    ours, theirs = small_net(), small_net()
    optimizer = GuardedAdamW(decay_groups(ours.named_parameters(), 0.1), SETTINGS)
    reference = torch.optim.AdamW(
        decay_groups(theirs.named_parameters(), 0.1), lr=0.01, betas=(0.9, 0.95), fused=True
    )
    for _ in range(3):
        fill_gradients(ours, scale)
        norm = sum_of_squares([p.grad for p in ours.parameters()]).sqrt()
        optimizer.guard(norm=norm, blocked=torch.tensor(False))
        optimizer.step()
        fill_gradients(theirs, scale)
        their_norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        assert_as_good(norm, their_norm, what="same", name="norm")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_as_good(a, b, what="same")


def test_blocked_step_changes_nothing():
    net = small_net()
    optimizer = GuardedAdamW(decay_groups(net.named_parameters(), 0.1), SETTINGS)
    fill_gradients(net, 1.0)
    optimizer.guard(norm=torch.tensor(1.0), blocked=torch.tensor(False))
    optimizer.step()
    state = [{k: v.clone() for k, v in slot.items()} for slot in optimizer.state.values()]
    params = [p.detach().clone() for p in net.parameters()]
    fill_gradients(net, float("nan"))
    optimizer.guard(norm=torch.tensor(float("nan")), blocked=torch.tensor(True))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, net.parameters(), strict=True))
    for old, new in zip(state, optimizer.state.values(), strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_decay_is_for_matrices():
    groups = decay_groups(small_net().named_parameters(), 0.3)
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 2), (0.0, 1)]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_buckets_accumulate_in_fp32(bucket_bytes):
    """1 + 255 * 2^-9: every addend is below half a bf16 ulp of the sum, which bf16 would lose."""
    net = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
    buckets = GradientBuckets(list(net.named_parameters()), 1, bucket_bytes)
    for index in range(256):
        buckets.begin(first=index == 0, last=index == 255)
        scale = 1.0 if index == 0 else 2.0**-9
        (net(torch.ones(1, 4, dtype=torch.bfloat16)).sum() * scale).backward()
    buckets.finish()
    assert net.weight.grad is None
    assert torch.equal(buckets.views[0], torch.full((3, 4), 1 + 255 * 2.0**-9))
    buckets.begin(first=True, last=True)
    net(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    buckets.finish()
    assert torch.equal(buckets.views[0], torch.ones(3, 4))


def test_buckets_refuse_an_unused_parameter():
    net = small_net()
    buckets = GradientBuckets(list(net.named_parameters()), 1)
    buckets.begin(first=True, last=True)
    net[0](torch.ones(1, 5)).sum().backward()
    with pytest.raises(RuntimeError, match=r"1 parameters got no gradient.*2\.weight"):
        buckets.finish()


@pytest.mark.parametrize("policy", ["none", "full"])
def test_fused_sums_are_fp32_and_whole(policy):
    """GEMMs that write the buckets: no rounding to bf16, everything there once, begun anew."""
    from fa3_train.modules import TransformerLayer

    torch.manual_seed(2)
    layer = TransformerLayer(
        32, 48, 4, 2, backend="reference", max_seq_len=16, activation_checkpointing=policy
    ).bfloat16()
    exact = TransformerLayer(32, 48, 4, 2, backend="reference", max_seq_len=16)
    exact.load_state_dict(layer.state_dict())
    buckets = GradientBuckets(list(layer.named_parameters()), 1, 1 << 10)
    buckets.fuse(layer)
    inputs = torch.randn(3, 2, 7, 32).bfloat16()
    for _ in range(2):  # the second step must overwrite what the first one left
        for index in range(3):
            buckets.begin(first=index == 0, last=index == 2)
            layer(inputs[index]).float().square().sum().backward()
            buckets.expect(first=index == 2)
        buckets.finish()
    for x in inputs:
        exact(x.float()).square().sum().backward()
    wide = 0
    for (name, param), view in zip(layer.named_parameters(), buckets.views, strict=True):
        truth = dict(exact.named_parameters())[name].grad
        assert param.grad is None
        assert (view - truth).norm() < 0.02 * truth.norm(), name
        if param.dim() == 2:
            wide += int(not torch.equal(view, view.bfloat16().float()))
    assert wide == 4, "every matrix's sum must hold more digits than bf16 has"
    buckets.pause()  # for a diagnosis gradients lie where hooks look for them
    layer(inputs[0]).float().sum().backward()
    assert all(param.grad is not None for param in layer.parameters())
    assert not hasattr(layer.mlp.mlp.down_proj.weight, "main_grad")


@pytest.mark.parametrize("tied", [False, True])
def test_fused_sums_of_embedding_and_head(tied):
    """The whole model: rows of the embedding, scaled sums of the head; a tied one the old way."""
    from fa3_train.models import ModelConfig, TransformerLM

    torch.manual_seed(4)
    small = ModelConfig(
        vocab_size=61, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        ffn_hidden_size=48, max_seq_len=32, tie_embeddings=tied, attention_backend="reference",
    )  # fmt: skip
    model = TransformerLM(small).bfloat16()
    exact = TransformerLM(small)
    exact.load_state_dict(model.state_dict())
    buckets = GradientBuckets(list(model.named_parameters()), 1)
    buckets.fuse(model)
    assert model.head.fuse_wgrad_accumulation == model.embedding.fuse_wgrad_accumulation
    assert model.head.fuse_wgrad_accumulation != tied
    data = [torch.randint(0, 61, (2, 24)) for _ in range(2)]
    for _ in range(2):
        for index, tokens in enumerate(data):
            buckets.begin(first=index == 0, last=index == 1)
            (3 * model(tokens[0], tokens[1])).backward()
            buckets.expect(first=index == 1)
        buckets.finish()
    for tokens in data:
        (3 * exact(tokens[0], tokens[1])).backward()
    for (name, param), view in zip(model.named_parameters(), buckets.views, strict=True):
        truth = dict(exact.named_parameters())[name].grad
        assert param.grad is None
        assert (view - truth).norm() < 0.03 * truth.norm(), name
    buckets.close()
    assert not any(hasattr(p, "main_grad") for p in model.parameters())


def test_fused_weights_are_missed_too():
    from fa3_train.modules.accumulate import Linear

    net = nn.Sequential(Linear(5, 4), Linear(4, 3))
    buckets = GradientBuckets(list(net.named_parameters()), 1)
    buckets.fuse(net)
    buckets.begin(first=True, last=True)
    net[0](torch.ones(1, 5)).sum().backward()
    with pytest.raises(RuntimeError, match=r"1 parameters got no gradient.*1\.weight"):
        buckets.finish()


def make_engine(tmp_path, *words) -> TorchEngine:
    settings = config(tmp_path, *words)
    world = World(rank=0, local_rank=0, size=1, device=CPU)
    torch.manual_seed(0)
    engine = TorchEngine(settings, world)
    engine.setup(build_model(settings, world))
    return engine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_block_is_sticky(tmp_path, precision):
    """Steps queued after a bad one, before the host knows, must not update either."""
    engine = make_engine(tmp_path, f"precision={precision}", "data.global_batch=2")
    masters = [p.detach().clone() for p in engine.masters]
    working = [p.detach().clone() for p in engine.working]
    for step, loss_value in enumerate([float("inf"), 1.0], start=1):
        loss = engine.model(torch.arange(32), torch.arange(32))
        engine.backward(loss, first=True, last=True)
        status = torch.zeros(STATUS_SIZE)
        status[LOSS] = loss_value
        status = engine.step(0.1, status)
        assert status[BLOCKED] == 1 and status[NORM].isfinite(), f"step {step}"
    assert all(torch.equal(a, b) for a, b in zip(masters, engine.masters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(working, engine.working, strict=True))


def test_guard_can_be_off(tmp_path):
    engine = make_engine(tmp_path, "run.guard=false", "data.global_batch=2")
    before = engine.masters[0].detach().clone()
    loss = engine.model(torch.arange(32), torch.arange(32))
    engine.backward(loss, first=True, last=True)
    status = engine.step(0.1, torch.full((STATUS_SIZE,), float("inf")))
    assert status[BLOCKED] == 0 and not torch.equal(before, engine.masters[0])


def test_bf16_working_copy_is_the_rounded_master(tmp_path):
    engine = make_engine(tmp_path, "precision=bf16", "data.global_batch=2")
    loss = engine.model(torch.arange(32), torch.arange(32))
    engine.backward(loss, first=True, last=True)
    engine.step(0.1, torch.zeros(STATUS_SIZE))
    for working, master in zip(engine.working, engine.masters, strict=True):
        assert working.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(working, master.to(torch.bfloat16))


def test_accumulation_is_one_large_batch(tmp_path):
    for micro in (8, 2):
        train(config(tmp_path / str(micro), f"data.micro_batch={micro}", "checkpoint=none"))
    small, large = loss_tensor(tmp_path / "2"), loss_tensor(tmp_path / "8")
    assert_as_good(small, large.double(), what="same", name="loss")


def test_deepspeed_config(tmp_path):
    words = ["engine=deepspeed", "engine.zero_stage=2", "precision=bf16"]
    made = deepspeed_config(config(tmp_path, *words), world_size=2)
    assert made["gradient_accumulation_steps"] == 2 and made["train_batch_size"] == 8
    assert made["bf16"]["enabled"] and made["zero_optimization"]["stage"] == 2
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["gradient_clipping"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["precision.reduce=bf16"], "precision.reduce=bf16"),
        (["precision.params=bf16"], "precision.params=bf16 needs precision.compute=bf16"),
        (["optimizer.fused=false"], "no device-side guard"),
        (["engine=deepspeed", "engine.optimizer=fused_adam"], "needs a CUDA device"),
    ],
)
def test_impossible_combinations(tmp_path, words, says):
    with pytest.raises(ConfigError, match=says):
        train(config(tmp_path, *words))


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "must hold integers, got RANK='one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 WORLD_SIZE=2"),
    ],
)
def test_broken_launcher_environment(tmp_path, monkeypatch, env, says):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says):
        start_world(config(tmp_path))


@pytest.mark.parametrize(
    ("listed", "understood"),
    [
        (None, "9.0"),
        ("", "9.0"),
        ("9.0a", "9.0"),
        ("8.0;9.0a+PTX", "8.0;9.0+PTX"),
        ("8.6 10.0f 9.0", "8.6 10.0 9.0"),
    ],
)
def test_architectures_are_numbers_for_deepspeed(listed, understood):
    assert architectures(listed) == understood


def test_no_gpu_is_said(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="run.device=cuda, but this torch sees no GPU"):
        start_world(config(tmp_path, "run.device=cuda"))


def test_activation_checkpointing_changes_no_loss(tmp_path):
    for kind in ("none", "full"):
        words = [f"model.activation_checkpointing={kind}", "checkpoint=none"]
        train(config(tmp_path / kind, *words))
    assert losses(tmp_path / "none") == losses(tmp_path / "full")
