"""Compiles the kernels for sm_90 without a GPU and prints what the machine code uses, one JSON object per kernel.

Run as a program: the tests' process has the kernels in interpreter form.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.moba import triton_combine, triton_dkv, triton_dq, triton_merge, triton_routed, triton_union_dq
from model.moba import triton_common as common
from model.moba import triton_gate as gate
from model.moba import triton_union as union
from model.moba import triton_union_backward as union_backward

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HALF = {"q", "dout", "k", "v", "part", "out", "dq", "dk", "dv", "high", "low"}
FLOAT = {"piece", "scale_log2", "softmax_scale"}


def _type(name: str, half_rows: dict[str, int], dim: int) -> str:
    """Triton's type of an argument, by its name."""
    stem = name.removesuffix("_ptr").removesuffix("_desc")
    if name.endswith("_desc"):
        if stem in HALF:
            return f"tensordesc<bf16[{half_rows[stem]}, {dim}]>"
        return f"tensordesc<{'i32' if stem == 'word' else 'fp32'}[{half_rows['rows']}]>"
    if name.endswith("_ptr"):
        float_like = stem in FLOAT or "lse" in stem or "delta" in stem
        return "*bf16" if stem in HALF else "*fp32" if float_like else "*i32"
    return "fp32" if stem in FLOAT else "i32"


def examine(label: str, kernel: Any, constants: dict[str, Any], tile: common.Tile, dim: int) -> dict[str, Any]:
    rows = {"q": tile.rows, "dout": tile.rows, "rows": tile.rows}
    rows |= dict.fromkeys(("k", "v", "high", "low"), tile.keys)
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {n: "constexpr" if n in constants else _type(n, rows, dim) for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n == "block_size"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=HOPPER, options=tile.options)
    return {"kernel": label, "warps": tile.warps, **used(binary)[0]}


def used(binary: Any) -> tuple[dict[str, Any], str]:
    """What a compiled kernel uses, and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([str(CUOBJDUMP), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": binary.metadata.shared,
        "hopper_mma": code.count("HGMMA"),
        "old_mma": len(re.findall(r"[^G]HMMA", code)),
        "loop_spills": _loop_spills(code),
        "serial": code.count("WARPGROUP.DEPBAR") >= code.count("HGMMA"),
        "float_atomics": len(re.findall(r"\b(?:RED|ATOM|ATOMG)\.\S*(?:F32|F16|BF16)", code)),
    }, code


def _loop_spills(code: str) -> int:
    """Loads and stores of spilled registers in the innermost loops around matrix instructions; the most of any."""
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    loops = []
    for at, text in lines:
        back = re.search(r"\bBRA(?:\.\S+)?\s.*?(0x[0-9a-f]+)", text)
        if back is not None and int(back[1], 16) < at:
            body = [t for a, t in lines if int(back[1], 16) <= a <= at]
            # code behind the program's end jumps back where a wait had to be repeated: no loop of ours
            if any("HGMMA" in t for t in body) and not any("EXIT" in t for t in body):
                loops.append((int(back[1], 16), at, sum(bool(re.search(r"\b(?:LDL|STL)", t)) for t in body)))
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return max((spills for *_, spills in inner), default=0)


def _dkv(tile: common.Tile, dim: int, fused: bool, pointers: bool = False) -> dict[str, Any]:
    return {"G": 4, "ROWS": tile.rows, "KEYS": tile.keys, "D": dim, "ROUTED": True, "FUSED": fused, "SPLIT": True,
            "EVEN": True, "POINTERS": pointers, "STAGES": tile.stages}  # fmt: skip


def jobs(dim: int, block_size: int) -> list[tuple[str, Any, dict[str, Any], common.Tile]]:
    tiles = common.tiles_for(dim, block_size, 256)
    shape = {"D": dim}

    def pairs(tile: common.Tile) -> dict[str, Any]:
        return {"ROWS": tile.rows, "KEYS": tile.keys, "EVEN": True, **shape}

    def tokens(tile: common.Tile) -> dict[str, Any]:
        return {"G": 4, "ROWS": tile.rows, "KEYS": tile.keys, **shape}

    slots = {"SLOTS": common.slot_bits(7), "AHEAD": tiles.ahead}
    own = {"SPLIT": tiles.combine_split, "STAGES": tiles.combine.stages}
    merged = {"SPLIT": tiles.merge_split, "STAGES": tiles.merge.stages}

    routed = triton_routed._stationary_kernel if tiles.stationary else triton_routed._routed_kernel
    dq = triton_dq._stationary_dq_kernel if tiles.stationary_dq else triton_dq._dq_kernel
    found = [
        ("routed", routed, pairs(tiles.routed), tiles.routed),
        ("combine", triton_combine._combine_kernel, {**tokens(tiles.combine), **slots, **own}, tiles.combine),
        ("dq", dq, pairs(tiles.dq), tiles.dq),
        ("merge", triton_merge._merge_kernel, {**tokens(tiles.merge), **slots, **merged}, tiles.merge),
        ("dkv", triton_dkv._dkv_kernel, _dkv(tiles.dkv, dim, False), tiles.dkv),
    ]
    if tiles.fused is not None:
        found.append(
            ("fused", triton_dkv._dkv_kernel, _dkv(tiles.fused, dim, True, tiles.fused_pointers), tiles.fused)
        )
    if block_size == 512:
        means = {"G": 4, "GROUP": 4, "TOKENS": 16, "COLS": tiles.gate.keys, "SLOTS": 8, "LOW": True, **shape}
        found.append(("gate", gate._gate_kernel, means, tiles.gate))
        tile = union.tiles_for(dim, block_size)
        found.append(("union", union._union_kernel, {**pairs(tile.forward), "G": 4}, tile.forward))
        found.append(("union_dq", triton_union_dq._union_dq_kernel, {**pairs(tile.dq), "G": 4}, tile.dq))
        keys = {**tokens(tile.dkv), "STAGES": tile.dkv.stages}
        found.append(("union_dkv", union_backward._union_dkv_kernel, keys, tile.dkv))
    return [(f"{name} {dim} {block_size}", kernel, constants, tile) for name, kernel, constants, tile in found]


if __name__ == "__main__":
    for dim, block_size in ((128, 128), (128, 512), (64, 512)):
        for label, kernel, constants, tile in jobs(dim, block_size):
            print(json.dumps(examine(label, kernel, constants, tile, dim)), flush=True)
