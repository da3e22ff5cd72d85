"""Compiles the kernels that calls of published shapes would launch, without a GPU, and prints what came out as JSON.

Run as a program, since a process that interprets kernels cannot compile them:

    python tests/kernels/triton/compiling.py --capability 90 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dynaconv.kernels import triton_down, triton_look, triton_staircase, triton_values
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Prefix
from dynaconv.kernels.codes import Codes
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.sketched import Asked, SketchedFFN
from dynaconv.kernels.triton_blocks import run as run_blocks
from dynaconv.kernels.triton_sketched import run
from dynaconv.kernels.weights import FFNWeights

SHAPES = {"8b": (4096, 14336), "1b": (2048, 8192), "small": (1024, 3072), "odd": (1001, 777)}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16",
    torch.int64: "*i64", torch.bool: "*u1", torch.uint8: "*u8",
}  # fmt: skip
LAUNCH = ("num_warps", "num_stages", "maxnreg")


class Recorded:
    """Stands in for a kernel, and keeps the arguments it is launched with."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: object) -> Any:
        return lambda *values, **named: self.launches.append((values, named))


def compiled(kernel: JITFunction, values: tuple[Any, ...], named: dict[str, Any], capability: int) -> Any:
    """The kernel for one launch, with what Triton would have known of its arguments."""
    given = dict(zip(kernel.arg_names, values, strict=False)) | {k: v for k, v in named.items() if k not in LAUNCH}
    assert given.keys() == set(kernel.arg_names), set(kernel.arg_names) ^ given.keys()
    constant = {param.name for param in kernel.params if param.is_constexpr}
    signature, constants, aligned = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = given[name]
        if name in constant or value is None or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
        if tensor or (isinstance(value, int) and value % 16 == 0):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {name: named[name] for name in LAUNCH if name in named}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def described(made: Any, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes, wide loads, and the layouts in which sums are taken."""
    ptx = made.asm["ptx"]
    arch = re.search(r"\.target (\S+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        ptxas = get_ptxas(capability).path
        command = [ptxas, "-v", f"--gpu-name={arch[1].rstrip(',')}", str(path), "-o", str(path) + ".cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", made.asm["ttgir"], re.MULTILINE))
    sums = re.findall(r"\(tensor<(\d+)x(\d+)x(\d+)xf32, (#\w+)>\) -> tensor", made.asm["ttgir"])
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "wide": len(re.findall(r"ld\.global\S*\.v4\.[bu]32|ld\.global\S*\.v2\.[bu]64", ptx)),
        "sums": sorted({(int(columns), layouts[name]) for _, _, columns, name in sums}),
        "shared": made.metadata.shared,
    }


def meta_codes(rows: int, columns: int, bits: int) -> Codes:
    """Codes without values."""
    groups = -(-columns // 32)
    shapes = ((bits, rows, -(-columns // 8)), (rows, groups), (rows, groups))
    parts = [torch.empty(shape, dtype=torch.uint8, device="meta") for shape in shapes]
    return Codes(columns, 32, *parts, torch.empty(rows, 2, dtype=torch.bfloat16, device="meta"))


def meta_sketch(columns: int, neurons: int, dtype: torch.dtype, *, gated: bool, biased: bool) -> SketchedFFN:
    """A network of a published shape, without values."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    gate = empty(neurons, columns) if gated else None
    bias = empty(neurons) if biased else None
    weights = FFNWeights(
        gate, empty(neurons, columns), empty(neurons, columns).t(), torch.nn.functional.silu,
        bias if gated else None, bias, empty(columns) if biased else None,
    )  # fmt: skip
    gate_codes = meta_codes(neurons, columns, 4) if gated else None
    sizes = empty(neurons, of=torch.float32)
    activation, rounding = ("relu", empty(2, of=torch.float32)) if biased else ("silu", None)
    codes = meta_codes(neurons, columns, 4), meta_codes(neurons, columns, 4)
    return SketchedFFN(weights, gate_codes, *codes, sizes, sizes, 0.5, 2, 3, activation, rounding)


MODULES = (triton_look, triton_values, triton_down, triton_staircase)
Launch = tuple[str, JITFunction, tuple[Any, ...], dict[str, Any]]


def record(launch: Any) -> list[Launch]:
    """Name, kernel and arguments of everything that ``launch()`` launches."""
    kernels = {(m, n): k for m in MODULES for n, k in vars(m).items() if n.endswith("_kernel")}
    recorded = {place: Recorded(kernel) for place, kernel in kernels.items()}
    try:
        for (module, name), stand_in in recorded.items():
            setattr(module, name, stand_in)
        launch()
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)
    names = {place: f"{place[0].__name__.rpartition('_')[2]}.{place[1]}" for place in kernels}
    return [(names[place], one.kernel, *launch) for place, one in recorded.items() for launch in one.launches]


def launches(shape: str, dtype: torch.dtype, count: int) -> dict[str, list[Launch]]:
    """By case, what calls for ``count`` tokens launch; the odd shape has no gate, but biases and ReLU."""
    columns, neurons = SHAPES[shape]
    odd = shape == "odd"
    ffn = meta_sketch(columns, neurons, dtype, gated=not odd, biased=odd)
    level, mean, base = (torch.empty(size, device="meta") for size in (count, neurons, columns))
    x = torch.empty(count, columns, dtype=dtype, device="meta")
    blocks = BlockedFFN(ffn.weights, Partition.equal(neurons, neurons // 8))
    first = Prefix(torch.empty(count, dtype=torch.int64, device="meta"))
    found = {"nested": record(lambda: run_blocks(blocks, x, first))}
    if count <= 16:
        found["exact"] = record(lambda: run(ffn, x, Asked(level)))
        found["low"] = record(lambda: run(ffn, x, Asked(level, level, mean, base)))
    return found


def main() -> None:
    """Prints one object: by kernel and case, what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="+", default=["8b"], choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 2048])
    asked = parser.parse_args()
    found = {}
    for shape in asked.shapes:
        for count in asked.tokens:
            for case, launched in launches(shape, getattr(torch, asked.dtype), count).items():
                for name, kernel, values, named in launched:
                    made = compiled(kernel, values, named, asked.capability)
                    found[f"{name} {shape} {count} {case}"] = described(made, asked.capability)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
