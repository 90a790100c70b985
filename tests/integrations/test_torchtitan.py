"""torchtitan's inner attention, on a stand-in with the shape of its classes, or on the real one."""

from __future__ import annotations

import dataclasses
import types
from typing import NamedTuple

import pytest
import torch

from fa3_train import reference
from fa3_train.integrations import policy
from fa3_train.integrations import torchtitan as titan
from fa3_train.numerics import assert_as_good

B, L, N, NKV, D = 2, 6, 4, 2, 8


class Metadata(NamedTuple):
    """torchtitan's VarlenMetadata, field for field."""

    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    max_q: int
    max_k: int
    cu_seq_q_host: tuple[int, ...] | None = None


class StandIn(torch.nn.Module):
    """The parts of torchtitan's VarlenAttention that a subclass meets."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        window_size: tuple[int, int] = (-1, 0)

    def __init__(self, config):
        raise AssertionError("would activate another flash attention")


def _base():
    try:
        from torchtitan.models.common.attention import VarlenAttention
    except ImportError:
        return StandIn
    return VarlenAttention


def _qkv(dtype=torch.float32, lead=(B, L)):
    torch.manual_seed(0)
    return [torch.randn(*lead, n, D, dtype=dtype, requires_grad=True) for n in (N, NKV, NKV)]


DOCUMENTS = torch.tensor([0, 4, 9, 12], dtype=torch.int32)  # across the rows of the batch
CASES = [((B, L), True), ((B, L), False), ((B * L,), True)]


def _definition(leaves, window, packed, dtype):
    """Output and gradients of sum(out^2) by the formula, evaluated in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    if packed:
        out, _ = reference.attention(
            *(x.flatten(0, -3) for x in leaves), window_size=window, cu_seqlens_q=DOCUMENTS,
            cu_seqlens_k=DOCUMENTS, dtype=dtype,
        )  # fmt: skip
        out = out.view(*leaves[0].shape)
    else:
        out, _ = reference.attention(*leaves, window_size=window, dtype=dtype)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("window", [(-1, 0), (2, 0), (-1, -1)])
@pytest.mark.parametrize(("lead", "packed"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients(window, lead, packed, dtype):
    """fp32 tensors are cast to bf16, as torchtitan does, and the output is fp32 again."""
    leaves = _qkv(dtype, lead)
    module_class = titan.inner_attention(_base())
    module = module_class(module_class.Config(window_size=window, backend="reference"))
    masks = Metadata(DOCUMENTS, DOCUMENTS, 5, 5) if packed else None
    out = module(*leaves, attention_masks=masks, enable_gqa=True)
    assert out.shape == leaves[0].shape and out.dtype == dtype
    got = (out, *torch.autograd.grad(out.square().sum(), leaves))
    truth = _definition(leaves, window, packed, torch.float64)
    plain = _definition(leaves, window, packed, torch.bfloat16)
    for name, a, t, b in zip(("out", "dq", "dk", "dv"), got, truth, plain, strict=True):
        assert_as_good(a, t, b, "out" if name == "out" else "grad", name)


@pytest.mark.parametrize("packed", [True, False])
def test_out_transform_gets_lse_per_token(packed):
    q, k, v = _qkv()
    masks = Metadata(DOCUMENTS, DOCUMENTS, 5, 5) if packed else None
    seen = {}

    def epilogue(out, lse):
        seen["shapes"] = out.shape, lse.shape
        return out * torch.sigmoid(lse).unsqueeze(-1)

    out = titan.varlen_attention(q, k, v, masks, out_transform=epilogue, backend="reference")
    assert seen["shapes"] == ((B * L, N, D), (B * L, N))
    assert out.shape == (B, L, N, D)
    plain = titan.varlen_attention(q, k, v, masks, backend="reference")
    ratio = out / plain
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4, atol=1e-5)


def test_use_in_sets_every_layer_and_keeps_the_window():
    base = _base()
    layers = [
        types.SimpleNamespace(
            attention=types.SimpleNamespace(inner_attention=base.Config(window_size=(w, 0)))
        )
        for w in (-1, 128)
    ]
    assert titan.use_in(types.SimpleNamespace(layers=layers), base) == 2
    windows = [layer.attention.inner_attention.window_size for layer in layers]
    assert windows == [(-1, 0), (128, 0)]
    kinds = {type(layer.attention.inner_attention).__mro__[1] for layer in layers}
    assert kinds == {base.Config}  # code that asks for a varlen attention finds one
    flex = types.SimpleNamespace(attention=types.SimpleNamespace(inner_attention=object()))
    with pytest.raises(policy.UnsupportedRequest, match="must be a varlen attention, got object"):
        titan.use_in(types.SimpleNamespace(layers=[flex]), base)
    with pytest.raises(ValueError, match="must have layers"):
        titan.use_in(types.SimpleNamespace(layers=[]), base)


def test_save_ops_names_our_forward():
    assert torch.ops.fa3_train.attn_fwd.default in titan.save_ops()


def test_other_masks_are_refused():
    q, k, v = _qkv()
    with pytest.raises(policy.UnsupportedRequest, match="VarlenMetadata.*got dict"):
        titan.varlen_attention(q, k, v, {"flex": 1})
    with pytest.raises(policy.UnsupportedRequest, match="packed tokens.*got None"):
        titan.varlen_attention(*(x.flatten(0, 1) for x in (q, k, v)))
    masks = Metadata(DOCUMENTS, DOCUMENTS, 5, 5)
    assert "block_table" in titan.supports(attention_masks=masks, block_table=torch.zeros(1))
    assert titan.supports(attention_masks=masks, enable_gqa=True, score_mod=None) is None


def test_warn_runs_the_forward_of_the_base():
    class Base(StandIn):
        def __init__(self, config):
            torch.nn.Module.__init__(self)

        def forward(self, q, k, v, *, attention_masks, scale=None, out_transform=None, **kwargs):
            return "base"

    module_class = titan.inner_attention(Base)
    module = module_class(module_class.Config(policy="warn", backend="reference"))
    policy.reset_fallback_counts()
    leaves = _qkv()
    assert module(*leaves, attention_masks={"flex": 1}) == "base"
    assert module(*leaves, attention_masks=Metadata(DOCUMENTS, DOCUMENTS, 5, 5)).shape == (
        B,
        L,
        N,
        D,
    )
    assert list(policy.fallback_counts().values()) == [1]


def test_a_model_of_the_real_package(monkeypatch):
    """Its Llama-3 with our converter beside its own varlen attention, which on the CPU runs on our
    kernels too, but through torch's flash operators and its own code."""
    pytest.importorskip("torchtitan.protocols.model")
    from torch.nn import attention
    from torchtitan.models.llama3 import model_registry

    from fa3_train.integrations import torch_flash

    settings = {"attn_backend": "varlen"}
    converters = [titan.converter().Config(backend="reference")]
    built = []
    for extra in ({}, {"converters": converters}):
        model = model_registry("debugmodel", **settings, **extra).model.build()
        torch.manual_seed(0)
        model.init_weights(buffer_device=torch.device("cpu"))
        built.append(model)
    ours = built[1].layers["0"].attention.inner_attention
    assert type(ours).__name__ == "Fa3Attention"
    tokens = torch.randint(0, 2000, (14,))
    positions = torch.cat([torch.arange(n) for n in (9, 1, 4)])
    attention.activate_flash_attention_impl(
        torch_flash.register(backend="reference", dispatch_key="CPU")
    )
    try:
        results = []
        for model in built:
            masks = model.get_attention_masks(positions)
            logits = model(tokens, attention_masks=masks, positions=positions)
            logits.square().mean().backward()
            results.append((logits, [p.grad for p in model.parameters()]))
    finally:
        attention.restore_flash_attention_impl()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3 * float(a.abs().max() + 1e-6))


def test_arguments_and_sharding_of_the_real_package():
    """Its tensor-parallel plan names the forward's arguments, and is kept by the converter."""
    import inspect

    attention = pytest.importorskip("torchtitan.models.common.attention")
    from torchtitan.models.llama3 import llama3_configs
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    ours = titan.inner_attention()
    for method in (attention.VarlenAttention.forward, ours.forward):
        assert list(inspect.signature(method).parameters)[1:4] == ["q_TNH", "k_TNH", "v_TNH"]
    configs = [llama3_configs["debugmodel"]("varlen") for _ in range(2)]
    titan.converter().Config().build().convert(configs[0])
    for config in configs:  # before the swap or after it
        set_llama3_sharding_config(config, enable_sp=False)
    titan.use_in(configs[1])
    for config in configs:
        inner = config.layers[0].attention.inner_attention
        assert type(inner) is not attention.VarlenAttention.Config
        assert set(inner.sharding_config.in_src_shardings) == {"q_TNH", "k_TNH", "v_TNH"}


def test_save_list_of_the_real_package():
    ac = pytest.importorskip("torchtitan.distributed.activation_checkpoint")

    class SaveAttention(ac.SelectiveAC):
        def get_save_ops(self):
            return super().get_save_ops() | titan.save_ops()

    saved = SaveAttention(SaveAttention.Config()).get_save_ops()
    assert torch.ops.fa3_train.attn_fwd.default in saved
    assert saved > ac.SelectiveAC(ac.SelectiveAC.Config()).get_save_ops()
