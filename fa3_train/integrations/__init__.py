"""Plug points for training code that exists already, one file per framework.

    flash_attn           functions with FA2's and FA3's signatures; install() under their names
    hf                   register() as attn_implementation="fa3_train"
    transformer_engine   DotProductAttention and patch(model)
    megatron             core attention and a layer-spec helper
    torchtitan           inner-attention module and converter, ops for selective recomputation
    deepspeed            Ulysses around our core
    sdpa                 sdpa_replacement() for F.scaled_dot_product_attention
    torch_flash          one of torch's own flash-attention implementations
    context_parallel     one sequence over several ranks: ring, gather; ulysses: by exchanging heads

Each file has ``supports(**arguments) -> str | None``: the reason why a request is not served, or
None. What happens then is the caller's choice, see :mod:`fa3_train.integrations.policy`. Nothing is
imported here: a framework is loaded when its own file is.
"""
