"""Compiles the warp-specialised kernels for sm_90 without a GPU and prints what the machine code uses as JSON.

Run as a program: the tests' process has Triton in interpreter form.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import triton
from triton.experimental.gluon._runtime import GluonASTSource

from model.moba import gluon_combine, gluon_common, gluon_dkv, gluon_dq, gluon_fused, gluon_merge, gluon_routed
from tests.model.moba.compile_kernels import FLOAT, HALF, HOPPER, used


def _type(name: str, rows: int, dim: int) -> str:
    """Triton's type of an argument, by its name."""
    stem = name.removesuffix("_ptr").removesuffix("_desc")
    if name.endswith("_desc"):
        rows = gluon_common.HALF_ROWS if stem in ("q", "dout", "out", "dq") else rows  # of queries: one consumer's
        return f"tensordesc<bf16[{rows}, {dim}],{gluon_common.shared_layout(torch.bfloat16, rows, dim)}>"
    if name.endswith("_ptr"):
        float_like = stem in FLOAT or "lse" in stem or "delta" in stem
        return "*bf16" if stem in HALF else "*fp32" if float_like else "*i32"
    return "fp32" if stem in FLOAT else "i32"


def _overlapped(code: str) -> int:
    """The fewest exponentials between a wait that leaves one matrix product under way and the wait for it."""
    text = " ".join(re.findall(r"\*/\s+(.*?);", code))
    between = re.findall(r"DEPBAR\.LE gsb0, 0x1\b(.*?)DEPBAR\.LE gsb0, 0x0\b", text)
    return min((part.count("MUFU.EX2") for part in between), default=0)


def _exposed(code: str) -> int:
    """The most exponentials between a wait that leaves no matrix product under way and the next wait."""
    text = " ".join(re.findall(r"\*/\s+(.*?);", code))
    after = re.split(r"DEPBAR\.LE gsb0, ", text)[1:]
    return max((part.count("MUFU.EX2") for part in after if part.startswith("0x0")), default=0)


def examine(
    label: str, kernel: Any, constants: dict[str, Any], rows: int, work: gluon_common.Work
) -> dict[str, Any]:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else _type(n, rows, constants["D"]) for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n == "block_size"
    }
    fixed = {(names.index(n),): value for n, value in constants.items()}
    source = GluonASTSource(kernel, signature, fixed, aligned)
    binary = triton.compile(source, target=HOPPER, options={"num_warps": 4, "maxnreg": work.max_registers})
    found, code = used(binary)
    dealt = len(re.findall(r"USETMAXREG\.TRY_ALLOC", code))
    return {"kernel": label, "dealt_registers": dealt, "overlapped": _overlapped(code), "exposed": _exposed(code),
            **found}  # fmt: skip


if __name__ == "__main__":
    keys, half = gluon_routed.WORK.step, gluon_common.HALF_ROWS
    for job in (
        ("routed", gluon_routed._routed_kernel, gluon_routed.constants(128), keys, gluon_routed.WORK),
        ("dq", gluon_dq._dq_kernel, gluon_dq.constants(128), gluon_dq.WORK.step, gluon_dq.WORK),
        ("dkv", gluon_dkv._dkv_kernel, gluon_dkv.constants(128, 4, True), half, gluon_dkv.WORK),
        ("combine", gluon_combine._combine_kernel, gluon_combine.constants(128, 4), keys, gluon_combine.WORK),
        ("merge", gluon_merge._merge_kernel, gluon_merge.constants(128, 4), keys, gluon_merge.WORK),
        *(
            (
                name,
                gluon_fused._fused_kernel,
                gluon_fused.constants(dim, 4, True),
                gluon_fused.rows_per_step(dim),
                gluon_fused.WORK,
            )
            for name, dim in (("fused", 128), ("fused64", 64))
        ),
        ("combine64", gluon_combine._combine_kernel, gluon_combine.constants(64, 4), keys, gluon_combine.WORK),
        ("merge64", gluon_merge._merge_kernel, gluon_merge.constants(64, 4), keys, gluon_merge.WORK),
        ("dkv64", gluon_dkv._dkv_kernel, gluon_dkv.constants(64, 4, True), half, gluon_dkv.WORK),
    ):
        print(json.dumps(examine(*job)), flush=True)
