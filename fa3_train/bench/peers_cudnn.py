"""cuDNN's FP8 attention through its Python front end (package nvidia-cudnn-frontend).

torch has no way to it. One descale per tensor, P scaled by 2^8, output e4m3 with a scale of its own
(what cuDNN writes on Hopper): the amax that a first run reports decides it.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from fa3_train import reference_fp8
from fa3_train.bench.cells import Cell
from fa3_train.bench.peers import Call, Inputs, Peer

P_SCALE = 256.0  # P is at most 1; e4m3 holds 448
SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


class CudnnFp8(Peer):
    name = "cudnn"

    def missing(self) -> str | None:
        found = importlib.util.find_spec("cudnn")
        return None if found else "the package cudnn (nvidia-cudnn-frontend) is not installed"

    def problem(self, cell: Cell, which: str) -> str | None:
        if cell.lengths:
            return "no packed sequences here"
        return super().problem(cell, which)

    def build(self, cell: Cell, x: Inputs, which: str) -> Call:
        try:
            return self._build(cell, x)
        except (RuntimeError, ValueError, NotImplementedError, TypeError):
            raise
        except Exception as error:  # the front end's own classes
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def _build(self, cell: Cell, x: Inputs) -> Call:
        cudnn = importlib.import_module("cudnn")
        f8, f32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        handle = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph = cudnn.pygraph(
            io_data_type=f8, intermediate_data_type=f32, compute_data_type=f32, handle=handle
        )
        pack: dict[object, Tensor] = {}
        value: dict[str, Tensor] = {}

        def scalar(name: str, start: float) -> object:
            value[name] = torch.full((1, 1, 1, 1), start, device=x.q.device)
            made = graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=f32)
            pack[made] = value[name]
            return made

        inputs = {}
        for name, t in (("q", x.q), ("k", x.k), ("v", x.v)):
            scale = t.abs().amax().float() / reference_fp8.E4M3_MAX
            codes = reference_fp8.quantize_with(t.float(), scale)
            inputs[name] = _bshd(graph, name, codes, f8)
            pack[inputs[name]] = codes.view(torch.uint8)
            inputs[f"descale_{name}"] = scalar(f"descale_{name}", float(scale))
        inputs["scale_s"] = scalar("scale_s", P_SCALE)
        inputs["descale_s"] = scalar("descale_s", 1.0 / P_SCALE)
        inputs["scale_o"] = scalar("scale_o", 1.0)
        out, stats, amax_s, amax_o = graph.sdpa_fp8(
            **inputs, generate_stats=True, attn_scale=x.scale, use_causal_mask=cell.causal
        )
        codes_out = torch.empty_like(x.q, dtype=reference_fp8.E4M3)
        batch, seqlen, heads, dim = x.q.shape
        out.set_output(True).set_dim([batch, heads, seqlen, dim])
        out.set_stride([seqlen * heads * dim, dim, heads * dim, 1])
        pack[out] = codes_out.view(torch.uint8)
        lse = torch.empty(batch, heads, seqlen, 1, device=x.q.device)
        stats.set_output(True).set_data_type(f32).set_dim(list(lse.shape))
        stats.set_stride(list(lse.stride()))
        pack[stats] = lse
        largest = torch.zeros(1, 1, 1, 1, device=x.q.device)
        for made, t in ((amax_s, torch.zeros_like(largest)), (amax_o, largest)):
            made.set_output(True).set_data_type(f32).set_dim([1] * 4).set_stride([1] * 4)
            pack[made] = t
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(
            max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.q.device
        )
        graph.execute(pack, workspace, handle=handle)
        value["scale_o"].copy_(reference_fp8.E4M3_MAX / largest.clamp(min=1e-6))
        unit = 1.0 / value["scale_o"]
        looked_at = False

        def run() -> tuple[Tensor, ...]:
            nonlocal looked_at
            graph.execute(pack, workspace, handle=handle)
            if looked_at:
                return (codes_out,)
            looked_at = True  # the first result is compared with the others', not timed
            return (codes_out.float() * unit,)

        return run


def _bshd(graph: object, name: str, t: Tensor, dtype: object) -> object:
    """A (B, H, S, D) tensor of the graph over ``t`` (B, S, H, D)."""
    batch, seqlen, heads, dim = t.shape
    return graph.tensor(  # type: ignore[attr-defined]
        name=name, dim=[batch, heads, seqlen, dim],
        stride=[seqlen * heads * dim, dim, heads * dim, 1], data_type=dtype,
    )  # fmt: skip
