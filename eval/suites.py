"""The suites of `moba eval`: each takes a loaded model and returns plain JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from conf.schema import EvalConfig
from data.loader import heldout_batches, long_documents
from data.store import TokenStore
from eval import tables
from eval.gate import LayerGate, gate_statistics
from eval.gate_grid import gate_grid
from eval.load import Loaded
from eval.loss import MEAN, sum_losses
from eval.powerlaw import fit_power_law
from model.schedule import LayerPlan, describe
from model.shapes import num_parameters

Plans = dict[str, tuple[LayerPlan, ...]]
BATCH_TOKENS = 8192  # of a forward pass over short rows


@dataclass(frozen=True)
class Evaluation:
    """What all suites share."""

    config: EvalConfig
    loaded: Loaded
    plans: Plans
    store: TokenStore | None
    seq_len: int

    @property
    def about(self) -> dict[str, Any]:
        """The checkpoint, for the JSON files and the report."""
        source = self.loaded.source
        shape = source.config
        rope = {k: v for k, v in asdict(source.rope).items() if k in ("kind", "theta", "factor")}
        return {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "step": source.step,
            "tokens": source.tokens,
            "stage": source.stage,
            "seq_len": source.seq_len,
            "parameters": num_parameters(shape),
            "summary": {
                "model": f"{shape.family}, {shape.num_layers} layers, hidden size {shape.hidden_size}, "
                f"{shape.num_heads} heads on {shape.num_kv_heads}",
                "vocabulary": f"{shape.vocab_size:,}",
                "rope": ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{v}" for k, v in rope.items()),
                "weights": str(next(self.loaded.model.parameters()).dtype).removeprefix("torch."),
                **{f"attention_{name}": describe(plans) for name, plans in self.plans.items()},
            },
        }


def loss_suite(e: Evaluation) -> dict[str, Any]:
    """Held-out, trailing and position-wise loss of every plan, and the paired difference."""
    assert e.store is not None
    settings, seq_len = e.config.loss, e.seq_len
    bucket, trailing = settings.bucket or max(1, seq_len // 16), settings.trailing or max(1, seq_len // 16)
    kinds: dict[str, Any] = {
        "bucket": bucket,
        "trailing": trailing,
        "seq_len": seq_len,
        "spacing": settings.spacing,
    }
    with tables.progress() as report:
        packed = heldout_batches(e.store, seq_len, settings.tokens, max(1, BATCH_TOKENS // seq_len))
        held = sum_losses(
            e.loaded.losses,
            report("held-out loss", packed, settings.tokens // seq_len),
            e.plans,
            device=e.loaded.device,
            **kinds,
        )
        whole = long_documents(e.store, seq_len, settings.tokens)
        sums = sum_losses(
            e.loaded.losses,
            report("loss by position", whole, settings.tokens // seq_len),
            e.plans,
            device=e.loaded.device,
            **kinds,
        )
    reports = {}
    for name, line in sums.items():
        line.table[MEAN] = held[name].table[MEAN]
        reports[name] = line.report()
    compared = {name: reports[name].to_json() for name in e.plans}
    pair = next((reports[name].to_json() for name in reports if name not in e.plans), None)
    laws = {}
    for name in e.plans:
        seen = [b for b in reports[name].buckets if b.estimate.loss is not None]
        middles = [(b.start + b.end) / 2 for b in seen]
        law = fit_power_law(middles, [b.estimate.loss or 0.0 for b in seen], [b.estimate.tokens for b in seen])
        laws[name] = asdict(law) if law else None
    return {
        "checkpoint": e.about,
        "data": {"path": str(e.store.path), "fingerprint": e.store.fingerprint},
        "seq_len": seq_len,
        "trailing_tokens": trailing,
        "bucket": bucket,
        "spacing": settings.spacing,
        "plans": compared,
        "plan_texts": {name: describe(plans) for name, plans in e.plans.items()},
        "difference": pair,
        "power_law": laws,
    }


def gate_suite(e: Evaluation) -> tuple[dict[str, Any], list[LayerGate]]:
    """What the gate chooses on the first held-out document that is long enough; what other settings would keep."""
    assert e.store is not None
    settings = e.config.gate
    seq_len = settings.seq_len or e.seq_len
    longest = max(e.store.doc_length(i) for i in range(e.store.num_docs)) - 1
    length = min(seq_len, longest)
    batch = next(long_documents(e.store, length, length)).to(e.loaded.device)
    model, plans = e.loaded.model, e.plans.get("moba")
    gates = gate_statistics(model, batch, plans, settings.queries) if plans else []
    return {
        "checkpoint": e.about,
        "seq_len": length,
        "wanted_seq_len": seq_len,
        "plan_texts": {"moba": describe(plans)} if plans else {},
        "layers": [gate.to_json() for gate in gates],
        "grid": gate_grid(model, batch, settings.block_sizes, settings.topks, settings.queries),
    }, gates
