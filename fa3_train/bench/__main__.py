"""``python -m fa3_train.bench <what>``: dispatch to one module per benchmark.

A benchmark is a module with ``add_arguments(parser)`` and ``main(args) -> int``; only the one that
is asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

SUBCOMMANDS = {
    "attention": ("fa3_train.bench.attention", "forward and backward beside their peers"),
    "preprocess": ("fa3_train.bench.preprocess", "fused RoPE, Hadamard and quantization"),
    "error": ("fa3_train.bench.error", "numerical error on outlier data and long contexts"),
    "loop": ("fa3_train.bench.loop", "training loop beside a bare PyTorch loop"),
    "trainer": ("fa3_train.bench.trainer", "whole training runs: engines x linears"),
    "curves": ("fa3_train.bench.curves", "training curves: attentions, precisions, a kill"),
    "perplexity": ("fa3_train.bench.fp8_variants", "a BF16 model under every FP8 variant"),
    "memcheck": ("fa3_train.bench.memcheck", "every kernel under compute-sanitizer"),
    "scale": ("fa3_train.bench.scale", "1, 2, 4, 8 GPUs: throughput and exposed communication"),
    "kills": ("fa3_train.bench.kills", "kill -9 at random moments, resume, compare"),
    "layer": ("fa3_train.bench.layer", "a transformer layer beside TransformerEngine's"),
    "e2e": ("fa3_train.bench.e2e", "training steps by attention: four loops, 8k to 128k"),
    "profile": ("fa3_train.bench.profile", "where each millisecond of a training step goes"),
    "head": ("fa3_train.bench.head", "output head and loss: time and memory of the chunks"),
    "swap": ("fa3_train.bench.swap", "a framework's step time before and after the swap"),
    "samples": ("fa3_train.bench.samples", "torch's own test samples of SDPA on our function"),
    "logging": ("fa3_train.bench.logging_cost", "what watching a run costs"),
    "readme": ("fa3_train.bench.readme", "tables of the documents from the result files"),
    "plot": ("fa3_train.bench.plot", "draw a result file again, on any machine"),
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m fa3_train.bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="what")
    asked = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module_name, text) in SUBCOMMANDS.items():
        sub = commands.add_parser(name, help=text)
        if name == asked:
            module = importlib.import_module(module_name)
            sub.description = module.__doc__
            sub.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(sub)
            sub.set_defaults(main=module.main)
    args = parser.parse_args(arguments)
    args.command = "python -m fa3_train.bench " + shlex.join(arguments)
    return int(args.main(args) or 0)


if __name__ == "__main__":
    sys.exit(main())
