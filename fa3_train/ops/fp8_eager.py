"""Both launches of an eager FP8 forward in one step: what a training loop calls all day.

``torch.ops.fa3_train.prep`` and ``attn_fp8_fwd`` do the same through the dispatcher, each with
tensors of its own for codes and descales. On the host that is most of the time of a call, and a
short attention on the GPU is over sooner.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fa3_train import checks
from fa3_train.checks import AttentionShape
from fa3_train.ops import fp8, prep
from fa3_train.ops.launch import address

ALIGNMENT = 256  # of what shares the scratch buffer, in bytes


def alike(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> bool:
    """q and k hold the same tokens, so that one launch can serve both."""
    return cu_q is cu_k and q.shape[:-2] == k.shape[:-2]


class EagerForward:
    """Both launches of an eager forward in one step, as the two ops would do them.

    Codes and descales live in one scratch buffer for the time of the call, and neither dispatcher
    nor lists of tensors stand between: about half of the host time of the ops. Used only where
    nobody watches the ops: no dispatch mode (checkpointing policies, fake tensors), no profiler, no
    checks of values.
    """

    def __init__(self, q, k, v, cos, cu, turn: int, shape: AttentionShape, call: Any) -> None:
        stages = [turn | prep.QUANTIZE] * 2 + [prep.QUANTIZE]
        xs = [q, k, v]
        results = prep.result_layout(xs, stages, cu, fp8.SCALE_BLOCK, q.dtype)
        self.bytes, offsets, views = 0, [], []
        for size, dtype in results:
            offsets.append(self.bytes)
            self.bytes += -(-math.prod(size) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        scratch = torch.empty(self.bytes, dtype=torch.uint8, device=q.device)
        for offset, (size, dtype) in zip(offsets, results, strict=True):
            flat = scratch[offset : offset + math.prod(size) * dtype.itemsize]
            views.append(flat.view(dtype).view(size))
        self.codes, self.descales = tuple(offsets[:3]), tuple(offsets[3:])
        out, lse = q.new_empty(shape.out_shape), self._lse(q, shape)
        plan = prep.make_plan(
            xs, stages, cos, cu, call.interleaved, False, fp8.SCALE_BLOCK, q.dtype, 0, results
        )
        address_cu = address(cu)
        q8, k8, v8 = views[:3]
        forward = fp8.make_plan(
            shape, q8, k8, v8, out, call.scale, call.right == 0, call.left, call.right,
            call.two_level, 0,
            (
                *(x.data_ptr() for x in (*views[:3], out, *views[3:], lse)), address_cu, address_cu,
            ),
        )  # fmt: skip
        assert plan is not None and forward is not None
        self.prep, self.forward, self.shape = plan, forward, shape
        self.rotates, self.transforms = cos is not None, bool(turn & prep.HADAMARD)

    @staticmethod
    def _lse(q: Tensor, shape: AttentionShape) -> Tensor:
        return q.new_empty(shape.lse_shape, dtype=torch.float32)

    def run(self, q, k, v, cos, sin, signs, position_ids, cu) -> tuple[Tensor, Tensor]:
        """out and lse."""
        scratch = torch.empty(self.bytes, dtype=torch.uint8, device=q.device)
        out, lse = q.new_empty(self.shape.out_shape), self._lse(q, self.shape)
        base = scratch.data_ptr()
        q8, k8, v8 = (base + x for x in self.codes)
        sq, sk, sv = (base + x for x in self.descales)
        kept = (None, None)  # tables as the kernel reads them, until the launch
        if self.rotates:
            kept = (cos.contiguous(), sin.contiguous())
            position_ids = None if position_ids is None else prep.kernel_ids(position_ids, q)
        if self.transforms:
            signs = signs.float().contiguous()
        address_cu = address(cu)
        self.prep.launch(
            q.data_ptr(), q8, sq, k.data_ptr(), k8, sk, v.data_ptr(), v8, sv, *map(address, kept),
            address(signs) if self.transforms else 0, address(position_ids), address_cu,
        )  # fmt: skip
        self.forward.launch(
            q8, k8, v8, out.data_ptr(), sq, sk, sv, lse.data_ptr(), address_cu, address_cu
        )
        return out, lse


def eager_forward(tensors, shape: AttentionShape, call: Any) -> EagerForward | None:
    """The launches of such calls, or None where the ops must see to it: other layouts, no rows."""
    q, k, v, cu_q, cu_k, cos, sin, signs, position_ids = tensors
    if shape.empty or shape.total_k == 0 or q.numel() == 0 or k.numel() == 0:
        return None
    if not alike(q, k, cu_q, cu_k) or any(checks.layout_problem(x) for x in (q, k, v)):
        return None
    turn = (prep.ROPE if cos is not None else 0) | (prep.HADAMARD if signs is not None else 0)
    stages = [turn | prep.QUANTIZE] * 2 + [prep.QUANTIZE]
    prep.check_prep(
        [q, k, v], stages, cos, sin, signs, position_ids, cu_q, fp8.SCALE_BLOCK
    )  # fmt: skip
    return EagerForward(q, k, v, cos, cu_q, turn, shape, call)


def unwatched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call may pass by the dispatcher, and its tensors lie as TMA needs them."""
    return (
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % checks.ALIGNMENT_BYTES == 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._autograd._profiler_enabled()
        and not fp8.checks_values()
    )
