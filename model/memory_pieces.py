"""Sizes of the tensors of a block, and what its small pieces keep; see `model.memory` for the names."""

from __future__ import annotations

from model.embedding import MAX_TOKENS
from model.memory import Job, Ledger
from model.memory_attention import AttentionBytes
from model.sequence_parallel import kv_copies

ACT, ATT, KEPT = "activations", "attention", "checkpoints"


class Pieces:
    """Norm, RoPE, SwiGLU tiles and the exchange under sequence parallelism, on a ledger.

    Attributes:
        wide, inner, q, kv: bytes of [t, C], [t, F], [t, A] and [t, K].
    """

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self.job, self.ledger = job, ledger
        unit = job.local * job.itemsize
        self.wide, self.inner = unit * job.model.hidden_size, unit * job.model.intermediate_size
        self.q, self.kv = unit * job.q_width, unit * job.kv_width

    def _norm(self, part: str) -> list[int]:
        """What RMSNorm keeps beside its input: 1 / rms, and on a CPU the normalised input in one more form."""
        take = self.ledger.take
        if self.job.cuda:
            return [take(part, 4 * self.job.local)]
        upcast = 0 if self.job.itemsize == 4 else 4 * self.job.local * self.job.model.hidden_size
        return [take(part, 4 * self.job.local), take(part, self.wide + upcast)]

    @property
    def _rope_in_place(self) -> bool:
        return self.job.engine.fused == "liger"

    @property
    def _rope_tables(self) -> float:
        return 8.0 * self.job.local * self.job.q_width / self.job.model.num_heads

    @property
    def _copies(self) -> int:
        return kv_copies(self.job.model.num_kv_heads, self.job.parallel)

    @property
    def _swiglu_keeps(self) -> int:
        """Tensors kept by silu(gate) * up: plain PyTorch also keeps silu(gate)."""
        return 3 if self.job.engine.fused == "none" else 2

    def _rope_work(self, width: int) -> None:
        """Plain RoPE computes in fp32: two products and their sum, of half the width each."""
        if self.job.engine.fused == "none":
            half = 2 * self.job.local * width
            self.ledger.touch(ACT, half, half, half)

    def _exchange(self, sent: list[int], sizes: list[float]) -> list[int]:
        """Packed copies, what arrives, and its final order; `sent` is freed."""
        take = self.ledger.take
        packed = [take("communication", size) for size in sizes]
        arrived = [take(ACT, size) for size in sizes]
        self.ledger.give(*sent, *packed)
        return arrived

    def _tile_bytes(self, forward: bool) -> float:
        """Of one tile of the MLP: gate, up, product; in backward their gradients, in fp32 inside unless fused."""
        tile = min(self.job.engine.mlp_tile, self.job.local) * self.job.model.intermediate_size
        size = self.job.itemsize
        if forward:
            return tile * size * (4 if self.job.engine.fused == "none" else 3)
        return tile * (5 * size + (24 if self.job.engine.fused == "none" else 0))

    def _fetch(self, size: AttentionBytes) -> list[int]:
        """What comes back from host memory: this block's tensors, and those of the one before it."""
        if not self.job.engine.offload_checkpoints:
            return []
        one = self.wide
        if self.job.engine.checkpointing == "selective":
            one += size.packed_ids + self.q + size.lse + size.lists
        return [self.ledger.take(KEPT, 2 * one)]

    def _own_gradients(self, per_layer: int) -> int:
        """Parameters of a layer, of `per_layer`, whose gradients are tensors before they are added up."""
        if not self.job.summed_in_products:
            return per_layer
        model = self.job.model
        mlp = 3 * model.hidden_size * model.intermediate_size if self.job.engine.mlp_tile else 0
        return mlp + 2 * model.hidden_size

    def _looks_up(self) -> bool:
        """Whether the embedding's gradient touches the rows of the tokens only; then in fp32, which is noted."""
        if not self.job.summed_in_products or self.job.local > MAX_TOKENS:
            return False
        self.ledger.touch("gradients", 4 * self.job.local * self.job.model.hidden_size)
        return True
