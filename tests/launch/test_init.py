"""`init.hf` and `init.checkpoint`: what they fill in, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.inherit import reach
from conf.schema import RopeConfig, TokenizerConfig
from conf.validate import validate
from data.prepare import prepare
from launch.import_hf import import_hf
from launch.init import check_origin, check_sets
from launch.preview import attention_text
from launch.train import resolve, run
from tests.launch.folders import save_llama, save_texts, save_tokenizer

# What users of the recipes start from: shape and RoPE of the published folders.
LLAMA31 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 4096,
    "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LLAMA3 = {**LLAMA31, "rope_scaling": None, "max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hf") / "llama")


def described(folder: Path, description: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(description))
    return folder


def smoke(init: str, *more: str) -> list[str]:
    return ["recipe=extend_to_32k", init, "out=runs/x", *more]


@pytest.mark.parametrize("kind", ["hf", "checkpoint"])
def test_the_folder_fills_in_model_rope_and_tokenizer(kind: str, hf: Path, tmp_path: Path) -> None:
    folder = hf if kind == "hf" else import_hf(hf, tmp_path / "imported")
    inherit = ["stages.extend.rope.kind=inherit", "stages.extend.rope.factor=0"]
    config = resolve(smoke(f"init.{kind}={folder}", *inherit))
    model = config.model
    assert (model.vocab_size, model.hidden_size, model.head_dim, model.norm_eps) == (400, 64, 16, 1e-6)
    rope = config.stages["extend"].rope
    assert (rope.kind, rope.theta, rope.factor) == ("default", 50_000.0, 1.0)
    assert (config.init.seq_len, reach(config, "extend")) == (128, 32_768)
    assert config.data.tokenizer.path == str(hf if kind == "hf" else folder / "tokenizer")
    changed = resolve(smoke(f"init.{kind}={folder}"))
    set_by_stage = changed.stages["extend"].rope
    assert changed.init.seq_len == 0, "the folder's length is that of another RoPE"
    assert (set_by_stage.kind, set_by_stage.theta, set_by_stage.factor) == ("ntk", 50_000.0, 4.0)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["model.hidden_size=128"], ["model.hidden_size=128", "has 64", "leave model.* out"]),
        (["model=tiny"], ["model.vocab_size=512", "has 400"]),
        (["model.family=qwen3"], ["model.family=qwen3", "has llama"]),
        (["model.norm_eps=1e-5"], ["model.norm_eps=1e-05", "has 1e-06"]),  # the schema's default, asked for
        (["init.checkpoint=elsewhere"], ["init.checkpoint=elsewhere", "give one of them"]),
    ],
    ids=str,
)
def test_contradictions_are_one_line(overrides: list[str], wanted: list[str], hf: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve(smoke(f"init.hf={hf}", *overrides))
    assert "\n" not in str(caught.value)
    for text in wanted:
        assert text in str(caught.value)


def test_what_agrees_or_adds_may_be_said(hf: Path) -> None:
    config = resolve(smoke(f"init.hf={hf}", "model.hidden_size=64", "model.head_dim=0", "model.key_conv=3"))
    assert (config.model.hidden_size, config.model.head_dim, config.model.key_conv) == (64, 16, 3)


def test_folders_that_are_none(tmp_path: Path) -> None:
    for init, wanted in (("hf", "config.json does not exist"), ("checkpoint", "holds no finished checkpoint")):
        with pytest.raises(UserError, match=wanted):
            resolve(smoke(f"init.{init}={tmp_path}"))


def test_recipes_on_the_folders_they_are_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Composed, completed, validated and printed at eight processes, with nothing but a config.json."""
    llama3, llama31 = described(tmp_path / "3", LLAMA3), described(tmp_path / "31", LLAMA31)
    ropes, plans = {}, {}
    for recipe, folder in (
        ("extend_to_32k", llama3),
        ("moba_hybrid", llama3),
        ("prolong_64k_512k", llama3),
        ("llama8b_1m_moba", llama31),
    ):
        out = tmp_path / "run"
        config = resolve([f"recipe={recipe}", f"init.hf={folder}", f"out={out}", "dry_run=true", "launch.nproc=8"])
        validate(config, 8)
        assert run(config) == 0 and not out.exists()
        text = capsys.readouterr().out
        assert all(name in text for name in config.stages)
        for name, stage in config.stages.items():
            rope = stage.rope
            ropes[name] = (stage.seq_len, rope.kind, rope.theta, rope.factor)
            plans[name] = attention_text(stage.attention, config.model.num_layers)
    long = {"full_256k": 1 << 18, "full_512k": 1 << 19, "full_1m": 1 << 20, "moba_1m": 1 << 20}
    assert ropes == {
        "extend": (32_768, "ntk", 5e5, 4.0),
        "hybrid": (32_768, "default", 5e5, 1.0),
        "long_64k": (65_536, "default", 8e6, 1.0),
        "long_512k": (524_288, "default", 1.28e8, 1.0),
        **{name: (seq_len, "llama3", 5e5, 64.0) for name, seq_len in long.items()},
    }
    assert plans["moba_1m"] == "0-28 moba 4096x12, 29-31 full"
    assert plans["hybrid"] == "moba 2048x3; from 90%: full"
    assert plans["full_1m"] == plans["long_512k"] == "full"


def test_a_tokenizer_that_does_not_fit_is_refused(hf: Path, tmp_path: Path) -> None:
    config = resolve(smoke(f"init.hf={hf}"))
    check_origin(config)
    save_tokenizer(tmp_path / "larger", 500)
    config.data.tokenizer.path = str(tmp_path / "larger")
    with pytest.raises(UserError, match=r"has 500 tokens, the model of init\.hf=.* only 400"):
        check_origin(config)
    save_tokenizer(tmp_path / "other", 380)
    config.data.tokenizer.path = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"data\.tokenizer\.path=.* has another tokenizer than init\.hf="):
        check_origin(config)
    bare = save_llama(tmp_path / "bare", tokenizer=False)
    with pytest.raises(UserError, match=r"has no tokenizer: give data\.tokenizer\.path"):
        check_origin(resolve(smoke(f"init.hf={bare}")))
    (bare / "model.safetensors").write_bytes((bare / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        check_origin(resolve(smoke(f"init.hf={bare}", f"data.tokenizer.path={hf}")))


def test_a_set_of_another_tokenizer_is_refused(hf: Path, tmp_path: Path) -> None:
    texts = save_texts(tmp_path / "texts")
    save_tokenizer(tmp_path / "other", 380)
    for name, tokenizer in (("right", hf), ("wrong", tmp_path / "other")):
        prepare(tmp_path / name, str(texts), 0.2, TokenizerConfig(path=str(tokenizer)), progress=False)
    check_sets(resolve(smoke(f"init.hf={hf}", f"data.sets.text.path={tmp_path / 'right'}")))
    with pytest.raises(UserError) as caught:
        check_sets(resolve(smoke(f"init.hf={hf}", f"data.sets.text.path={tmp_path / 'wrong'}")))
    message = str(caught.value)
    assert "data.sets.text.path" in message and f"tokenizer.path={hf}" in message and "\n" not in message


def test_a_run_without_init_is_as_before() -> None:
    config = resolve(["recipe=smoke", "out=runs/x"])
    assert config.data.tokenizer.path == "" and config.model.hidden_size == 64
    assert vars(config.stages["short"].rope) == vars(RopeConfig())
