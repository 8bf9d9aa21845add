"""The whole path: a folder of transformers -> training with a kill in it -> a folder of transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.paths import RunPaths
from launch.packages import ROOT
from tests.launch.folders import save_llama, save_texts

S = "stages.extend"


def command(hf: Path, texts: Path, out: Path) -> list[str]:
    # fmt: off
    return [
        sys.executable, "-m", "launch.cli", "train", "recipe=extend_to_32k", f"init.hf={hf}", f"out={out}",
        f"data.sets.text.source={texts}", "launch.nproc=2", "engine.precision=fp32", f"{S}.seq_len=256",
        f"{S}.global_batch=4", f"{S}.tokens=12288", f"{S}.rope.factor=2", f"{S}.attention.block_size=16",
        f"{S}.attention.topk=3", f"{S}.attention.full_last_layers=1", f"{S}.lr.peak=3e-3", "checkpoint.every=2",
        "eval.every=0", "eval.tokens=512",
    ]
    # fmt: on


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file)


def rows(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in RunPaths(out).metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in read]


@pytest.mark.slow
def test_continue_pretraining_of_a_folder(tmp_path: Path) -> None:
    hf, texts, log = save_llama(tmp_path / "hf"), save_texts(tmp_path / "texts"), tmp_path / "log"
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert start(command(hf, texts, alone), log).wait(timeout=240) == 0, log.read_text()

    train = start(command(hf, texts, killed), log)
    deadline = time.monotonic() + 240
    while not (RunPaths(killed).checkpoints / "step-00000004").is_dir():
        assert train.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    train.send_signal(signal.SIGKILL)
    train.wait()
    assert start(command(hf, texts, killed), log).wait(timeout=240) == 0, log.read_text()
    assert rows(killed) == rows(alone)  # loss, gradient norm, held-out loss: bit for bit
    assert [row["plan"] for row in rows(killed) if row["kind"] == "train"][-3:] == [
        "0 moba 16x3, 1 full", "0 moba 16x3, 1 full", "full"
    ]  # fmt: skip
    losses = [row["heldout_loss"] for row in rows(killed) if row["kind"] == "eval"]
    assert losses[-1] < losses[0]
    check_export(killed, tmp_path / "export")


def check_export(run: Path, out: Path) -> None:
    """The exported folder in transformers, full and MoBA, beside our model with the same plans."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.load import load_model
    from model.hf import export_hf
    from model.hf_attention import register_moba
    from model.schedule import FULL, LayerPlan

    export_hf(run, out, "float32")
    register_moba()
    text = (Path(__file__).read_text() * 2)[:3000]
    ids = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")["input_ids"][:, :250]
    assert ids.shape == (1, 250)
    ours = load_model(run, torch.device("cpu")).model
    length = ids.shape[1]
    where = {"cu_seqlens": torch.tensor([0, length], dtype=torch.int32), "max_seqlen": length}
    answers = {}
    moba = LayerPlan("moba", 16, 3)
    for name, plans in {"sdpa": (FULL, FULL), "moba": (moba, FULL)}.items():
        theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation=name).eval()
        with torch.no_grad():
            want = theirs(ids, labels=ids)
            got = ours.logits(ours.hidden(ids, torch.arange(length)[None], plans=plans, **where))
        loss = torch.nn.functional.cross_entropy(got[0, :-1].float(), ids[0, 1:])
        error = float((got - want.logits).abs().max())
        print(f"{name}: logits differ by {error:.1e}, loss {float(loss):.6f} and {float(want.loss):.6f}")
        assert error < 1e-4 and torch.equal(got.argmax(-1), want.logits.argmax(-1))
        assert abs(float(loss) - float(want.loss)) < 1e-5
        answers[name] = got
    assert (answers["sdpa"] - answers["moba"]).abs().max() > 1e-3  # the two attentions are not the same
