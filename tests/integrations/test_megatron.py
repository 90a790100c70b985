"""Megatron-Core's core_attention on our kernels, against Megatron's own where it is installed."""

from __future__ import annotations

import contextlib
import types
import warnings

import pytest
import torch

from fa3_train import reference
from fa3_train.integrations import megatron, policy
from fa3_train.numerics import AGREEMENT_FP8, relative_rms_error

S, B, H, HKV, D = 11, 2, 4, 2, 8


def _config(**changes):
    settings = {
        "attention_dropout": 0.0, "context_parallel_size": 1, "num_attention_heads": H,
        "params_dtype": torch.float32, "softmax_type": "vanilla", "window_size": None,
        "window_attn_skip_freq": None,
    }  # fmt: skip
    return types.SimpleNamespace(**{**settings, **changes})


def _mask_type(name):
    return types.SimpleNamespace(name=name)


def _qkv(*lead):
    torch.manual_seed(0)
    return [torch.randn(*lead, h, D, requires_grad=True) for h in (H, HKV, HKV)]


def _core(mask="causal", layer=1, **changes):
    return megatron.CoreAttention(_config(**changes), layer, _mask_type(mask), "self")


def _truth(q, k, v, **options):
    """sbhd through the fp64 reference, heads flattened as Megatron wants them."""
    out, _ = reference.attention(*(x.transpose(0, 1) for x in (q, k, v)), **options)
    return out.transpose(0, 1).flatten(-2).float()


@pytest.mark.parametrize("mask", ["causal", "no_mask"])
def test_dense_layout_values_and_gradients(mask):
    q, k, v = _qkv(S, B)
    out = _core(mask)(q, k, v, None)
    assert out.shape == (S, B, H * D)
    want = _truth(q, k, v, window_size=(-1, 0 if mask == "causal" else -1))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_windows_on_the_layers_that_have_one():
    q, k, v = _qkv(S, B)
    for layer, sides in ((1, (3, 0)), (2, (-1, 0))):
        out = _core(layer=layer, window_size=(3, 0), window_attn_skip_freq=2)(q, k, v, None)
        torch.testing.assert_close(out, _truth(q, k, v, window_size=sides), rtol=1e-5, atol=1e-5)


def test_learnable_sink():
    q, k, v = _qkv(S, B)
    core = _core(softmax_type="learnable")
    torch.nn.init.normal_(core.softmax_offset)
    out = core(q, k, v, None)
    want = _truth(q, k, v, window_size=(-1, 0), sink=core.softmax_offset)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert core.softmax_offset.grad.abs().sum() > 0


def _packed(cu, **changes):
    fields = {
        "qkv_format": "thd", "cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_seqlen_q": 6,
        "max_seqlen_kv": 6, "cu_seqlens_q_padded": None, "cu_seqlens_kv_padded": None,
    }  # fmt: skip
    return types.SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize("longest", [6, None])
def test_packed_sequences(longest):
    cu = torch.tensor([0, 5, 11], dtype=torch.int32)
    q, k, v = _qkv(S)
    packed = _packed(cu, max_seqlen_q=longest, max_seqlen_kv=longest)
    out = _core("padding_causal")(q, k, v, None, packed_seq_params=packed)
    want, _ = reference.attention(q, k, v, window_size=(-1, 0), cu_seqlens_q=cu, cu_seqlens_k=cu)
    torch.testing.assert_close(out, want.flatten(-2).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout.*0.1"),
        ({"context_parallel_size": 2}, "context_parallel_size.*2"),
        ({"softmax_type": "off-by-one"}, "softmax_type.*off-by-one"),
    ],
)
def test_settings_that_are_refused_when_built(changes, message):
    with pytest.raises(policy.UnsupportedRequest, match=message):
        _core(**changes)


def test_calls_that_are_refused():
    q, k, v = _qkv(S, B)
    with pytest.raises(policy.UnsupportedRequest, match="top-left.*10 queries and 11 keys"):
        _core()(q[1:], k, v, None)
    with pytest.raises(policy.UnsupportedRequest, match="attention_bias"):
        _core()(q, k, v, None, attention_bias=torch.zeros(1))
    with pytest.raises(policy.UnsupportedRequest, match="needs packed_seq_params"):
        _core("padding")(q, k, v, torch.zeros(B, 1, 1, S, dtype=torch.bool))
    cu = torch.tensor([0, 5, 11], dtype=torch.int32)
    with pytest.raises(policy.UnsupportedRequest, match="gaps are not served"):
        _core()(
            q[:, 0], k[:, 0], v[:, 0], None,
            packed_seq_params=_packed(cu, cu_seqlens_q_padded=cu + 1),
        )  # fmt: skip


def test_warn_runs_the_core_of_the_spec(monkeypatch):
    class Theirs(torch.nn.Module):
        def __init__(self, **arguments):
            super().__init__()
            self.arguments = arguments

        def forward(self, *args, **kwargs):
            return "theirs", sorted(kwargs)

    monkeypatch.setattr(megatron, "_build", lambda spec, **arguments: spec(**arguments))
    inner = types.SimpleNamespace(core_attention=Theirs)
    spec = types.SimpleNamespace(
        submodules=types.SimpleNamespace(
            self_attention=types.SimpleNamespace(submodules=inner)
        )
    )  # fmt: skip
    swapped = megatron.swap_core_attention(spec, policy="warn")
    core_class = swapped.submodules.self_attention.submodules.core_attention
    assert issubclass(core_class, megatron.CoreAttention) and inner.core_attention is Theirs
    q, k, v = _qkv(S, B)
    policy.reset_fallback_counts()
    for changes in ({"attention_dropout": 0.1}, {"context_parallel_size": 2}):
        core = core_class(_config(**changes), 1, _mask_type("causal"), "self")
        assert core(q, k, v, None)[0] == "theirs"
    core = core_class(_config(), 1, _mask_type("causal"), "self")
    assert core(q, k, v, None, attention_bias=torch.zeros(1))[0] == "theirs"
    torch.testing.assert_close(
        core(q, k, v, None), _truth(q, k, v, window_size=(-1, 0)), rtol=1e-5, atol=1e-5
    )
    assert list(policy.fallback_counts().values()) == [1, 1, 1]
    assert not dict(core.named_children())
    with pytest.raises(ValueError, match="policy: must be one of"):
        megatron.swap_core_attention(spec, policy="silent")


@pytest.fixture(scope="module")
def mcore():
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.transformer_config import TransformerConfig
    return types.SimpleNamespace(
        spec=get_gpt_layer_local_spec, masks=AttnMaskType, config=TransformerConfig
    )


def test_swap_in_a_real_layer_spec(mcore):
    spec = mcore.spec()
    swapped = megatron.swap_core_attention(spec)
    core = swapped.submodules.self_attention.submodules.core_attention
    assert core is megatron.CoreAttention
    assert spec.submodules.self_attention.submodules.core_attention is not core
    with pytest.raises(ValueError, match="spec: must be a transformer layer spec"):
        megatron.swap_core_attention(types.SimpleNamespace(submodules=None))


@pytest.fixture
def one_rank(mcore, tmp_path, monkeypatch):
    """Megatron's groups with one process, on a machine without a GPU."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    if not torch.cuda.is_available():  # where Megatron's own core allocates its buffers
        monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
        no_dropout_rng = types.SimpleNamespace(fork=contextlib.nullcontext)
        monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: no_dropout_rng)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/g", rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _self_attention(mcore, spec, dtype, head_dim):
    from megatron.core.transformer.spec_utils import build_module

    config = mcore.config(
        num_layers=1, hidden_size=H * head_dim, num_attention_heads=H, num_query_groups=HKV,
        attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True,
        params_dtype=dtype, masked_softmax_fusion=False, bf16=dtype == torch.bfloat16,
    )  # fmt: skip
    return build_module(spec.submodules.self_attention, config=config, layer_number=1).eval()


def _angles(length, head_dim):
    """Megatron's table (S, 1, 1, D), halves repeated; its own class puts it on the GPU."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat([angles, angles], -1)[:, None, None]


def test_values_of_a_whole_megatron_self_attention(mcore, one_rank):
    """Megatron's SelfAttention, RoPE and projections, with its own core and with ours."""
    x = torch.randn(S, B, H * D)
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    outs, state = [], None
    for spec in (
        mcore.spec(),
        megatron.swap_core_attention(mcore.spec(), policy="warn"),
        megatron.swap_core_attention(mcore.spec()),
    ):
        layer = _self_attention(mcore, spec, torch.float32, D)
        state = state or layer.state_dict()
        assert layer.state_dict().keys() == state.keys()
        layer.load_state_dict(state)
        outs.append(layer(x, mask, rotary_pos_emb=_angles(S, D))[0])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-5)
    assert isinstance(layer.core_attention, megatron.CoreAttention)


def test_fp8_self_attention_owns_the_rotation(mcore, one_rank):
    """As near to Megatron's bf16 self-attention as FP8 is; RoPE happens once, inside."""
    length, head_dim = 70, 64
    attention = megatron.fp8_self_attention()
    spec = megatron.swap_core_attention(mcore.spec(), attention.core)
    spec.submodules.self_attention.module = attention
    torch.manual_seed(0)
    x = torch.randn(length, B, H * head_dim, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    angles = _angles(length, head_dim)
    theirs = _self_attention(mcore, mcore.spec(), torch.bfloat16, head_dim)
    ours = _self_attention(mcore, spec, torch.bfloat16, head_dim)
    with torch.no_grad():
        theirs.linear_qkv.weight.mul_(3)  # scores that matter, so that RoPE does
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing.missing_keys == ["core_attention.signs"] and not missing.unexpected_keys
    results = []
    for layer, how in ((theirs, {"rotary_pos_emb": angles}), (ours, {"rotary_pos_emb": angles})):
        given = x.clone().requires_grad_()
        out = layer(given, mask, **how)[0]
        out.float().square().sum().backward()
        results.append((out.detach(), given.grad))
    for a, b in zip(*results, strict=True):
        assert relative_rms_error(b, a) < AGREEMENT_FP8
    ours.core_attention.rotary = None
    unrotated = ours(x, mask)[0].detach()
    assert relative_rms_error(unrotated, results[0][0]) > 2 * AGREEMENT_FP8

    packed = torch.randn(length, 1, H * head_dim, dtype=torch.bfloat16)
    cu = torch.tensor([0, 30, length], dtype=torch.int32)
    params = _packed(cu, max_seqlen_q=40, max_seqlen_kv=40)
    out = ours(packed, None, rotary_pos_emb=angles, packed_seq_params=params)[0]
    parts = [
        ours(part, mask[..., : len(part), : len(part)], rotary_pos_emb=angles[: len(part)])[0]
        for part in packed.split([30, 40])
    ]
    assert relative_rms_error(out, torch.cat(parts)) < 0.01 * AGREEMENT_FP8
    with pytest.raises(ValueError, match="policy: must be 'error' with a core that rotates"):
        megatron.swap_core_attention(mcore.spec(), attention.core, policy="warn")
