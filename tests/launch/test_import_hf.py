"""Hugging Face folder -> checkpoint -> Hugging Face folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.errors import UserError
from launch.cli import main
from launch.import_hf import import_hf
from launch.packages import ROOT
from model.hf import export_hf
from model.weights import checkpoint_tensors, verify_checkpoint
from tests.launch.folders import save_llama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def one_file(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def test_round_trip_is_bit_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save_llama(tmp_path / "hf", dtype="bfloat16", rope_parameters=LLAMA3, max_position_embeddings=512)
    out = tmp_path / "checkpoint"
    assert main(["import", f"hf={hf}", f"out={out}"]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    verify_checkpoint(out)
    assert {tensor.dtype for _, tensor in checkpoint_tensors(out)} == {torch.bfloat16}
    state = json.loads((out / "state.json").read_text())
    assert (state["step"], state["stage_done"], state["optimizer_step"]) == (0, True, 0)
    back = export_hf(out, tmp_path / "back", "bfloat16")
    first, second = one_file(hf), one_file(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.int16), second[name].view(torch.int16)) for name in first)
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (hf, back))
    for key in ("rope_parameters", "max_position_embeddings", "num_key_value_heads", "rms_norm_eps"):
        assert one[key] == two[key]
    assert (hf / "tokenizer.json").read_text() == (back / "tokenizer.json").read_text()
    assert main(["import", f"hf={hf}", f"out={out}"]) == 0  # again, over the first
    verify_checkpoint(out)


def test_moba_layers_of_a_folder_survive(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    description = json.loads((hf / "config.json").read_text())
    moba = {"block_size": 32, "topk": 2, "layers": [0]}
    (hf / "config.json").write_text(json.dumps({**description, "moba": moba}))
    import_hf(hf, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", "float32")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["moba"] == moba


@pytest.mark.parametrize("said", [{"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6}, [], None])
def test_what_ends_an_answer_survives(said: object, tmp_path: Path) -> None:
    """Instruction-tuned folders name several ids, of which the tokenizer knows one."""
    from transformers import AutoModelForCausalLM

    hf, out = save_llama(tmp_path / "hf"), tmp_path / "checkpoint"
    (hf / "generation_config.json").unlink()
    if said is not None:
        (hf / "generation_config.json").write_text(json.dumps(said))
    import_hf(hf, out)
    back = AutoModelForCausalLM.from_pretrained(export_hf(out, tmp_path / "back", "float32")).generation_config
    wanted = said if isinstance(said, dict) else {"eos_token_id": 2, "do_sample": False}
    assert {key: getattr(back, key) for key in wanted} == wanted and back.bos_token_id == 1


def test_memory_is_far_below_one_shard(tmp_path: Path) -> None:
    """14 shards of about 24 MB: the process grows by less than one of them."""
    small = save_llama(tmp_path / "small")
    big = save_llama(
        tmp_path / "big", hidden_size=768, intermediate_size=1536, num_hidden_layers=14, max_shard_size="24MB"
    )
    shards = [file.stat().st_size for file in big.glob("*.safetensors")]
    assert len(shards) >= 12
    command = [
        sys.executable,
        "-m",
        "tests.launch.import_job",
        str(small),
        str(big),
        str(tmp_path / "out"),
        str(4 << 20),
    ]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is given back at once
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    print(
        f"{sum(shards) / 1e6:.0f} MB in {len(shards)} shards, {max(shards) / 1e6:.0f} each: grew {grown / 1e6:.1f}"
    )
    assert grown < max(shards)


@pytest.mark.parametrize("harm", ["architecture", "tensor", "truncated", "tokenizer", "vocabulary", "target"])
def test_what_is_refused_writes_nothing(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save_llama(tmp_path / "hf", tokenizer=harm in ("target",))
    config, out, extra = hf / "config.json", tmp_path / "out" / "checkpoint", []
    wanted = {"architecture": "is not supported", "tensor": "has shape", "truncated": "truncated"}.get(harm, harm)
    if harm == "architecture":
        config.write_text(config.read_text().replace("LlamaForCausalLM", "GemmaForCausalLM"))
    elif harm == "tensor":
        config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 95'))
    elif harm == "truncated":
        (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:5000])
    elif harm == "vocabulary":
        other = save_llama(tmp_path / "other", vocab_size=401)
        small = save_llama(tmp_path / "small", tokenizer=False, vocab_size=350)
        hf, extra, wanted = small, [f"tokenizer={other}"], "has 400 tokens"
    elif harm == "target":
        out.mkdir(parents=True)
        (out / "thesis.txt").write_text("all of it")
        wanted = "holds something else"
    assert main(["import", f"hf={hf}", f"out={out}", *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and wanted in error
    left = [path.name for path in out.parent.glob("*")] if out.parent.exists() else []
    assert left == (["checkpoint"] if harm == "target" else [])


def test_a_failed_import_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = save_llama(tmp_path / "hf")
    out = import_hf(hf, tmp_path / "checkpoint")
    before = (out / "manifest.json").read_text()

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("train.checkpoint.write_tensors", full_disk)
    with pytest.raises(OSError, match="disk full"):
        import_hf(hf, out)
    monkeypatch.undo()
    verify_checkpoint(out)
    assert (out / "manifest.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]


def test_no_length_no_import(tmp_path: Path) -> None:
    hf = save_llama(tmp_path / "hf")
    description = json.loads((hf / "config.json").read_text())
    del description["max_position_embeddings"]
    (hf / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="max_position_embeddings"):
        import_hf(hf, tmp_path / "checkpoint")
