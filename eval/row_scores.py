"""Log-probabilities of the ends of token rows, many rows at a time.

Shape legend: T tokens of the packed rows, P scored positions, V vocab_size, C hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from eval.load import Loaded
from model.schedule import LayerPlan

PACKED_TOKENS = 16_384  # of one forward pass over scored requests
SCORED_VALUES = 1 << 27  # logits of scored positions that may exist at a time


@torch.no_grad()
def score_rows(
    loaded: Loaded, plans: Sequence[LayerPlan], rows: Sequence[tuple[list[int], int]]
) -> list[tuple[float, bool]]:
    """Log-probability (nats) of each row's last n tokens given those before, and whether they are the most likely.

    Args:
        rows: (tokens, n), 1 <= n < len(tokens). Packed as documents: no row sees padding or another row.
    """
    model, device = loaded.model, loaded.device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    for group in _packs(order, rows):
        inputs = [rows[i][0][:-1] for i in group]
        borders = [0, *accumulate(map(len, inputs))]
        hidden_TC = model.hidden(
            torch.tensor([token for row in inputs for token in row], device=device)[None],
            torch.cat([torch.arange(len(row)) for row in inputs]).to(device)[None],
            torch.tensor(borders, dtype=torch.int32, device=device),
            max(map(len, inputs)),
            plans,
        )[0]
        for i, end in zip(group, borders[1:], strict=True):
            tokens, number = rows[i]
            total, greedy = 0.0, True
            step = max(1, SCORED_VALUES // model.config.vocab_size)
            for a in range(end - number, end, step):
                b = min(a + step, end)
                logits_PV = model.logits(hidden_TC[a:b]).float()
                wanted = torch.tensor(tokens[len(tokens) - (end - a) : len(tokens) - (end - b)], device=device)
                likely = torch.log_softmax(logits_PV, -1).gather(1, wanted[:, None])
                total += float(likely.double().sum())
                greedy = greedy and bool((logits_PV.argmax(-1) == wanted).all())
            found[i] = (total, greedy)
    return found


def _packs(order: Sequence[int], rows: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0
    for i in order:
        if not packs or len(rows[i][0]) > room:
            packs.append([])
            room = PACKED_TOKENS
        packs[-1].append(i)
        room -= len(rows[i][0])
    return packs
