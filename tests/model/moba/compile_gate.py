"""Compiles the specialised gate for sm_90 without a GPU and prints what the machine code uses, as JSON.

Run as a program: the tests' process has Triton in interpreter form.
"""

from __future__ import annotations

import json
import re

import torch
import triton
from triton.experimental.gluon._runtime import GluonASTSource

from model.moba import gluon_common, gluon_gate
from tests.model.moba.compile_kernels import HOPPER, used


def examine(head_dim: int, num_past: int, num_blocks: int) -> dict[str, int]:
    kernel, constants = gluon_gate._gate_kernel, gluon_gate.constants(head_dim, 4, num_past, num_blocks)
    layout = gluon_common.shared_layout(torch.bfloat16, gluon_gate.COLS, head_dim)

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            return f"tensordesc<bf16[{gluon_gate.COLS}, {head_dim}],{layout}>"
        return "*bf16" if name == "q_ptr" else "*i32" if name.endswith("_ptr") else "i32"

    names = kernel.arg_names
    fixed = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = GluonASTSource(kernel, {name: type_of(name) for name in names}, fixed, aligned)
    options = {"num_warps": 4, "maxnreg": gluon_gate.SHAPE.max_registers}
    found, code = used(triton.compile(source, target=HOPPER, options=options))
    return {**found, "depth": constants["DEPTH"], **_sorting(code)}


def _sorting(code: str) -> dict[str, int]:
    """Instructions of the innermost loop around matrix instructions that has the fewest: steps without a mask."""
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    loops = []
    for at, text in lines:
        back = re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
        body = [t for a, t in lines if back is not None and int(back[1], 16) <= a <= at]
        if any("HGMMA" in t for t in body):
            loops.append(body)
    least = min(loops, key=len)
    return {"compared": sum("FMNMX" in t for t in least), "packed": sum("LOP3" in t for t in least)}


if __name__ == "__main__":
    for shape in ((128, 7, 257), (128, 7, 8193), (64, 2, 300)):
        print(json.dumps(examine(*shape)), flush=True)
