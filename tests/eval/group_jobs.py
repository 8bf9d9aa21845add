"""What the gloo workers of the group tests do, and the same in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.compose import compose
from conf.paths import RunPaths
from conf.schema import ModelConfig, RopeConfig
from eval import prefixes
from eval.generate import generate
from eval.group import Group, group_execution, serve
from eval.run import follow, run
from model.execution import PLAIN, Execution
from model.schedule import FULL, LayerPlan
from model.sequence_parallel import SequenceParallel
from model.transformer import CausalLM

VOCAB = 61
MOBA = (LayerPlan("moba", 16, 2), LayerPlan("moba", 16, 3))
LENGTHS = (1, 75, 16, 50)
CASES: dict[str, dict[str, Any]] = {
    "at once": {"prefill_plans": MOBA, "decode_plans": (FULL,) * 2},
    "in parts": {"prefill_plans": MOBA, "decode_plans": (FULL,) * 2, "chunk": 37},
    "moba decode": {"prefill_plans": (FULL,) * 2, "decode_plans": MOBA, "chunk": 64},
}


def model_of(num_kv_heads: int, execution: Execution = PLAIN) -> CausalLM:
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=num_kv_heads, init_std=0.4, qk_norm=True,
    )  # fmt: skip
    model = CausalLM(config, RopeConfig(), execution=execution)
    model.init_weights(torch.Generator().manual_seed(3))
    return model.to(device_of(execution)).eval().requires_grad_(False)


def device_of(execution: Execution) -> torch.device:
    """Its own GPU for a process of an NCCL group, else the CPU."""
    parallel = execution.parallel
    on_gpu = parallel is not None and dist.get_backend(parallel.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in LENGTHS]


def alike() -> list[list[list[int]]]:
    """Batches of prompts that begin alike, also with the batch before."""
    haystack = torch.randint(0, VOCAB, (150,), generator=torch.Generator().manual_seed(9)).tolist()
    return [[[*haystack[:140], 1, 2], [*haystack[:140], 3]], [[*haystack[:110], 4], [*haystack[:110], 5, 6, 7]]]


def batch() -> dict[str, Any]:
    """A row of two documents that every cut of the row straddles."""
    ids = torch.randint(0, VOCAB, (1, 96), generator=torch.Generator().manual_seed(8))
    positions = torch.cat([torch.arange(70), torch.arange(26)])[None]
    borders = torch.tensor([0, 70, 96], dtype=torch.int32)
    return {
        "input_ids": ids, "labels": ids.roll(-1, 1), "positions": positions, "cu_seqlens": borders,
        "max_seqlen": 70,
    }  # fmt: skip


def first_done(new: list[int]) -> bool:
    """A way to end that only the first process knows."""
    return len(new) >= 4


def alone(num_kv_heads: int) -> dict[str, Any]:
    model = model_of(num_kv_heads)
    found: dict[str, Any] = {
        name: generate(model, prompts(), max_new_tokens=10, eos_id=None, **case) for name, case in CASES.items()
    }
    found["ended"] = generate(
        model, prompts(), max_new_tokens=10, eos_id=None, ended=first_done, **CASES["at once"]
    )
    kinds: dict[str, Any] = {"max_new_tokens": 6, "eos_id": None, **CASES["in parts"]}
    found["shared"] = [generate(model, some, **kinds) for some in alike()]
    with torch.no_grad():
        found["losses"] = model.token_losses(**batch(), plans=MOBA)
    return found


def together(num_kv_heads: int, size: int) -> dict[str, Any] | None:
    """The first `size` processes; the result of the first."""
    group = dist.new_group(list(range(size)))
    if dist.get_rank() >= size:
        return None
    assert isinstance(group, dist.ProcessGroup)
    execution = Execution(parallel=SequenceParallel(group))
    model, device = model_of(num_kv_heads, execution), device_of(execution)
    if dist.get_rank():
        room = prefixes._room
        if size == 2:  # this rank is short of memory: then no rank keeps a prefix
            prefixes._room = lambda device: 0.0
        serve(model)
        prefixes._room = room
        return None
    lead = Group(model)
    found: dict[str, Any] = {
        name: lead.generate(prompts(), max_new_tokens=10, eos_id=None, **case) for name, case in CASES.items()
    }
    found["ended"] = lead.generate(prompts(), max_new_tokens=10, eos_id=None, ended=first_done, **CASES["at once"])
    kinds: dict[str, Any] = {"max_new_tokens": 6, "eos_id": None, "share": "x", **CASES["in parts"]}
    found["shared"] = [lead.generate(some, **kinds) for some in alike()]
    assert (lead.prefixes.stored is None) == (size == 2)
    rows = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch().items()}
    found["losses"] = lead.token_losses(**rows, plans=MOBA).cpu()
    lead.stop()
    return found


def evaluate(overrides: list[str], out: str) -> dict[str, Any]:
    """`moba eval` as a worker runs it, all processes; the files the first one wrote."""
    config = compose("eval", [*overrides, f"out={out}", f"sequence_parallel={dist.get_world_size()}"])
    if dist.get_rank():
        follow(config, group_execution())
        return {}
    run(config, group_execution())
    return results_of(out)


def results_of(out: str) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RunPaths(Path(out)).eval.glob("*.json"))}
