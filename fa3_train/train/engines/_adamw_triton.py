"""One AdamW step of one FP32 tensor as a Triton kernel that also refreshes its 16-bit copy.

torch's fused kernel moves 28 bytes a parameter, 4 more because it writes the unscaled gradient
back, and the copy for the forward takes another 6; here it is 16 read and 14 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _adamw_kernel(  # type: ignore[no-untyped-def]
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, step_ptr, scale_ptr, blocked_ptr,
    numel, lr, beta1, beta2, log2_beta1, log2_beta2, eps, decay,
    SCALED: tl.constexpr, GUARDED: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocked = False
    if GUARDED:
        blocked = tl.load(blocked_ptr) != 0.0
    if not blocked:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        param = tl.load(param_ptr + at, mask=inside, other=0.0)
        mean = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
        square = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
        if SCALED:
            grad = grad / tl.load(scale_ptr)
        step = tl.load(step_ptr)
        correction1 = 1.0 - tl.exp2(step * log2_beta1)
        correction2 = 1.0 - tl.exp2(step * log2_beta2)
        mean += (1.0 - beta1) * (grad - mean)
        square = beta2 * square + (1.0 - beta2) * grad * grad
        param *= 1.0 - lr * decay
        param -= (lr / correction1) * mean / (tl.sqrt(square / correction2) + eps)
        tl.store(param_ptr + at, param, mask=inside)
        tl.store(exp_avg_ptr + at, mean, mask=inside)
        tl.store(exp_avg_sq_ptr + at, square, mask=inside)
        if COPY:
            tl.store(copy_ptr + at, param.to(copy_ptr.dtype.element_ty), mask=inside)


def update(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    copy: torch.Tensor | None,
    *,
    scale: torch.Tensor | None,
    blocked: torch.Tensor | None,
    lr: float,
    betas: tuple[float, float],
    log2_betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update `param` and `state` (exp_avg, exp_avg_sq; step already counted) in place.

    All tensors are contiguous FP32 of one shape, but for the dtype of `copy`; `scale` divides the
    gradient, `blocked` != 0 leaves everything as it is; both are 0-dim FP32 on the device.
    """
    numel = param.numel()
    _adamw_kernel[(triton.cdiv(numel, _BLOCK),)](
        param, grad, state["exp_avg"], state["exp_avg_sq"], param if copy is None else copy,
        state["step"], param if scale is None else scale, param if blocked is None else blocked,
        numel, lr, *betas, *log2_betas, eps, weight_decay, SCALED=scale is not None,
        GUARDED=blocked is not None, COPY=copy is not None, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
