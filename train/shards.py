"""Which rank writes which tensors of a checkpoint, and how they get there.

Under ZeRO 1 and 2 nearly every parameter lies whole in the partition of one rank: that rank writes it, and nobody
else hears of it. The others (those that a border cuts, all of them under ZeRO 3, none under ZeRO 0) are dealt out
by a rule every rank computes alike, and every rank receives each, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from train.engine import DeepSpeedEngine
from train.mesh import Mesh
from train.state import (
    MOMENTS,
    WEIGHT,
    full_shape,
    get_full,
    get_own,
    lies_whole,
    named_parameters,
    optimizer_step,
    reset_optimizer,
)

SHARD_BYTES = 256 * 2**20  # of weights; a rank holds three times as much (two moments) while it writes
Take = Callable[[int, dict[str, Tensor], dict[str, Tensor]], None]  # shard number, its weights, its moments


def plan_shards(sizes: dict[str, int], world: int, limit: int = SHARD_BYTES) -> list[list[str]]:
    """Deal parameters (name -> bytes) out to shards, in order: none above `limit` unless one parameter is.

    Small models still give each of `world` ranks about one shard to write.
    """
    limit = min(limit, -(-sum(sizes.values()) // world))
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def deal(
    sizes: dict[str, int], homes: dict[str, int], world: int, limit: int = SHARD_BYTES
) -> list[tuple[int, list[str]]]:
    """(rank, names) of every shard. What has a home (name -> rank) goes there; the rest takes turns."""
    shards: list[tuple[int, list[str]]] = []
    for rank in range(world):
        at_home = {name: size for name, size in sizes.items() if homes.get(name) == rank}
        shards += [(rank, names) for names in plan_shards(at_home, 1, limit)]
    rest = {name: size for name, size in sizes.items() if name not in homes}
    return shards + [(index % world, names) for index, names in enumerate(plan_shards(rest, world, limit))]


def collect_shards(engine: DeepSpeedEngine, mesh: Mesh, copy: Callable[[str, Tensor], Tensor], take: Take) -> None:
    """Bring this rank's shards together, one after the other, and hand each to `take`. Collective.

    `copy(key, tensor)` is asked for what `take` gets of each weight and moment; it must not keep the tensor, which
    may be the optimizer's own.
    """
    if not optimizer_step(engine):
        reset_optimizer(engine, 0)  # saved before the first step: the moments do not exist yet
    params = dict(named_parameters(engine))
    mine = [name for name, param in params.items() if lies_whole(engine, param)]
    homes = {name: rank for rank, names in enumerate(mesh.gather(mine)) for name in names}
    sizes = {name: 4 * full_shape(param).numel() for name, param in params.items()}
    for index, (owner, names) in enumerate(deal(sizes, homes, mesh.world)):
        at_home = names[0] in homes
        if at_home and owner != mesh.rank:
            continue
        get = get_own if at_home else get_full
        shard = _shard(engine, params, names, get, copy if owner == mesh.rank else None)
        if owner == mesh.rank:
            take(index, *shard)


def _shard(
    engine: DeepSpeedEngine,
    params: dict[str, nn.Parameter],
    names: list[str],
    get: Callable[[DeepSpeedEngine, nn.Parameter, str], Tensor],
    copy: Callable[[str, Tensor], Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the weights and moments of `names`; without `copy` only the part that others need of this rank."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name in names:
        for key in (WEIGHT, *MOMENTS):
            full = get(engine, params[name], key)
            if copy is not None and key == WEIGHT:
                weights[name] = copy(name, full)
            elif copy is not None:
                moments[f"{key}.{name}"] = copy(f"{key}.{name}", full)
    return weights, moments
