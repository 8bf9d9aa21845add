"""Rules that involve more than one field, checked before any process starts."""

from __future__ import annotations

import re

from conf.domains import set_of
from conf.errors import UserError
from conf.fitting import any_of, around
from conf.inherit import stage_ropes
from conf.ranges import check_fields
from conf.schema import ModelConfig, TrainConfig
from conf.validate_stage import check_rope, check_stage

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
        check_stage(f"stages.{name}", stage, config, world_size)
        check_rope(f"stages.{name}.rope", ropes[name])
    _evaluation(config)


def _model(model: ModelConfig) -> None:
    if model.num_heads % model.num_kv_heads:
        fits = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        raise UserError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}: "
            f"use {any_of(fits)}"
        )
    if not model.head_dim and model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}: "
            f"use {around(model.hidden_size, model.num_heads)}, or set model.head_dim"
        )
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    if head_dim % 2:
        raise UserError(f"model.head_dim={head_dim} is odd, and RoPE turns pairs: use {around(head_dim, 2)}")
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
            f"use {any_of(fits)}, or launch.nproc={around(world_size, parallel)}"
        )
    if config.model.num_heads % parallel:
        fits = [n for n in range(1, config.model.num_heads + 1) if config.model.num_heads % n == 0]
        raise UserError(
            f"mesh.sequence_parallel={parallel} does not divide model.num_heads={config.model.num_heads}: "
            f"use {any_of(fits)}"
        )

    kv_heads = config.model.num_kv_heads
    if kv_heads % parallel and parallel % kv_heads:
        fits = [n for n in range(1, config.model.num_heads + 1) if _shares_heads(config.model, n)]
        raise UserError(
            f"mesh.sequence_parallel={parallel} and model.num_kv_heads={kv_heads} do not fit: one must be a "
            f"multiple of the other; use mesh.sequence_parallel={any_of(fits)}"
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
