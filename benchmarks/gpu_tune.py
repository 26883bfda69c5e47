"""What `minitune tune` measures, at the shapes of Llama-2-7B: the table by which the later parts choose their ways.

``python -m benchmarks.gpu_tune --device cuda`` prints a row of JSON a shape and writes the table where MINITUNE_TUNED
says (or into the user's cache), as the command does; it needs neither a checkpoint nor tyro.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu_timing import emit
from benchmarks.shapes import RANK, SEED, SEVEN_B, TINY
from minitune.ops import tuned, tuning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    device = torch.device(parser.parse_args().device)
    real = device.type == "cuda"
    torch.manual_seed(SEED)
    # The longer micro-batch last: of attention a table knows the longest document, not the tokens.
    size, longest, batches, long = (SEVEN_B, 2048, (2048, 16_384), 16_384) if real else (TINY, 32, (32, 64), 64)
    adapters = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    products = {name: (outer, inner, RANK * adapters[name]) for name, inner, outer in size.products()}
    heads = size.heads, size.kv_heads, size.head_dim
    tables = [tuning.measure(products, ("qkv", "gate_up"), heads, tokens, longest, torch.bfloat16, device)
              for tokens in batches]
    tables.append(tuning.attention_table(heads, long, long, torch.bfloat16, device))
    for found in tables:
        if real:
            name = torch.cuda.get_device_name(device)
            tuned.write(tuned.place(name), name, found)
        for op, shape, way, ms in tuning.shapes(found):
            emit(what="tuned", op=op, shape=list(shape), way=way, ms=ms)
    emit(what="end")


if __name__ == "__main__":
    main()
