"""Rules that involve more than one field, checked before any process starts."""

from __future__ import annotations

import itertools
import re

from conf.domains import rule_of, set_of, trained_whole
from conf.errors import UserError
from conf.inherit import stage_ropes
from conf.ranges import check_fields
from conf.schema import AttentionConfig, ModelConfig, RopeConfig, StageConfig, TrainConfig

BLOCK_MULTIPLE = 16  # what the matrix units of GPUs want
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def validate(config: TrainConfig, world_size: int) -> None:
    """Check a training configuration for `world_size` processes.

    Raises UserError for the first rule broken; it names the keys and a value that would fit.
    """
    check_fields(config)
    if not config.stages:
        raise UserError("stages is empty: choose a recipe=..., or add one with +stage@stages.NAME=full")
    if config.init.hf and config.init.checkpoint:
        raise UserError(f"init.hf={config.init.hf} and init.checkpoint={config.init.checkpoint}: give one of them")
    _model(config.model)
    _mesh(config, world_size)
    _engine(config)
    _data(config)
    ropes = stage_ropes(config.stages)
    for name, stage in config.stages.items():
        if not _STAGE_NAME.fullmatch(name):
            raise UserError(f"stages.{name}: a stage name is made of letters, digits, _ and -")
        _stage(f"stages.{name}", stage, config, world_size)
        _rope(f"stages.{name}.rope", ropes[name])
    _evaluation(config)


def _model(model: ModelConfig) -> None:
    if model.num_heads % model.num_kv_heads:
        fits = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        raise UserError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}: "
            f"use {_any_of(fits)}"
        )
    if not model.head_dim and model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}: "
            f"use {_around(model.hidden_size, model.num_heads)}, or set model.head_dim"
        )
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    if head_dim % 2:
        raise UserError(f"model.head_dim={head_dim} is odd, and RoPE turns pairs: use {_around(head_dim, 2)}")
    if model.qkv_bias != (model.family == "qwen2"):
        raise UserError(
            f"model.qkv_bias={str(model.qkv_bias).lower()} does not go with model.family={model.family}: "
            "family qwen2 has the bias, the others have none"
        )
    if model.qk_norm != (model.family == "qwen3"):
        raise UserError(
            f"model.qk_norm={str(model.qk_norm).lower()} does not go with model.family={model.family}: "
            "family qwen3 has the norm, the others have none"
        )
    if model.key_conv not in (0, 3, 5):
        raise UserError(f"model.key_conv={model.key_conv}: the kernel size is 3 or 5, or 0 for no convolution")


def _mesh(config: TrainConfig, world_size: int) -> None:
    parallel = config.mesh.sequence_parallel
    if parallel > 1 and config.model.key_conv:
        raise UserError(
            f"mesh.sequence_parallel={parallel} cuts documents where model.key_conv={config.model.key_conv} needs "
            "their neighbouring keys: use mesh.sequence_parallel=1 or model.key_conv=0"
        )
    if world_size % parallel:
        fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"mesh.sequence_parallel={parallel} does not divide the {world_size} processes (launch.nproc): "
            f"use {_any_of(fits)}, or launch.nproc={_around(world_size, parallel)}"
        )
    if config.model.num_heads % parallel:
        fits = [n for n in range(1, config.model.num_heads + 1) if config.model.num_heads % n == 0]
        raise UserError(
            f"mesh.sequence_parallel={parallel} does not divide model.num_heads={config.model.num_heads}: "
            f"use {_any_of(fits)}"
        )

    kv_heads = config.model.num_kv_heads
    if kv_heads % parallel and parallel % kv_heads:
        fits = [n for n in range(1, config.model.num_heads + 1) if _shares_heads(config.model, n)]
        raise UserError(
            f"mesh.sequence_parallel={parallel} and model.num_kv_heads={kv_heads} do not fit: one must be a "
            f"multiple of the other; use mesh.sequence_parallel={_any_of(fits)}"
        )


def _shares_heads(model: ModelConfig, parallel: int) -> bool:
    """Whether `parallel` ranks can share the model's heads evenly."""
    kv_fits = not (model.num_kv_heads % parallel and parallel % model.num_kv_heads)
    return model.num_heads % parallel == 0 and kv_fits


def _engine(config: TrainConfig) -> None:
    if config.engine.precision == "bf16" and config.engine.zero_stage == 0:
        raise UserError(
            "engine.zero_stage=0 with engine.precision=bf16 trains with another optimizer (its bias correction "
            "starts one step late): use engine.zero_stage=1"
        )
    engine = config.engine
    if engine.offload_checkpoints and engine.checkpointing == "none":
        raise UserError(
            "engine.offload_checkpoints=true has nothing to offload with engine.checkpointing=none: "
            "use engine.checkpointing=full or selective"
        )
    if engine.offload_optimizer and engine.zero_stage == 0:
        raise UserError("engine.offload_optimizer=true needs ZeRO: use engine.zero_stage=1, 2 or 3")
    if engine.offload_param and engine.zero_stage < 3:
        raise UserError(
            f"engine.offload_param=true with engine.zero_stage={engine.zero_stage}: use engine.zero_stage=3, or "
            "engine.offload_optimizer=true alone"
        )


def _data(config: TrainConfig) -> None:
    if not config.data.sets:
        raise UserError("data.sets is empty: choose data=stdlib, or +data.sets.NAME={path: FOLDER, source: TEXT}")
    for name, one in config.data.sets.items():
        if not one.path:
            raise UserError(f"data.sets.{name}.path is empty: give the folder of the prepared set")
    tokenizer = config.data.tokenizer
    if not tokenizer.path and tokenizer.train_vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer.train_vocab_size={tokenizer.train_vocab_size} is above "
            f"model.vocab_size={config.model.vocab_size}: use data.tokenizer.train_vocab_size="
            f"{config.model.vocab_size}"
        )


def _stage(key: str, stage: StageConfig, config: TrainConfig, world_size: int) -> None:
    parallel = config.mesh.sequence_parallel
    if stage.seq_len % parallel:
        raise UserError(
            f"{key}.seq_len={stage.seq_len} is not a multiple of mesh.sequence_parallel={parallel}: "
            f"use {_around(stage.seq_len, parallel)}"
        )
    rows = world_size // parallel * stage.micro_batch
    if stage.global_batch % rows:
        raise UserError(
            f"{key}.global_batch={stage.global_batch} does not split over {world_size // parallel} data-parallel "
            f"ranks x {key}.micro_batch={stage.micro_batch}: use {key}.global_batch="
            + _around(stage.global_batch, rows)
            + _fitting_micro_batch(key, stage, world_size // parallel)
        )
    step = stage.global_batch * stage.seq_len
    if stage.tokens % step:
        raise UserError(
            f"{key}.tokens={stage.tokens} is not a whole number of global batches of {step} tokens "
            f"({key}.global_batch x {key}.seq_len): use {_around(stage.tokens, step)}"
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


def _rope(key: str, rope: RopeConfig) -> None:
    """`rope`: with all that was inherited."""
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
            f"use {_around(attention.block_size, BLOCK_MULTIPLE)}"
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


def _evaluation(config: TrainConfig) -> None:
    longest = max(stage.seq_len for stage in config.stages.values())
    if 0 < config.eval.tokens < longest:
        raise UserError(
            f"eval.tokens={config.eval.tokens} is less than one row of {longest}: use at least {longest}, or 0 "
            "for no held-out loss"
        )
    for name, stage in config.stages.items():
        used = [set_of(stage.data, domain) for domain in stage.data.domains]
        sets = {one: config.data.sets[one] for one in used}
        if config.eval.tokens and all(one.source and not one.heldout for one in sets.values()):
            key = f"data.sets.{next(iter(sets))}.heldout"
            raise UserError(
                f"{key}=0 leaves stage {name} nothing to evaluate on: set {key} above 0, or eval.tokens=0"
            )


def _around(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, as text."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _any_of(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


def _fitting_micro_batch(key: str, stage: StageConfig, data_parallel: int) -> str:
    per_rank, rest = divmod(stage.global_batch, data_parallel)
    if rest or not per_rank:
        return ""
    best = max(n for n in range(1, stage.micro_batch + 1) if per_rank % n == 0)
    return f", or {key}.micro_batch={best}"
