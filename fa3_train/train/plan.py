"""What a run will be, worked out on paper: `dryrun=true`. No torch, no device.

The memory estimate adds up what must exist at the worst moment of a step on one GPU. It leaves out
the allocator's fragmentation, NCCL's and cuBLAS's buffers and the CUDA context (1 to 3 GiB
together), so leave that much room. What torch had allocated at the peak was 9 % (4 layers of
Llama 3 8B, 40.6 GiB estimated) and 13 % (recipe tiny_gpu, 12.1 GiB) more, measured on an H200.

Activations, in elements per token and layer, for hidden size h, query width q = H D, key/value
width k = Hkv D and feed-forward width f: what the backward of each piece reads is

    norm -> QKV   h + h            (input of the norm, input of the GEMM)
    attention     q + 2 k + q      (q, k, v after RoPE, output) and 4 H bytes of log-sum-exp
    norm -> MLP   h + h + 3 f      (as above; gate, up and their product)

Full checkpointing keeps h a layer, selective h + q (and the log-sum-exp), plus one layer in full
while it runs again.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import OmegaConf

from fa3_train.models.config import ModelConfig
from fa3_train.train.config import TrainConfig
from fa3_train.train.flops import peak_of, step_flops

GIB = float(1 << 30)
_REFERENCE_GPU = "NVIDIA H100 80GB HBM3"
_LOGIT_ELEMENTS = 1 << 29  # most logits that the loss holds at once on a GPU, see modules/loss.py


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def memory_estimate(config: TrainConfig, world_size: int) -> Memory:
    """Bytes on one of `world_size` GPUs at the worst moment of a step."""
    model = config.model_config()
    weights, gradients, optimizer = _state_bytes(config, model, world_size)
    tokens = config.data.micro_batch * config.data.seq_len // config.context_ranks(world_size)
    element = 2 if config.precision.compute == "bf16" else 4
    chunk = model.loss_chunk_tokens or max(128, _LOGIT_ELEMENTS // model.vocab_size)
    chunk = min(chunk, tokens)
    # Logits and their gradient of one chunk, fp32 gradient of the head, gradient of its input.
    loss = (
        2 * element * chunk * model.vocab_size
        + 4 * model.embedding_parameters()
        + 2 * element * tokens * model.hidden_size
    )
    return Memory(weights, gradients, optimizer, _activation_bytes(model, tokens, element), loss)


def _state_bytes(
    config: TrainConfig, model: ModelConfig, world_size: int
) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state (fp32 masters and moments) on one GPU."""
    n = float(model.num_parameters())
    compute = 2.0 if config.precision.compute == "bf16" else 4.0
    master = 0.0 if compute == 4.0 or config.precision.params == "bf16" else 4.0
    moments = 4.0 if config.precision.params == "bf16" else 8.0
    gradient = 2.0 if config.precision.params == "bf16" else 4.0
    if world_size == 1:
        return compute * n, gradient * n, (master + moments) * n
    # Unsharded at the worst moment: two layers (one at work, one prefetched) and the tables.
    tables = n - model.num_layers * model.layer_parameters()
    live = 2 * model.layer_parameters() + tables
    if config.engine.name == "torch":
        if config.engine.strategy == "ddp":
            return compute * n, gradient * n, (master + moments) * n
        shard = n / world_size
        stored = 2.0 if config.precision.params == "bf16" else 4.0
        weights = compute * (live if config.engine.reshard_after_forward else n)
        whole = compute * live if config.engine.reduce_each else gradient * n
        return weights, stored * shard + whole, (stored + moments) * shard
    stage = config.engine.zero_stage
    state = (master + moments) * n / (world_size if stage >= 1 else 1)
    if config.engine.offload_optimizer:
        state = 0.0
    weights = compute * (n / world_size + live if stage == 3 else n)
    gradients = gradient * n / (world_size if stage >= 2 else 1)
    return weights, gradients, state


def _activation_bytes(model: ModelConfig, tokens: int, element: int) -> float:
    h, q, k, f = model.hidden_size, model.q_size, model.kv_size, model.ffn_hidden_size
    lse = 4 * model.num_heads
    full = element * (4 * h + 2 * q + 2 * k + 3 * f) + lse
    kept = {"none": full, "selective": element * (h + q) + lse, "full": element * h}
    per_token = model.num_layers * kept[model.activation_checkpointing]
    if model.activation_checkpointing != "none":
        per_token += full
    return float(tokens * per_token)


def plan_world(config: TrainConfig, launched: int) -> int:
    """GPUs to plan for: those of the launcher, else those that the recipe was tuned for."""
    return launched if launched > 1 else max(1, config.run.gpus)


def describe(config: TrainConfig, world_size: int) -> str:
    """The text of `dryrun=true`: resolved config, parameters, FLOPs, batch arithmetic, memory."""
    return "\n".join([resolved_yaml(config), "", summary(config, world_size)])


def resolved_yaml(config: TrainConfig) -> str:
    """Every key of the schema with the value that it has in this run."""
    return OmegaConf.to_yaml(OmegaConf.create(config.to_dict())).rstrip()


def summary(config: TrainConfig, world_size: int) -> str:
    """A few lines of arithmetic about the run."""
    model, data = config.model_config(), config.data
    accum, context = config.grad_accum(world_size), config.context_ranks(world_size)
    shared = ""
    if context > 1:
        shared = f" / {context} that share each ({config.context_method(context)})"
    step_tokens = config.tokens_per_step()
    one = step_flops(model, data.seq_len, float(data.seq_len) ** 2, data.seq_len)
    per_token = one.causal / data.seq_len
    attention = per_token - 6.0 * model.matmul_parameters()
    peak = peak_of(_REFERENCE_GPU)
    assert peak is not None
    ideal = one.causal / data.seq_len * step_tokens / world_size / peak.bf16
    memory = memory_estimate(config, world_size)
    gib = {name: value / GIB for name, value in vars(memory).items()}
    plural = "GPU" if world_size == 1 else "GPUs"
    return "\n".join(
        [
            f"run         {config.run_name()}: {config.description}",
            f"parameters  {model.num_parameters():,} "
            f"({model.layer_parameters():,} a layer x {model.num_layers}; "
            f"{model.matmul_parameters():,} in matrix products)",
            f"FLOPs/token {per_token:.4g} forward + backward, documents of {data.seq_len} tokens "
            f"({attention / per_token:.1%} in causal attention); "
            f"PaLM's convention {one.palm / data.seq_len:.4g}",
            f"batch       {data.micro_batch} sequences x {world_size} {plural}{shared} "
            f"x {accum} accumulation = {data.global_batch} sequences = "
            f"{step_tokens:,} tokens a step",
            f"length      {config.run.steps:,} steps = {config.run.steps * step_tokens:,} tokens, "
            f"{per_token * step_tokens * config.run.steps:.3g} FLOPs",
            f"speed limit {ideal:.3g} s a step at the full bf16 peak of {world_size} x {peak.gpu}",
            f"memory      {memory.total / GIB:.1f} GiB a GPU (estimate): "
            + ", ".join(f"{name} {value:.1f}" for name, value in gib.items()),
            f"writes to   {config.run_dir()}",
        ]
    )
