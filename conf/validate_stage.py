"""Rules of one stage: sizes, data mixture, RoPE, attention."""

from __future__ import annotations

import itertools

from conf.domains import rule_of, set_of, trained_whole
from conf.errors import UserError
from conf.fitting import around
from conf.ranges import check_fields
from conf.schema import AttentionConfig, RopeConfig, StageConfig, TrainConfig

BLOCK_MULTIPLE = 16  # what the matrix units of GPUs want


def check_stage(key: str, stage: StageConfig, config: TrainConfig, world_size: int) -> None:
    """`key`: `stages.NAME`, as messages name it. Raises UserError for the first rule broken."""
    parallel = config.mesh.sequence_parallel
    if stage.seq_len % parallel:
        raise UserError(
            f"{key}.seq_len={stage.seq_len} is not a multiple of mesh.sequence_parallel={parallel}: "
            f"use {around(stage.seq_len, parallel)}"
        )
    rows = world_size // parallel * stage.micro_batch
    if stage.global_batch % rows:
        raise UserError(
            f"{key}.global_batch={stage.global_batch} does not split over {world_size // parallel} data-parallel "
            f"ranks x {key}.micro_batch={stage.micro_batch}: use {key}.global_batch="
            + around(stage.global_batch, rows)
            + _fitting_micro_batch(key, stage, world_size // parallel)
        )
    step = stage.global_batch * stage.seq_len
    if stage.tokens % step:
        raise UserError(
            f"{key}.tokens={stage.tokens} is not a whole number of global batches of {step} tokens "
            f"({key}.global_batch x {key}.seq_len): use {around(stage.tokens, step)}"
        )
    _attention(f"{key}.attention", stage.attention, config.model.num_layers)
    if not stage.data.domains:
        raise UserError(f"{key}.data.domains is empty: use +{key}.data.domains.{next(iter(config.data.sets))}=1.0")
    for name, weight in stage.data.domains.items():
        if set_of(stage.data, name) not in config.data.sets:
            known = ", ".join(config.data.sets)
            other = rule_of(stage.data, name).set
            where = f"rules.{name}.set={other}" if other else f"domains.{name}"
            raise UserError(f"{key}.data.{where}: no such set in data.sets; there are: {known}")
        if not 0 < weight < float("inf"):
            raise UserError(f"{key}.data.domains.{name}={weight}: must be above 0; leave the set out to skip it")
    _mixture(f"{key}.data", stage, config)


def _mixture(key: str, stage: StageConfig, config: TrainConfig) -> None:
    data = stage.data
    for name, rule in data.rules.items():
        if name not in data.domains:
            raise UserError(f"{key}.rules.{name}: no such domain; there are: {', '.join(data.domains)}")
        if rule.max_length and rule.max_length < rule.min_length:
            raise UserError(
                f"{key}.rules.{name}.max_length={rule.max_length} is below its min_length={rule.min_length}: "
                f"use at least {rule.min_length}, or 0 for no limit"
            )
        for least, times in rule.upsample.items():
            if least < 1 or not 0 < times < float("inf"):
                raise UserError(
                    f"{key}.rules.{name}.upsample={{{least}: {times:g}}}: lengths are at least 1, times above 0"
                )
    if data.unit == "tokens" and sum(data.domains.values()) != stage.tokens:
        raise UserError(
            f"{key}.domains add up to {sum(data.domains.values()):.0f} tokens, the stage has {stage.tokens}: "
            f"change one of them, or use {key}.unit=weight"
        )
    for name in data.domains:
        one = config.data.sets[set_of(data, name)]
        if not trained_whole(one.source, one.read, one.synthetic):
            continue
        if data.packing != "best_fit":
            raise UserError(
                f"{key}.packing={data.packing} would cut answers of {name}: use {key}.packing=best_fit"
            )
        if rule_of(data, name).long in ("split", "truncate"):
            raise UserError(
                f"{key}.rules.{name}.long={rule_of(data, name).long} would train on cut answers: use drop or error"
            )


def check_rope(key: str, rope: RopeConfig) -> None:
    """`rope`: with all that was inherited. Raises UserError as `check_stage`."""
    check_fields(rope, f"{key}.")
    if rope.kind == "default" and rope.factor != 1:
        raise UserError(
            f"{key}.factor={rope.factor:g} has no meaning with {key}.kind=default: use linear, ntk or yarn"
        )
    if rope.kind in ("llama3", "yarn") and not rope.original_seq_len:
        raise UserError(
            f"{key}.original_seq_len=0: {key}.kind={rope.kind} needs the length before scaling, as 8192"
        )
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise UserError(
            f"{key}.low_freq_factor={rope.low_freq_factor:g} must be below "
            f"{key}.high_freq_factor={rope.high_freq_factor:g}: llama3 uses 1 and 4"
        )
    if rope.kind == "yarn" and rope.beta_slow >= rope.beta_fast:
        raise UserError(
            f"{key}.beta_slow={rope.beta_slow:g} must be below {key}.beta_fast={rope.beta_fast:g}: "
            "yarn uses 1 and 32"
        )


def _attention(key: str, attention: AttentionConfig, num_layers: int) -> None:
    if attention.block_size % BLOCK_MULTIPLE:
        raise UserError(
            f"{key}.block_size={attention.block_size} is not a multiple of {BLOCK_MULTIPLE}: "
            f"use {around(attention.block_size, BLOCK_MULTIPLE)}"
        )
    if attention.full_last_layers > num_layers:
        raise UserError(
            f"{key}.full_last_layers={attention.full_last_layers} is above model.num_layers={num_layers}: "
            f"use at most {num_layers}"
        )
    outside = [layer for layer in attention.full_layers if not 0 <= layer < num_layers]
    if outside:
        raise UserError(
            f"{key}.full_layers names layer {outside[0]}, model.num_layers={num_layers}: use 0 to {num_layers - 1}"
        )
    steps = [*attention.topk_warmup, attention.topk]
    if attention.choose == "sink_window" and min(steps) < 2:
        raise UserError(f"{key}.choose=sink_window needs a topk of at least 2: own block and first block")
    if any(later > earlier for earlier, later in itertools.pairwise(steps)):
        fits = sorted((max(k, attention.topk) for k in attention.topk_warmup), reverse=True)
        raise UserError(
            f"{key}.topk_warmup={attention.topk_warmup} must descend and end at or above "
            f"{key}.topk={attention.topk}: use {fits}"
        )
    if bool(attention.topk_warmup) != (attention.topk_warmup_until > 0):
        raise UserError(
            f"{key}.topk_warmup={attention.topk_warmup} and {key}.topk_warmup_until="
            f"{attention.topk_warmup_until:g} go together: set both (as [16,8] and 0.2) or neither"
        )


def _fitting_micro_batch(key: str, stage: StageConfig, data_parallel: int) -> str:
    per_rank, rest = divmod(stage.global_batch, data_parallel)
    if rest or not per_rank:
        return ""
    best = max(n for n in range(1, stage.micro_batch + 1) if per_rank % n == 0)
    return f", or {key}.micro_batch={best}"
