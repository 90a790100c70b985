"""A Llama written out from the formulas, for any dtype: the yardstick of the module tests.

It shares no code with the package: documents one by one, heads repeated for GQA, scores as a full
matrix, logits of all tokens, losses by log_softmax.
"""

from __future__ import annotations

import math

import torch


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def frequencies(head_dim, theta, scaling):
    out = []
    for i in range(head_dim // 2):
        f = theta ** (-2.0 * i / head_dim)
        if scaling is not None:
            length = scaling["original_max_position_embeddings"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            wave = 2 * math.pi / f
            if wave > length / low:
                f = f / scaling["factor"]
            elif wave >= length / high:
                s = (length / wave - low) / (high - low)
                f = (1 - s) * f / scaling["factor"] + s * f
        out.append(f)
    return torch.tensor(out, dtype=torch.float64)


def rope(x, positions, freqs):
    """x (S, heads, D)."""
    angles = positions.double()[:, None] * freqs
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, window=None, softcap=0.0, causal=True):
    """One document: q (S, H, D), k and v (S, G, D)."""
    size = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(size, 1), v.repeat_interleave(size, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(q.shape[0])[:, None]
    j = torch.arange(k.shape[0])[None]
    hidden = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    if causal:
        hidden |= j > i
    if window is not None:
        hidden |= j <= i - window
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def product(x, weight):
    return x @ weight.T


class _FP8Product(torch.autograd.Function):
    """x @ weight.T with factors through e4m3, and the incoming gradient through e5m2."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = through_fp8(x, torch.float8_e4m3fn), through_fp8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = through_fp8(grad, torch.float8_e5m2)
        return grad @ weight, grad.T @ x


fp8_product = _FP8Product.apply


def through_fp8(x, kind):
    """Rounded to FP8 with one scale for the tensor, which maps its largest magnitude to the
    format's."""
    scale = torch.finfo(kind).max / x.abs().max().float()
    return ((x.float() * scale).to(kind).float() / scale).to(x.dtype)


def layer(x, lengths, w, config, mm=product):
    """x (T, hidden); w: parameters of one TransformerLayer by name; mm: how matrices multiply."""
    freqs = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    h = rms_norm(x, w["attention.qkv.norm.weight"], config.norm_eps)
    qkv = mm(h, w["attention.qkv.linear.weight"])
    q, k, v = qkv.split([config.q_size, config.kv_size, config.kv_size], -1)
    outs = []
    for piece in torch.arange(x.shape[0]).split(lengths):
        heads = [t[piece].reshape(len(piece), -1, config.head_dim) for t in (q, k, v)]
        if config.qk_norm:
            heads[0] = rms_norm(heads[0], w["attention.q_norm.weight"], config.norm_eps)
            heads[1] = rms_norm(heads[1], w["attention.k_norm.weight"], config.norm_eps)
        positions = torch.arange(len(piece))
        qr, kr = rope(heads[0], positions, freqs), rope(heads[1], positions, freqs)
        out = attention(qr, kr, heads[2], config.window_size, config.softcap)
        outs.append(out.reshape(len(piece), -1))
    x = x + mm(torch.cat(outs), w["attention.out_proj.weight"])
    h = rms_norm(x, w["mlp.norm.weight"], config.norm_eps)
    gate, up = mm(h, w["mlp.mlp.gate_up_proj.weight"]).chunk(2, -1)
    return x + mm(gate * torch.sigmoid(gate) * up, w["mlp.mlp.down_proj.weight"])


def logits(tokens, lengths, w, config, mm=product):
    """tokens (T,) -> (T, vocab); w: parameters of a TransformerLM by name."""
    x = w["embedding.weight"][tokens]
    for index in range(config.num_layers):
        prefix = f"layers.{index}."
        part = {n[len(prefix) :]: t for n, t in w.items() if n.startswith(prefix)}
        x = layer(x, lengths, part, config, mm)
    head = w["embedding.weight"] if config.tie_embeddings else w["head.weight"]
    return rms_norm(x, w["norm.weight"], config.norm_eps) @ head.T


def loss(tokens, labels, lengths, w, config, mm=product):
    log_probs = logits(tokens, lengths, w, config, mm).log_softmax(-1)
    counted = labels >= 0
    return -log_probs[counted, labels[counted]].mean()


def leaves(module, dtype):
    """The module's parameters as fresh leaves of another dtype, by name."""
    return {n: p.detach().to(dtype).clone().requires_grad_() for n, p in module.named_parameters()}
