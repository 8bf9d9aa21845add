"""Head and loss on the ledger, in tiles of tokens; see `model.memory` for the names."""

from __future__ import annotations

from model.fused_loss import tile_tokens
from model.loss import TILE_BYTES
from model.memory import Job, Ledger
from model.memory_states import States


def play_loss(job: Job, ledger: Ledger, states: States) -> int:
    """Forward and backward. Returns the receipt of the gradient of the hidden states; the head's is given back."""
    play = _fused if job.fused_loss else _tiled
    return play(job, ledger, states)


def _fused(job: Job, ledger: Ledger, states: States) -> int:
    """Both gradients are made in forward, that of the head in fp32, and scaled in backward."""
    vocab, head = job.model.vocab_size, job.model.vocab_size * job.model.hidden_size
    tile = tile_tokens(vocab, job.itemsize, job.local) * vocab
    losses, logits = ledger.take("loss", 4 * job.local), ledger.take("loss", job.itemsize * tile)
    by_hidden = ledger.take("loss", job.itemsize * job.local * job.model.hidden_size)
    if not job.cuda:  # PyTorch's passes over the tile, in fp32
        ledger.touch("loss", (4 if job.itemsize < 4 else 0) * tile, 4 * tile)
    sums = ledger.take("loss", 4 * head)
    ledger.give(logits)
    states.begin_backward()
    if job.itemsize < 4 and not job.summed_in_products:
        ledger.touch("loss", job.itemsize * head)
    ledger.give(sums, losses)
    return by_hidden


def _tiled(job: Job, ledger: Ledger, states: States) -> int:
    """Logits are computed again in backward. The gradient of the head adds up in fp32."""
    vocab, head = job.model.vocab_size, job.model.vocab_size * job.model.hidden_size
    tile = min(max(1, TILE_BYTES // (4 * vocab)), job.local) * vocab
    losses = ledger.take("loss", 8 * job.local)
    cast = job.itemsize if job.itemsize < 4 else 0  # logits in the dtype of the weights, beside fp32
    ledger.touch("loss", 4 * tile + (4 * tile if job.cuda else cast * tile))  # logsumexp has its own
    by_hidden = ledger.take("loss", job.itemsize * job.local * job.model.hidden_size)
    sums = ledger.take("loss", 4 * head)
    ledger.touch("loss", (4 + cast) * tile, job.itemsize * head)
    ledger.give(sums, losses)
    states.begin_backward()
    return by_hidden
