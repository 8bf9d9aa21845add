from __future__ import annotations

import pytest

from conf.compose import compose
from conf.constants import EXIT_USER_ERROR
from conf.errors import UserError
from conf.ranges import check_fields
from conf.schema import EvalConfig, ExportConfig, PrepareConfig, StageConfig, TrainConfig
from conf.validate import validate
from launch.cli import main

BASE = ["recipe=smoke", "out=runs/x"]
S = "stages.long"

# overrides, processes, what the one line must hold: the keys and a value that fits
RULES: list[tuple[list[str], int, list[str]]] = [
    (["model.num_kv_heads=3"], 1, ["model.num_kv_heads=3", "model.num_heads=4", "1, 2 or 4"]),
    (["model.hidden_size=66"], 1, ["model.hidden_size=66", "64 or 68", "model.head_dim"]),
    (["model.head_dim=15"], 1, ["model.head_dim=15", "14 or 16"]),
    (["model.qkv_bias=true"], 1, ["model.qkv_bias=true", "model.family=llama", "qwen2"]),
    (["model.family=qwen2"], 1, ["model.qkv_bias=false", "model.family=qwen2"]),
    (["model.qk_norm=true"], 1, ["model.qk_norm=true", "model.family=llama", "qwen3"]),
    (["model.family=gpt"], 1, ["model.family=gpt", "llama, mistral, qwen2, qwen3"]),
    (["model.key_conv=4"], 1, ["model.key_conv=4", "3 or 5"]),
    (["model.key_conv=3", "mesh.sequence_parallel=2"], 2, ["mesh.sequence_parallel=2", "model.key_conv=3"]),
    (["model.num_layers=0"], 1, ["model.num_layers=0", "at least 1"]),
    (["mesh.sequence_parallel=2"], 3, ["mesh.sequence_parallel=2", "3 processes", "1 or 3", "2 or 4"]),
    (["mesh.sequence_parallel=3"], 3, ["mesh.sequence_parallel=3", "model.num_heads=4", "1, 2 or 4"]),
    (
        ["mesh.sequence_parallel=4", "model.num_heads=12", "model.hidden_size=96", "model.num_kv_heads=6"],
        4,
        ["mesh.sequence_parallel=4", "model.num_kv_heads=6", "1, 2, 3, 6 or 12"],
    ),
    (
        ["mesh.sequence_parallel=4", f"{S}.seq_len=126", f"{S}.tokens=2016"],
        4,
        [f"{S}.seq_len=126", "mesh.sequence_parallel=4", "124 or 128"],
    ),
    ([], 3, ["stages.short.global_batch=4", "3 data-parallel", "3 or 6"]),
    ([f"{S}.micro_batch=3"], 1, [f"{S}.global_batch=4", f"{S}.micro_batch=3", "3 or 6", f"{S}.micro_batch=2"]),
    ([], 8, ["stages.short.global_batch=4", "use stages.short.global_batch=8"]),
    ([f"{S}.tokens=1000"], 1, [f"{S}.tokens=1000", "512", "512 or 1024"]),
    ([f"{S}.tokens=0"], 1, [f"{S}.tokens=0", "at least 1"]),
    ([f"{S}.attention.topk=0"], 1, [f"{S}.attention.topk=0", "at least 1"]),
    ([f"{S}.attention.block_size=40"], 1, [f"{S}.attention.block_size=40", "32 or 48"]),
    ([f"{S}.attention.kind=sparse"], 1, [f"{S}.attention.kind=sparse", "full, moba"]),
    ([f"{S}.attention.backend=x"], 1, [f"{S}.attention.backend=x", "varlen"]),
    ([f"{S}.attention.full_last_layers=3"], 1, [f"{S}.attention.full_last_layers=3", "model.num_layers=2"]),
    ([f"{S}.attention.full_layers=[0,2]"], 1, [f"{S}.attention.full_layers", "layer 2", "0 to 1"]),
    ([f"{S}.attention.full_after=1.5"], 1, [f"{S}.attention.full_after=1.5", "at most 1"]),
    (
        [f"{S}.attention.topk_warmup=[4,8]", f"{S}.attention.topk_warmup_until=0.5"],
        1,
        [f"{S}.attention.topk_warmup=[4, 8]", f"{S}.attention.topk=2", "[8, 4]"],
    ),
    (
        [f"{S}.attention.topk_warmup=[4,1]", f"{S}.attention.topk_warmup_until=0.5"],
        1,
        [f"{S}.attention.topk_warmup=[4, 1]", "[4, 2]"],
    ),
    ([f"{S}.attention.topk_warmup=[4]"], 1, [f"{S}.attention.topk_warmup=[4]", "topk_warmup_until=0"]),
    ([f"{S}.attention.topk_warmup_until=0.5"], 1, ["topk_warmup=[]", f"{S}.attention.topk_warmup_until=0.5"]),
    ([f"{S}.rope.kind=magic"], 1, [f"{S}.rope.kind=magic", "yarn"]),
    ([f"{S}.rope.factor=2"], 1, [f"{S}.rope.factor=2", f"{S}.rope.kind=default", "linear"]),
    ([f"{S}.rope.theta=-1"], 1, [f"{S}.rope.theta=-1", "must be"]),
    ([f"{S}.rope.kind=yarn"], 1, [f"{S}.rope.original_seq_len=0", "yarn"]),
    (
        [f"{S}.rope={{kind: llama3, original_seq_len: 64, low_freq_factor: 4}}"],
        1,
        [f"{S}.rope.low_freq_factor=4", f"{S}.rope.high_freq_factor=4"],
    ),
    (
        [f"{S}.rope={{kind: yarn, original_seq_len: 64, beta_slow: 40}}"],
        1,
        [f"{S}.rope.beta_slow=40", f"{S}.rope.beta_fast=32"],
    ),
    ([f"{S}.lr.schedule=step"], 1, [f"{S}.lr.schedule=step", "cosine, linear, constant"]),
    ([f"{S}.lr.peak=0"], 1, [f"{S}.lr.peak=0", "above 0"]),
    ([f"{S}.lr.peak=inf"], 1, [f"{S}.lr.peak=inf"]),
    ([f"{S}.lr.warmup=1"], 1, [f"{S}.lr.warmup=1", "below 1"]),
    ([f"{S}.lr.min_ratio=nan"], 1, [f"{S}.lr.min_ratio=nan"]),
    ([f"+{S}.data.domains.web=1.0"], 1, [f"{S}.data.domains.web", "data.sets", "text"]),
    ([f"{S}.data.domains.text=0"], 1, [f"{S}.data.domains.text=0", "above 0"]),
    ([f"~{S}.data.domains.text"], 1, [f"{S}.data.domains", f"+{S}.data.domains.text=1.0"]),
    ([f"{S}.data.packing=best"], 1, [f"{S}.data.packing=best", "concat"]),
    (["~data.sets.text"], 1, ["data.sets is empty", "data=stdlib"]),
    (["data.sets.text.path=''"], 1, ["data.sets.text.path"]),
    (["data.sets.text.heldout=1"], 1, ["data.sets.text.heldout=1", "below 1"]),
    (["data.tokenizer.train_vocab_size=600"], 1, ["train_vocab_size=600", "model.vocab_size=512"]),
    (["data.tokenizer.train_vocab_size=10"], 1, ["data.tokenizer.train_vocab_size=10", "at least 300"]),
    (["engine.zero_stage=4"], 1, ["engine.zero_stage=4", "at most 3"]),
    (["engine.precision=fp16"], 1, ["engine.precision=fp16", "fp32, bf16"]),
    (
        ["engine.precision=bf16", "engine.zero_stage=0"],
        1,
        ["engine.zero_stage=0", "engine.precision=bf16", "engine.zero_stage=1", "bias correction"],
    ),
    (
        ["engine.offload_checkpoints=true"],
        1,
        ["engine.offload_checkpoints=true", "engine.checkpointing=none", "full or selective"],
    ),
    (["engine.checkpointing=some"], 1, ["engine.checkpointing=some", "none, full, selective"]),
    (["engine.mlp_tile=-1"], 1, ["engine.mlp_tile=-1", "at least 0"]),
    (["engine.fused=xla"], 1, ["engine.fused=xla", "none, liger, compile"]),
    (
        ["engine.offload_optimizer=true", "engine.zero_stage=0"],
        1,
        ["engine.offload_optimizer=true", "engine.zero_stage=1, 2 or 3"],
    ),
    (
        ["engine.offload_param=true", "engine.zero_stage=2"],
        1,
        ["engine.offload_param=true", "engine.zero_stage=2", "engine.zero_stage=3"],
    ),
    (["launch.nproc=0"], 1, ["launch.nproc=0", "at least 1"]),
    (["launch.kind=cloud"], 1, ["launch.kind=cloud", "local"]),
    (["checkpoint.keep=0"], 1, ["checkpoint.keep=0"]),
    (["metrics.wandb.mode=on"], 1, ["metrics.wandb.mode=", "disabled, offline, online"]),
    (["optim.beta2=1"], 1, ["optim.beta2=1", "below 1"]),
    (["max_steps=0"], 1, ["max_steps=0", "at least 1"]),
    (["seed=-1"], 1, ["seed=-1"]),
    (["eval.tokens=100"], 1, ["eval.tokens=100", "128"]),
    (["data.sets.text.heldout=0", "data.sets.text.source=x"], 1, ["data.sets.text.heldout=0", "eval.tokens=0"]),
    ([f"+{S}.data.rules.web.set=text"], 1, [f"{S}.data.rules.web", "text"]),
    (
        [f"+{S}.data.rules.text={{min_length: 9, max_length: 5}}"],
        1,
        [f"{S}.data.rules.text.max_length=5", "least 9"],
    ),
    ([f"+{S}.data.rules.text={{upsample: {{64: 0}}}}"], 1, [f"{S}.data.rules.text.upsample={{64: 0}}", "above 0"]),
    ([f"+{S}.data.rules.text={{long: cut}}"], 1, ["long=cut", "split, truncate, drop, error"]),
    ([f"{S}.data.unit=tokens"], 1, [f"{S}.data.domains add up to 1 tokens", "2048", "unit=weight"]),
    (["data.sets.text.read.kind=chat"], 1, ["packing=concat would cut answers of text", "packing=best_fit"]),
    (["data.sets.text.read.on_error=stop"], 1, ["data.sets.text.read.on_error=stop", "skip, fatal"]),
    ([f"+{S}.data.rules.text.set=web"], 1, [f"{S}.data.rules.text.set=web", "text"]),
    (["~stages.short", "~stages.long", "~stages.full"], 1, ["stages is empty", "recipe="]),
]
IDS = [f"{' '.join(overrides) or 'as it is'} on {world}" for overrides, world, _ in RULES]


@pytest.mark.parametrize(("overrides", "world", "wanted"), RULES, ids=IDS)
def test_rule_names_the_key_and_what_fits(
    overrides: list[str], world: int, wanted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    nproc = [] if any(item.startswith("launch.nproc") for item in overrides) else [f"launch.nproc={world}"]
    code = main(["train", *BASE, *nproc, "dry_run=true", *overrides])
    printed = capsys.readouterr()
    assert code == EXIT_USER_ERROR and not printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    for text in wanted:
        assert text in printed.err


def test_stage_names_are_plain() -> None:
    config = compose("train", BASE)
    config.stages["a/b"] = config.stages.pop("full")
    with pytest.raises(UserError, match=r"stages\.a/b: a stage name is made of letters"):
        validate(config, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.family=qwen3", "model.qk_norm=true"],
        ["model.family=qwen2", "model.qkv_bias=true"],
        [f"{S}.attention.topk_warmup=[8,4]", f"{S}.attention.topk_warmup_until=0.5"],
        [f"{S}.rope={{kind: yarn, factor: 4, original_seq_len: 64}}"],
        ["mesh.sequence_parallel=2", "launch.nproc=2"],
        ["data.sets.text.heldout=0", "data.sets.text.source=x", "eval.tokens=0"],
        ["engine.precision=bf16", "engine.zero_stage=3"],
        ["max_steps=3", "model.num_kv_heads=4", f"{S}.lr.warmup=0", "optim.clip=0"],
    ],
    ids=str,
)
def test_what_fits_passes(overrides: list[str]) -> None:
    config = compose("train", [*BASE, *overrides])
    validate(config, config.launch.nproc)


def test_suggested_values_pass() -> None:
    """The nearest fitting token counts that a refusal names do fit."""
    for tokens in (512, 1024):
        validate(compose("train", [*BASE, f"{S}.tokens={tokens}"]), 1)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            EvalConfig(checkpoint="a", out="b", suite="x"),
            "suite=x: choose one of all, loss, ruler, needle, gate, lm_eval, report",
        ),
        (ExportConfig(checkpoint="a", out="b", dtype="int8"), "dtype=int8: choose one of float32, bfloat16"),
        (PrepareConfig(out="a", source="b", heldout=1.0), "heldout=1.0: must be at least 0 and below 1"),
    ],
    ids=["eval", "export", "prepare"],
)
def test_fields_of_other_roots(config: object, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        check_fields(config)
    assert str(caught.value).startswith(wanted)


def test_empty_chain_without_recipe() -> None:
    config = TrainConfig(out="x", stages={"a": StageConfig(64, 256, 4)})
    config.model.vocab_size = -1
    with pytest.raises(UserError, match=r"model\.vocab_size=-1"):
        check_fields(config)
