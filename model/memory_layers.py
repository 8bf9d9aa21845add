"""The forward and backward pass of a step, tensor by tensor; see `model.memory` for the names and the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.memory import Job, Ledger
from model.memory_attention import AttentionBytes, attention_bytes
from model.memory_loss import play_loss
from model.memory_pieces import ACT, ATT, KEPT, Pieces
from model.memory_states import States
from model.schedule import LayerPlan
from model.shapes import num_parameters


@dataclass
class Saved:
    """Receipts of what one block keeps for its backward pass, by where it is used."""

    lead: list[int] = field(default_factory=list)  # norm and projections before attention
    qkv: list[int] = field(default_factory=list)
    core: list[int] = field(default_factory=list)  # attention's output and what it noted
    middle: list[int] = field(default_factory=list)  # second norm
    mlp: list[int] = field(default_factory=list)


class Play(Pieces):
    """Plays forward, loss and backward of one micro-batch."""

    def __init__(self, job: Job, ledger: Ledger, states: States) -> None:
        super().__init__(job, ledger)
        self.states, self.checkpointing = states, job.engine.checkpointing
        self.layers: list[Saved] = []
        embedding = job.model.vocab_size * job.model.hidden_size
        tables = 1 if job.model.tie_embeddings else 2
        self.per_layer = (num_parameters(job.model) - tables * embedding) // job.model.num_layers

    def forward(self) -> None:
        """Leaves what backward needs in the ledger."""
        job, take = self.job, self.ledger.take
        self.ledger.moment = "forward"
        self.gathered = self.states.gather()
        take(
            ACT, 24 * job.tokens + 4 * job.local * job.q_width / job.model.num_heads
        )  # ids, labels, positions; RoPE
        self.x = [take(self._kept, self.wide)]
        for layer_plan in job.plans:
            saved = self._forward_block(layer_plan)
            if self.checkpointing != "none":
                saved = self._drop(saved, layer_plan)
            self.layers.append(saved)
            self.x.append(take(self._kept, self.wide))
            if job.engine.offload_checkpoints:  # the block's input is in host memory by now
                self.ledger.host += self.wide
                self.ledger.give(self.x.pop(0))
        self.norm = self._norm(KEPT)
        self.hidden = take(ACT, self.wide)

    def backward(self) -> None:
        """Loss and all blocks, in the order of autograd."""
        self._loss()
        grad = self.ledger.take(ACT, self.wide)  # of the last block's output
        self.ledger.give(self.hidden, *self.norm, self.x.pop())
        for index in reversed(range(len(self.layers))):
            self.ledger.moment = f"backward of layer {index}"
            grad = self._backward_block(self.layers[index], self.job.plans[index], grad)
            self.states.gradient(self._own_gradients(self.per_layer))
        self.ledger.moment = "backward of the embedding"
        if not self._looks_up():
            self.states.gradient(self.job.model.vocab_size * self.job.model.hidden_size)
        self.ledger.give(grad, self.gathered, *self._tied)

    @property
    def _kept(self) -> str:
        return ACT if self.checkpointing == "none" else KEPT

    def _forward_block(self, layer_plan: LayerPlan) -> Saved:
        saved, size = Saved(), attention_bytes(self.job, layer_plan)
        self._lead(saved)
        self._attend(saved, size)
        self._finish(saved)
        return saved

    def _lead(self, saved: Saved) -> None:
        """Norm, projections, RoPE and the exchange of columns for heads. Leaves q, k, v."""
        take, give = self.ledger.take, self.ledger.give
        saved.lead = [*self._norm(ACT), take(ACT, self.wide)]
        raw_q, raw_k, v = take(ACT, self.q), take(ACT, self.kv), take(ACT, self.kv)
        if self._rope_in_place:
            saved.lead.append(take(ACT, self._rope_tables))
            saved.qkv = [raw_q, raw_k, v]
        else:
            q = take(ACT, self.q)
            self._rope_work(self.job.q_width)
            k = take(ACT, self.kv)
            self._rope_work(self.job.kv_width)
            give(raw_q, raw_k)
            saved.qkv = [q, k, v]
        if self.job.parallel > 1:
            saved.qkv = self._exchange(saved.qkv, [self.q, *[self.kv * self._copies] * 2])

    def _attend(self, saved: Saved, size: AttentionBytes) -> None:
        """Attention over whole rows, for this rank's heads."""
        take = self.ledger.take
        saved.core = [take(ACT, size.ids), take(ACT, size.table), take(ACT, self.q), take(ACT, size.lse)]
        saved.core.append(take(ACT, size.lists))
        self.ledger.touch(ATT, size.forward)

    def _finish(self, saved: Saved) -> None:
        """Heads for columns again, output projection, residual, norm, MLP up to its output."""
        take, give = self.ledger.take, self.ledger.give
        saved.middle = []
        if self.job.parallel > 1:
            packed, arrived = take("communication", self.q), take("communication", self.q)
            saved.middle.append(take(ACT, self.q))
            give(packed, arrived)
        projected = take(ACT, self.wide)
        saved.middle.append(take(ACT, self.wide))  # the residual stream after attention
        give(projected)
        saved.middle += [*self._norm(ACT), take(ACT, self.wide)]
        if self.job.engine.mlp_tile:
            out = take(ACT, self.wide)
            self.ledger.touch(ACT, self._tile_bytes(forward=True))
        else:
            kept = [take(ACT, self.inner), take(ACT, self.inner)]  # gate and up
            if self._swiglu_keeps == 3:
                kept.append(take(ACT, self.inner))
            saved.mlp = [*kept, take(ACT, self.inner)]  # the product, input of the last projection
            out = take(ACT, self.wide)
        give(out)  # `forward` takes the sum with the residual stream, in which the output ends

    def _drop(self, saved: Saved, layer_plan: LayerPlan) -> Saved:
        """What checkpointing leaves of a block: chosen ids; in `selective` also attention's output and notes."""
        size, offload = attention_bytes(self.job, layer_plan), self.job.engine.offload_checkpoints
        self.ledger.give(*saved.lead, *saved.qkv, *saved.core, *saved.middle, *saved.mlp)
        if self.checkpointing == "full":  # the ids wait on the device in any case
            return Saved(core=[self.ledger.take(KEPT, size.packed_ids)])
        kept = [size.packed_ids, self.q, size.lse, size.lists]
        if offload:
            self.ledger.host += int(sum(kept))
            kept = []
        return Saved(core=[self.ledger.take(KEPT, one) for one in (size.table, *kept)])

    def _backward_block(self, saved: Saved, layer_plan: LayerPlan, grad: int) -> int:
        """Returns the receipt of the gradient of the block's input."""
        size = attention_bytes(self.job, layer_plan)
        back = self._fetch(size)
        if self.checkpointing == "none":
            again = saved
        elif self.checkpointing == "full":
            again = self._forward_block(layer_plan)
        else:
            again = Saved(core=[self.ledger.take(ACT, size.ids)])
            self._finish(again)
        grad = self._backward_finish(again, grad)
        if self.checkpointing == "selective":
            self._lead(again)
        self._backward_lead(again, self._backward_attend(again, size))
        if again is not saved:
            self.ledger.give(*saved.core)
        self.ledger.give(*back, *([] if self.job.engine.offload_checkpoints else [self.x.pop()]))
        return grad

    def _backward_finish(self, saved: Saved, grad: int) -> int:
        """MLP, norm and output projection, down to the gradient of attention's output (left in `_out`)."""
        take, give = self.ledger.take, self.ledger.give
        if self.job.engine.mlp_tile:
            by_mlp = take(ACT, self.wide)
            sums = take("gradients", 12 * self.job.model.hidden_size * self.job.model.intermediate_size)
            self.ledger.touch(ACT, self._tile_bytes(forward=False))
            give(sums)
        else:
            by_mlp = self._backward_mlp(saved)
        residual = take(ACT, self.wide)  # through the norm, then added to what came past it
        give(by_mlp, grad)
        give(*saved.middle)
        self._out = take(ACT, self.q)
        return residual

    def _backward_mlp(self, saved: Saved) -> int:
        take, give = self.ledger.take, self.ledger.give
        by_product = take(ACT, self.inner)
        *kept, product = saved.mlp
        give(product)
        if self.job.engine.fused == "liger":  # overwrites gate and up
            give(by_product)
            by_mlp = take(ACT, self.wide)
            self.ledger.touch(ACT, self.wide)
            give(*kept)
            return by_mlp
        by_gate, by_up = take(ACT, self.inner), take(ACT, self.inner)
        give(by_product, *kept)
        by_mlp = take(ACT, self.wide)
        self.ledger.touch(ACT, self.wide)
        give(by_gate, by_up)
        return by_mlp

    def _backward_attend(self, saved: Saved, size: AttentionBytes) -> list[int]:
        take, give = self.ledger.take, self.ledger.give
        out = self._out
        if self.job.parallel > 1:
            (out,) = self._exchange([out], [self.q])
        grads = [take(ACT, self.q), take(ACT, self.kv * self._copies), take(ACT, self.kv * self._copies)]
        self.ledger.touch(ATT, size.backward)
        give(out, *saved.qkv, *saved.core)
        if self.job.parallel > 1:
            grads = self._exchange(grads, [self.q, self.kv, self.kv])
        return grads

    def _backward_lead(self, saved: Saved, grads: list[int]) -> None:
        take, give = self.ledger.take, self.ledger.give
        by_q, by_k, by_v = grads
        if not self._rope_in_place:
            raw = take(ACT, self.q)
            self._rope_work(self.job.q_width)
            give(by_q)
            raw_k = take(ACT, self.kv)
            give(by_k)
            by_q, by_k = raw, raw_k
        total = take(ACT, self.wide)
        self.ledger.touch(ACT, self.wide)
        give(by_q, by_k, by_v)
        self.ledger.touch(ACT, self.wide)  # through the norm
        give(total, *saved.lead)

    def _loss(self) -> None:
        """Head and loss, forward and backward; and where the head's gradient goes."""
        take, model = self.ledger.take, self.job.model
        self.ledger.moment = "loss"
        by_hidden = play_loss(self.job, self.ledger, self.states)
        head = model.vocab_size * model.hidden_size
        if self.job.summed_in_products and self.job.fused_loss:
            self._tied = []
        elif model.tie_embeddings:  # waits for the embedding's own gradient, to be added to it
            self._tied = [take("gradients", self.job.itemsize * head)]
        else:
            self._tied = []
            self.states.gradient(head)
        self.ledger.give(by_hidden)
