from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conf.errors import UserError
from conf.load import save_config
from conf.schema import AttentionConfig, ModelConfig, RopeConfig, StageConfig, TrainConfig
from data.tokenizer import load_tokenizer, train_tokenizer
from model.hf import export_hf, moba_settings, read_hf, write_hf
from model.hf_config import read_config_json, to_config_json
from model.schedule import full_plans
from model.transformer import CausalLM
from model.weights import TensorFiles
from tests.model.build import VOCAB, hidden_args, packed, tiny_config, tiny_model
from tests.model.test_weights import truncate, write_checkpoint

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
LINEAR = RopeConfig(kind="linear", factor=4.0)


def save_tokenizer(folder: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, **{f"t{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def trained_run(root: Path, config: ModelConfig, model: CausalLM, stage: str = "long") -> Path:
    """A run folder with one checkpoint of two stages, the files as the trainer leaves them."""
    folder = root / "checkpoints" / "step-00000007"
    (folder / "tokenizer").mkdir(parents=True)
    save_tokenizer(folder / "tokenizer")
    moba = AttentionConfig(kind="moba", block_size=16, topk=2, full_last_layers=1, full_after=0.9)
    size = {"tokens": 512, "global_batch": 2}
    stages = {
        "short": StageConfig(seq_len=64, attention=moba, **size),  # type: ignore[arg-type]
        "long": StageConfig(seq_len=128, rope=LINEAR, **size),  # type: ignore[arg-type]
    }
    save_config(TrainConfig(out=str(root), model=config, stages=stages), folder / "config.yaml")
    (folder / "state.json").write_text(json.dumps({"step": 7, "stage": stage}))
    complete = write_checkpoint(root / "parts", model)
    for part in complete.iterdir():
        part.rename(folder / part.name)
    complete.rmdir()
    return root


def their_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_transformers_the_same_model(family: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(family, tie_embeddings=tied)
    model = tiny_model(config, LINEAR)
    out = export_hf(trained_run(tmp_path / "run", config, model), tmp_path / "hf", "float32")
    batch: dict[str, Any] = packed([[100]])
    with torch.no_grad():
        logits = model.logits(model.hidden(**hidden_args(batch), plans=full_plans(2)))
    want = their_logits(out, batch["input_ids"])
    assert (logits - want).abs().max() < 1e-4
    assert torch.equal(logits.argmax(-1), want.argmax(-1))

    parsed = AutoConfig.from_pretrained(out)
    assert parsed.max_position_embeddings == 128
    assert parsed.rope_parameters == {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0}
    assert parsed.moba == {"block_size": 16, "topk": 2, "layers": [0]}
    assert (parsed.bos_token_id, parsed.eos_token_id) == (0, 1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    assert tokenizer.eos_token_id == 1
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    back = read_hf(out)
    assert (back.config, back.rope) == (config, LINEAR)
    named = dict(model.named_parameters())
    assert all(torch.equal(tensor, named[name]) for name, tensor in back.weights)
    assert len(back.weights) == len(named)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_round_trip_is_bit_equal(family: str, tmp_path: Path) -> None:
    """transformers saves bf16; we read it, hold fp32 masters, and write bf16 again."""
    config = tiny_config(family)
    model = tiny_model(config)
    write_folder(model, tmp_path / "first", "float32")
    their = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    their.save_pretrained(tmp_path / "theirs")
    masters = {name: tensor.float() for name, tensor in read_hf(tmp_path / "theirs").weights}
    save_file(masters, tmp_path / "masters.safetensors")
    description = to_config_json(config, RopeConfig(), seq_len=64, dtype="bfloat16")
    write_hf(config, description, TensorFiles([tmp_path / "masters.safetensors"]), tmp_path / "back", "bfloat16")
    first = load_file(tmp_path / "theirs" / "model.safetensors")
    second = load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), second[name].view(torch.int16)), name
    ids = torch.arange(30)[None]
    assert torch.equal(their_logits(tmp_path / "theirs", ids), their_logits(tmp_path / "back", ids))


def write_folder(model: CausalLM, out: Path, dtype: str, **options: Any) -> Path:
    part = out.with_name(f"{out.name}.safetensors")
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, part)
    description = to_config_json(model.config, RopeConfig(), seq_len=64, dtype=dtype)
    write_hf(model.config, description, TensorFiles([part]), out, dtype, **options)
    part.unlink()
    return out


def test_shards_and_index(tmp_path: Path) -> None:
    model = tiny_model()
    whole = write_folder(model, tmp_path / "whole", "float32")
    out = write_folder(model, tmp_path / "shards", "float32", shard_bytes=20_000)
    shards = sorted(out.glob("model-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 20_000 for shard in shards)
    ids = torch.arange(30)[None]
    assert torch.equal(their_logits(out, ids), their_logits(whole, ids))
    assert dict(read_hf(out).weights).keys() == dict(model.named_parameters()).keys()

    truncate(shards[1])
    with pytest.raises(UserError, match=r"model-00002-of-\d+.safetensors is truncated"):
        read_hf(out)
    shards[1].unlink()
    with pytest.raises(UserError, match="model-00002-of"):
        read_hf(out)
    (out / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="index"):
        read_hf(out)


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    out = write_folder(model, tmp_path / "hf", "float32")
    before = (out / "model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("model.hf.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            write_folder(tiny_model(seed=1), out, "float32")
    assert (out / "model.safetensors").read_bytes() == before
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    write_folder(tiny_model(seed=1), out, "float32")  # an earlier export is replaced
    assert (out / "model.safetensors").read_bytes() != before
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_targets_that_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="something else"):
        write_folder(model, tmp_path / "mine", "float32")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        write_folder(model, tmp_path / "file", "float32")
    with pytest.raises(UserError, match="dtype=int8"):
        write_folder(model, tmp_path / "new", "int8")
    assert not (tmp_path / "new").exists()


def test_export_needs_a_family_that_fits(tmp_path: Path) -> None:
    for changes in ({"qk_norm": True}, {"qkv_bias": True}, {"family": "gpt"}):
        config = replace(tiny_config(), **changes)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"model\.family"):
            export_hf(trained_run(tmp_path / str(changes), config, tiny_model(config)), tmp_path / "hf", "float32")
    assert not (tmp_path / "hf").exists()


def test_moba_settings_are_those_of_the_latest_moba_stage(tmp_path: Path) -> None:
    moba = AttentionConfig(
        kind="moba", block_size=32, topk=4, full_layers=[1], topk_warmup=[8], topk_warmup_until=0.5
    )
    size = {"seq_len": 64, "tokens": 512, "global_batch": 2}
    stages = {
        "a": StageConfig(**size),  # type: ignore[arg-type]
        "b": StageConfig(attention=moba, **size),  # type: ignore[arg-type]
        "c": StageConfig(**size),  # type: ignore[arg-type]
    }
    config = TrainConfig(model=tiny_config(num_layers=3), stages=stages)
    assert moba_settings(config, "a") is None
    expected = {"block_size": 32, "topk": 4, "layers": [0, 2]}
    assert moba_settings(config, "b") == moba_settings(config, "c") == expected


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        raw |= changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def write_index(folder: Path, file: object) -> None:
    weight_map = {"model.norm.weight": "model.safetensors", "lm_head.weight": file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BAD = {
    "architecture": (edit(architectures=["MixtralForCausalLM"], model_type="mixtral"), "MixtralForCausalLM"),
    "head": (edit(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "activation": (edit(hidden_act="gelu"), "hidden_act"),
    "bias": (edit(attention_bias=True), "attention_bias"),
    "mlp_bias": (edit(mlp_bias=True), "mlp_bias"),
    "quantized": (edit(quantization_config={"bits": 4}), "quantization_config"),
    "size": (edit(hidden_size="absent"), "hidden_size is missing"),
    "shape": (edit(intermediate_size=64), r"mlp.*shape \[.*the config says"),
    "heads": (edit(num_key_value_heads=3), "num_kv_heads"),
    "no_number": (edit(hidden_size="many"), 'hidden_size="many" is no int'),
    "no_size": (edit(num_hidden_layers=True), "num_hidden_layers=true is no int"),
    "type": (edit(model_type="foo"), "model_type=foo"),
    "index": (lambda folder: write_index(folder, 5), "index.json is damaged"),
    "outside": (lambda folder: write_index(folder, "../x.safetensors"), "no file of the folder"),
    "rope": (edit(rope_parameters={"rope_type": "longrope"}, rope_scaling=None), "longrope"),
    "not_json": (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
    "no_config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "missing": (edit_tensors(lambda t: t.pop("model.norm.weight")), "missing, such as model.norm.weight"),
    "extra": (edit_tensors(lambda t: t.update(extra=torch.ones(1))), "no place, such as extra"),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither"),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickles",
    ),
    "truncated": (lambda folder: truncate(folder / "model.safetensors"), "truncated"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_get_one_line(name: str, tmp_path: Path) -> None:
    damage, word = BAD[name]
    folder = write_folder(tiny_model(), tmp_path / "hf", "float32")
    damage(folder)
    with pytest.raises(UserError, match=word) as caught:
        read_hf(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral", {"sliding_window": 4096}),
        ("mistral", {"sliding_window": "absent"}),  # transformers' default is 4096
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_windows_are_refused(family: str, change: dict[str, object], tmp_path: Path) -> None:
    folder = write_folder(tiny_model(tiny_config(family)), tmp_path / "hf", "float32")
    edit(**change)(folder)
    with pytest.raises(UserError, match=r"window|layer_types"):
        read_hf(folder)


def test_what_old_folders_carry_is_passed_over(tmp_path: Path) -> None:
    """Frequency buffers of early Llama folders; the copy of a tied head."""
    model = tiny_model(tiny_config(tie_embeddings=True))
    folder = write_folder(model, tmp_path / "hf", "float32")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(add)(folder)
    assert [n for n, _ in read_hf(folder).weights] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_get_transformers_defaults(family: str, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    keys = {"model_type": family, "vocab_size": 50, "hidden_size": 4096, "intermediate_size": 64}
    keys |= {"num_hidden_layers": 1, "num_attention_heads": 32, "max_position_embeddings": 128}
    if family == "mistral":
        keys["sliding_window"] = None  # type: ignore[assignment]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(keys))
    want, got = AutoConfig.from_pretrained(tmp_path / "hf"), read_config_json(tmp_path / "hf").model
    assert got.num_kv_heads == want.num_key_value_heads
    assert got.head_dim == getattr(want, "head_dim", 4096 // 32)
    assert got.norm_eps == want.rms_norm_eps
    assert got.tie_embeddings == want.tie_word_embeddings
    assert read_config_json(tmp_path / "hf").rope.theta == want.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_that_transformers_reads_otherwise_is_told(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a config.json of qwen2, transformers takes Qwen2Tokenizer whatever the folder says; we do not."""
    words, text = tmp_path / "words", "def f(x):\n        return x  # 12345"
    trained = train_tokenizer([path.read_text() for path in Path(__file__).parent.glob("*.py")], 400, words)
    out = write_folder(
        tiny_model(tiny_config(family, vocab_size=400)), tmp_path / "hf", "float32", tokenizer=words
    )
    theirs = AutoTokenizer.from_pretrained(out)(text)["input_ids"]
    told = [message for message in caplog.messages if "PreTrainedTokenizerFast.from_pretrained" in message]
    assert bool(told) == (theirs != trained.encode(text)) == (family == "qwen2")
    assert PreTrainedTokenizerFast.from_pretrained(out)(text)["input_ids"] == trained.encode(text)
    again = load_tokenizer(out)
    assert again.encode(text) == trained.encode(text) and again.fingerprint == trained.fingerprint
