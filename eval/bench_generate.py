"""`moba bench generate`: prefill and decode by the length of the prompt, MoBA beside full attention.

A model with random weights answers one prompt of random tokens through the engine of `moba eval`. Both ways run
the same chunks. Attention is also timed alone, one layer with random normal q, k and v through all chunks, after
sampled queries were found right. Prompts longer than `full_up_to` prefill with MoBA only; full attention's time is
then MoBA's with the attention of all layers exchanged, a sum of two measurements, and marked so. The same sum is
given for the lengths where both were measured.

Decoding, with full attention and with MoBA, is measured on a cache of random keys and values: a whole step, one by
one and as a captured graph, and the attention of all layers alone, with the bytes that full attention must read
over the GPU's bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from conf.gpus import gpu_of_device
from conf.schema import GenerateBenchConfig
from eval.bench.environment import environment
from eval.bench_generate_check import check_queries, compare
from eval.load import pick_device
from eval.stopwatch import SHORT, once, random_model, replayed, seconds
from model.cache import KVCache
from model.decode import decode_attention, part_attention
from model.decode_graph import Decoder, capturable
from model.full import full_attention
from model.moba import moba_attention
from model.moba.api import BLOCK_MULTIPLE
from model.schedule import FULL, LayerPlan
from model.shapes import head_dim

Row = dict[str, Any]
STEPS = 12  # decode steps there is room for


def check_config(config: GenerateBenchConfig) -> None:
    """Raises UserError for what cannot be measured."""
    if not config.lengths or min(config.lengths) < 2:
        raise UserError(
            f"lengths={list(config.lengths)}: give at least one prompt length, each of 2 tokens or more"
        )
    if config.block_size % BLOCK_MULTIPLE:
        raise UserError(f"block_size={config.block_size} is not a multiple of {BLOCK_MULTIPLE}")


def measure(config: GenerateBenchConfig, say: Callable[[Row], None]) -> dict[str, Any]:
    """All lengths in rising order; `say` hears of each row.

    Returns:
        Environment, settings and rows, as the JSON file holds them. Times in seconds, milliseconds (`_ms`) or
        microseconds (`_us`).

    Raises:
        UserError: settings that make no sense.
        CheckFailed: wrong results; nothing more is measured.
    """
    check_config(config)
    place = pick_device("auto")
    name = torch.cuda.get_device_name() if place.type == "cuda" else "cpu"
    bench = _Bench(config, place)
    lengths = sorted(set(config.lengths))
    bench.warm_up(max(lengths))
    rows = []
    for length in lengths:
        row = {"length": length, **bench.prefill(length)}
        row |= bench.decode(length) if length <= config.decode_up_to else {}
        rows.append(row)
        say(row)
    settings = {k: getattr(config, k) for k in ("block_size", "topk", "chunk", "full_up_to", "rows")}
    dtype = str(bench.dtype).removeprefix("torch.")
    model = {**asdict(config.model), "head_dim": head_dim(config.model), "dtype": dtype}
    card = gpu_of_device(name)
    return {
        "benchmark": "generate",
        **environment(name),
        "bandwidth_bytes_per_s": card.bandwidth if card else None,
        "model": model,
        **settings,
        "rows": rows,
    }


class _Bench:
    """A model with random weights, and what is measured on it."""

    def __init__(self, config: GenerateBenchConfig, place: torch.device) -> None:
        self.config, self.place = config, place
        self.dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        self.layers = config.model.num_layers
        self.plans = {"moba": LayerPlan("moba", config.block_size, config.topk), "full": FULL}
        self.model = random_model(config.model, place, self.dtype)

    def warm_up(self, longest: int) -> None:
        """Compile every kernel: a whole prompt, and one in parts whose last part has more blocks than topk."""
        config = self.config
        for length in {min(longest, config.block_size), min(longest, config.chunk + 4 * config.block_size)}:
            for plan in self.plans.values():
                self._prefill_once(length, plan)
                self._attention(length, plan)
        self.decode(min(longest, config.block_size))

    def prefill(self, length: int) -> Row:
        """Time of the whole prompt, its attention in all layers, and peak memory."""
        row: Row = {}
        for name, plan in self.plans.items():
            layer, row[f"{name}_error"] = self._attention(length, plan)
            row[f"{name}_layer_attention_s"] = layer
            row[f"{name}_attention_s"] = layer * self.layers
            if name == "moba" or length <= self.config.full_up_to:
                self._reset_peak()
                row[f"{name}_prefill_s"] = seconds(partial(self._prefill_once, length, plan))
                row[f"{name}_peak_bytes"] = self._peak()
        row["full_prefill_sum_s"] = row["moba_prefill_s"] - row["moba_attention_s"] + row["full_attention_s"]
        row["speedup"] = row.get("full_prefill_s", row["full_prefill_sum_s"]) / row["moba_prefill_s"]
        row["speedup_is_of_sum"] = "full_prefill_s" not in row
        return row

    def _prefill_once(self, length: int, plan: LayerPlan) -> float:
        """Seconds of one prefill; the cache is allocated before."""
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.model.vocab_size, (1, length), generator=g).to(self.place)
        cache = KVCache(self.config.model, [length], 1, dtype=self.dtype, device=self.place)
        return once(lambda: self.model.prefill(ids, cache, (plan,) * self.layers, self.config.chunk), self.place)

    def _attention(self, length: int, plan: LayerPlan) -> tuple[float, float]:
        """Seconds of one layer's attention over all parts of a prompt, after the last was checked; the error."""
        cache = self._filled([length], 0, layers=1)
        parts = list(cache.parts(self.config.chunk))
        error = None
        runs: list[float] = []
        while not runs or (len(runs) < 3 and sum(runs) < SHORT):
            total = 0.0
            for part in reversed(parts):  # the last part first: checked before anything is timed
                first, end = part[0][1:]
                q = self._normal(end - first, self.config.model.num_heads, seed=first)
                cache.part = part if len(parts) > 1 else []
                if error is None:
                    keys, values = cache.keys[0][0, :end], cache.values[0][0, :end]
                    what = f"{plan.kind} prefill of {length} tokens"
                    error = check_queries(what, q, keys, values, self._attend(q, cache, plan), plan)
                total += once(partial(self._attend, q, cache, plan), self.place)
            runs.append(total)
        return sorted(runs)[len(runs) // 2], error or 0.0

    def _attend(self, q: Tensor, cache: KVCache, plan: LayerPlan) -> Tensor:
        """As `model.attention.Attention` does in prefill."""
        if cache.part:
            return part_attention(q, cache, 0, plan)
        end = cache.lengths[0]
        k, v = cache.keys[0][0, :end], cache.values[0][0, :end]
        if plan.kind == "moba":
            return moba_attention(q, k, v, block_size=plan.block_size, topk=plan.topk)
        border = torch.tensor([0, end], dtype=torch.int32, device=q.device)
        return full_attention(q, k, v, cu_seqlens=border, max_seqlen=end)

    def decode(self, length: int) -> Row:
        """Milliseconds of a step, microseconds of one layer's attention, its share of the memory's bandwidth."""
        shape, rows = self.config.model, self.config.rows
        cache = self._filled([length] * rows, STEPS)
        cache.end_prefill()
        size = 2 * rows * (length + 1) * shape.num_kv_heads * head_dim(shape) * self.dtype.itemsize
        row: Row = {"decode_attention_bytes": size}
        for name, plan in self.plans.items():
            time, error = self._decode_attention(cache, plan)
            row |= {f"decode_{name}_attention_us": time * 1e6, f"decode_{name}_error": error}
        speed = row["decode_bytes_per_s"] = size / row["decode_full_attention_us"] * 1e6
        card = gpu_of_device(torch.cuda.get_device_name()) if self.place.type == "cuda" else None
        if card is not None:
            row["decode_bandwidth_share"] = speed / card.bandwidth
        return row | self._steps(length)

    @torch.no_grad()
    def _decode_attention(self, cache: KVCache, plan: LayerPlan) -> tuple[float, float]:
        """Seconds of one layer's attention, after the last row's was checked in the first; the error."""
        rows = self.config.rows
        q = [self._normal(rows, self.config.model.num_heads, seed=layer) for layer in range(self.layers)]
        out, end = decode_attention(q[0], cache, 0, plan), cache.lengths[-1] + 1
        keys, values = cache.keys[0][-1, :end], cache.values[0][-1, :end]
        error = check_queries(f"{plan.kind} decode", q[0][-1:], keys, values, out[-1:], plan)
        time = replayed(lambda: [decode_attention(q[i], cache, i, plan) for i in range(len(q))], self.place)
        return time / self.layers, error

    def _steps(self, length: int) -> Row:
        """Milliseconds of whole steps with full attention and with MoBA, one by one and captured."""
        token = torch.zeros((self.config.rows, 1), dtype=torch.int64, device=self.place)
        found, logits = {}, {}
        graphs = capturable(self.model, (FULL,) * self.layers)
        ways = [(name, plan, 0) for name, plan in self.plans.items()]
        ways += [(f"{name}_graph", plan, STEPS) for name, plan, _ in ways if graphs]
        for name, plan, steps in ways:
            cache = self._filled([length] * self.config.rows, STEPS)
            cache.end_prefill()
            decoder = Decoder(self.model, cache, (plan,) * self.layers, steps)
            for _ in range(3):
                logits[name] = decoder(token).clone()
            times = sorted(once(partial(decoder, token), self.place) for _ in range(STEPS - 3))
            found[f"decode_{name}_ms"] = times[len(times) // 2] * 1e3
        for name in self.plans if graphs else ():
            plain = logits[name]
            compare(f"a captured step, {name},", logits[f"{name}_graph"], plain, plain)
        return found

    def _filled(self, lengths: Sequence[int], room: int, layers: int = 0) -> KVCache:
        """A cache of random normal keys and values, all of its capacity."""
        shape = replace(self.config.model, num_layers=layers or self.layers)
        cache = KVCache(shape, lengths, room, dtype=self.dtype, device=self.place)
        g = torch.Generator(self.place).manual_seed(1)
        for x in (*cache.keys, *cache.values):
            x.normal_(generator=g)
        return cache

    def _normal(self, tokens: int, heads: int, seed: int) -> Tensor:
        g = torch.Generator(self.place).manual_seed(seed)
        shape = (tokens, heads, head_dim(self.config.model))
        return torch.randn(shape, generator=g, dtype=self.dtype, device=self.place)

    def _reset_peak(self) -> None:
        if self.place.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.place.type == "cuda" else None
