"""torch's flash-attention operators on these kernels, through torch's own registration.

The operators have no CPU kernels, so registering ours for the CPU makes them work here with the
reference backend. tests/gpu has the same on CUDA, where they stand behind F.sdpa.
"""

import pytest
import torch
from torch.nn import attention

from fa3_train import reference
from fa3_train.integrations import policy, torch_flash

pytestmark = pytest.mark.skipif(
    not hasattr(attention, "register_flash_attention_impl"), reason="torch before 2.11"
)
aten = torch.ops.aten
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def active():
    name = torch_flash.register(backend="reference", dispatch_key="CPU")
    attention.activate_flash_attention_impl(name)
    yield name
    attention.restore_flash_attention_impl()


def _qkv(*lead, heads=(4, 2, 2), d=16):
    torch.manual_seed(0)
    return [torch.randn(*lead, h, d, requires_grad=True) for h in heads]


def test_registering_changes_nothing_before_activation():
    name = torch_flash.register(backend="reference", dispatch_key="CPU")
    assert name in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() != name
    q, k, v = (x.transpose(1, 2) for x in _qkv(2, 7))
    with pytest.raises(NotImplementedError):
        aten._scaled_dot_product_flash_attention(q, k, v)
    attention.activate_flash_attention_impl(name)
    assert attention.current_flash_attention_impl() == name
    aten._scaled_dot_product_flash_attention(q, k, v)
    attention.restore_flash_attention_impl()
    with pytest.raises(NotImplementedError):
        aten._scaled_dot_product_flash_attention(q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_dense_operator_and_its_autograd(active, causal, layout):
    """Both memory layouts come back as torch's shape functions promise them to a compiler."""
    q, k, v = (x.transpose(1, 2) for x in _qkv(2, 9))
    if layout == "heads first":
        q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3)
    assert rest[0] is None and rest[2:4] == [9, 9]
    want, want_lse = reference.attention(
        *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=0.3,
        window_size=(-1, 0 if causal else -1),
    )  # fmt: skip
    torch.testing.assert_close(out, want.transpose(1, 2).float(), **CLOSE)
    torch.testing.assert_close(lse, want_lse.float(), **CLOSE)
    with torch.device("meta"):
        shapes = aten._scaled_dot_product_flash_attention(
            *(x.to("meta") for x in (q, k, v)), 0.0, causal
        )
    assert out.stride() == shapes[0].stride()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    truth = torch.autograd.grad(want.square().sum(), (q, k, v))
    for got, t, x in zip(grads, truth, (q, k, v), strict=True):
        torch.testing.assert_close(got, t.float(), rtol=1e-4, atol=1e-5)
        assert got.stride() == x.stride()


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (4, 2)])
def test_torchs_varlen_function(active, window):
    from torch.nn.attention.varlen import varlen_attn

    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    q, k, v = _qkv(12)
    out = varlen_attn(q, k, v, cu, cu, 7, 7, window_size=window, enable_gqa=True)
    want, _ = reference.attention(q, k, v, window_size=window, cu_seqlens_q=cu, cu_seqlens_k=cu)
    torch.testing.assert_close(out, want.float(), **CLOSE)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    truth = torch.autograd.grad(want.square().sum(), (q, k, v))
    for got, t in zip(grads, truth, strict=True):
        torch.testing.assert_close(got, t.float(), rtol=1e-4, atol=1e-5)


def test_varlen_into_a_given_tensor(active):
    if not hasattr(attention.varlen, "varlen_attn_out"):
        pytest.skip("this torch has no varlen_attn_out")
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    q, k, v = (x.detach() for x in _qkv(12, heads=(2, 2, 2)))
    out = torch.full_like(q, float("nan"))
    attention.varlen.varlen_attn_out(out, q, k, v, cu, cu, 7, 7)
    want, _ = reference.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    torch.testing.assert_close(out, want.float(), **CLOSE)


def test_what_is_not_served_is_refused(active):
    q, k, v = (x.transpose(1, 2) for x in _qkv(2, 9))
    with pytest.raises(policy.UnsupportedRequest, match="dropout_p.*0.5"):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.5)
    with pytest.raises(policy.UnsupportedRequest, match="return_debug_mask"):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, True)
    cu = torch.tensor([0, 12], dtype=torch.int32)
    q, k, v = _qkv(12)
    with pytest.raises(policy.UnsupportedRequest, match="seqused_k: not served"):
        aten._flash_attention_forward(
            q, k, v, cu, cu, 12, 12, 0.0, False, False, seqused_k=torch.tensor([7])
        )
    assert torch_flash.supports(num_splits=4) is not None
    assert torch_flash.supports(num_splits=1, seqused_k=None) is None


def test_warn_runs_the_kernel_that_was_there_and_counts():
    """A stand-in kernel for the CPU takes the part that torch's own has on CUDA."""
    if not hasattr(torch.library, "get_kernel"):
        pytest.skip("this torch cannot find a kernel that is about to be replaced")
    before = torch.library.Library("aten", "IMPL")

    def theirs(q, k, v, dropout_p=0.0, *args, **kwargs):
        empty = q.new_empty(0)
        return q + dropout_p, q.new_zeros(1), None, None, 1, 1, empty, empty, empty

    before.impl("_scaled_dot_product_flash_attention", theirs, "CPU")
    policy.reset_fallback_counts()
    q, k, v = (x.detach().transpose(1, 2) for x in _qkv(2, 9))
    name = torch_flash.register("lenient", policy="warn", backend="reference", dispatch_key="CPU")
    attention.activate_flash_attention_impl(name)
    try:
        for _ in range(2):
            out = aten._scaled_dot_product_flash_attention(q, k, v, 0.5)[0]
            assert torch.equal(out, q + 0.5)
        served = aten._scaled_dot_product_flash_attention(q, k, v)[0]
        assert not torch.equal(served, q)
        assert list(policy.fallback_counts().values()) == [2]
    finally:
        attention.restore_flash_attention_impl()
        before._destroy()


def test_bad_arguments():
    with pytest.raises(ValueError, match="policy: must be one of"):
        torch_flash.register(policy="silent")
    with pytest.raises(ValueError, match="backend: must not call torch's attention"):
        torch_flash.register(backend="sdpa")
