"""Starting from a folder: every ZeRO stage from the same weights, no rank with the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import UserError
from conf.schema import TrainConfig
from model.hf import read_hf
from tests.gloo import GlooPool, WorkerError
from tests.launch.folders import save_llama
from tests.train import init_jobs
from train.mesh import Mesh
from train.origin import open_origin


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, so that masters are exact in both precisions."""
    path = tmp_path_factory.mktemp("hf") / "llama"
    return save_llama(
        path, tokenizer=False, vocab_size=67, hidden_size=36, num_attention_heads=6, dtype="bfloat16"
    )


def test_zero3_starts_as_zero0_and_as_the_folder(pool2: GlooPool, folder: Path) -> None:
    want = {name: tensor.float().numpy() for name, tensor in read_hf(folder).weights}
    results = {stage: pool2(init_jobs.first_loss, str(folder), stage, "fp32")[0] for stage in (0, 1, 3)}
    for stage, result in results.items():
        assert result["masters"].keys() == want.keys()
        for name, tensor in want.items():
            np.testing.assert_array_equal(result["masters"][name], tensor, err_msg=f"ZeRO {stage} {name}")
    np.testing.assert_allclose(results[1]["loss"], results[0]["loss"], rtol=1e-6)
    np.testing.assert_allclose(results[3]["loss"], results[0]["loss"], rtol=1e-6)


def test_bf16_keeps_fp32_frequencies_and_masters(pool2: GlooPool, folder: Path) -> None:
    """ZeRO-3's construction rounds every tensor made inside: neither RoPE nor the masters may suffer."""
    zero1, zero3 = (pool2(init_jobs.first_loss, str(folder), stage, "bf16")[0] for stage in (1, 3))
    assert zero3["loss"][0] == pytest.approx(zero1["loss"][0], rel=1e-6)
    assert zero3["loss"][1] == pytest.approx(zero1["loss"][1], rel=2e-3)  # gradients are summed in another order
    for name, tensor in read_hf(folder).weights:
        np.testing.assert_array_equal(zero3["masters"][name], tensor.float().numpy())


def test_key_convolution_is_added_as_the_identity(pool2: GlooPool, folder: Path) -> None:
    plain = pool2(init_jobs.first_loss, str(folder), 0, "fp32")[0]
    for stage in (0, 3):
        added = pool2(init_jobs.first_loss, str(folder), stage, "fp32", 3)[0]
        assert added["loss"][0] == pytest.approx(plain["loss"][0], rel=1e-6)
        assert added["masters"].keys() - plain["masters"].keys() == {
            f"model.layers.{layer}.self_attn.key_conv.weight" for layer in (0, 1)
        }


def test_an_imported_checkpoint_starts_as_its_folder(pool2: GlooPool, tmp_path: Path) -> None:
    from launch.import_hf import import_hf

    hf = save_llama(tmp_path / "hf")
    out = import_hf(hf, tmp_path / "imported")
    want = pool2(init_jobs.first_loss, str(hf), 3, "fp32")[0]
    got = pool2(init_jobs.first_loss, str(hf), 3, "fp32", 0, str(out))[0]
    assert got["loss"] == want["loss"]
    (out / "weights-00000.safetensors").write_bytes(b"")
    with pytest.raises(WorkerError, match=r"weights-00000\.safetensors holds 0 bytes"):
        pool2(init_jobs.first_loss, str(hf), 3, "fp32", 0, str(out))


def test_no_rank_holds_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors in pages of their own, given back when freed: otherwise holes in the C heap count as memory in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    pool = GlooPool(2)
    big = save_llama(
        tmp_path / "big", tokenizer=False, vocab_size=1000, hidden_size=512, intermediate_size=1024,
        num_hidden_layers=12, max_shard_size="20MB",
    )  # fmt: skip
    results = pool(init_jobs.memory_of_init, str(big))
    pool.close()
    for sizes in results:
        print({name: f"{size / 2**20:.1f} MiB" for name, size in sizes.items()})
        assert sizes["whole"] > 100e6
        assert sizes["held"] <= 0.52 * sizes["whole"]
        assert sizes["masters"] <= 0.52 * sizes["whole"]
        assert sizes["peak"] < 0.52 * sizes["whole"] + 32 * 2**20  # half, and a few tensors on their way


def test_a_bad_folder_is_told_by_every_rank(tmp_path: Path) -> None:
    mesh = Mesh(rank=0, world=1, sp_world=1, device=torch.device("cpu"), sp_group=None)
    config = TrainConfig(out="x")
    config.init.hf = str(tmp_path)
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        open_origin(config, None, mesh)
