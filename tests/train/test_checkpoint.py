"""Checkpoints: any world and ZeRO stage to any other, bit-equal resume, kills, damage, full disks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from conf.paths import checkpoint_name
from tests.gloo import GlooPool
from tests.train import jobs, save_jobs
from train.checkpoint import prune
from train.shards import deal, plan_shards

PAIRS = [  # saved by (world, ZeRO stage, precision), loaded by (world, ZeRO stage, precision)
    ((2, 3, "fp32"), (1, 0, "fp32")),
    ((1, 0, "fp32"), (2, 3, "fp32")),
    ((2, 0, "fp32"), (2, 2, "fp32")),
    ((2, 1, "fp32"), (2, 3, "fp32")),
    ((2, 2, "fp32"), (1, 1, "fp32")),
    ((2, 3, "fp32"), (2, 1, "fp32")),
    ((2, 3, "bf16"), (1, 1, "bf16")),
    ((2, 1, "bf16"), (2, 2, "bf16")),
    ((1, 2, "bf16"), (2, 3, "bf16")),
]


@pytest.mark.parametrize(("saver", "loader"), PAIRS)
def test_round_trip(pools: dict[int, GlooPool], tmp_path: Path, saver: tuple, loader: tuple) -> None:
    """Masters, moments and step count arrive bit for bit, and so does the model's own rounded copy."""
    world, zero_stage, precision = saver
    saved = pools[world](jobs.train, zero_stage, precision, 3, "", str(tmp_path))[0]
    path = tmp_path / checkpoint_name(3)
    world, zero_stage, precision = loader
    for got in pools[world](jobs.loaded, zero_stage, precision, str(path)):
        assert got["optimizer_step"] == 3
        assert got["tensors"].keys() == saved["tensors"].keys()
        for name, tensor in saved["tensors"].items():
            np.testing.assert_array_equal(got["tensors"][name], tensor, err_msg=name)
        for name, tensor in got.get("model", {}).items():
            tolerance = 2**-8 if precision == "bf16" else 0
            np.testing.assert_allclose(tensor, saved["tensors"][f":{name}"], rtol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("world", "zero_stage", "precision"),
    [(1, 0, "fp32"), *((2, z, "fp32") for z in range(4)), *((2, z, "bf16") for z in (1, 2, 3))],
)
def test_resume_is_bit_equal(
    pools: dict[int, GlooPool], tmp_path: Path, world: int, zero_stage: int, precision: str
) -> None:
    pool = pools[world]
    whole = pool(jobs.train, zero_stage, precision)[0]
    pool(jobs.train, zero_stage, precision, 3, "", str(tmp_path))
    rest = pool(jobs.train, zero_stage, precision, None, str(tmp_path / checkpoint_name(3)))[0]
    assert rest["loss"] == whole["loss"][3:]
    assert rest["grad_norm"] == whole["grad_norm"][3:]
    for name, tensor in whole["tensors"].items():
        np.testing.assert_array_equal(rest["tensors"][name], tensor, err_msg=name)


def test_resume_elsewhere_goes_on_alike(pools: dict[int, GlooPool], tmp_path: Path) -> None:
    whole = pools[2](jobs.train, 2)[0]
    pools[2](jobs.train, 2, "fp32", 3, "", str(tmp_path))
    for world, zero_stage in ((1, 0), (1, 3), (2, 3)):
        rest = pools[world](jobs.train, zero_stage, "fp32", None, str(tmp_path / checkpoint_name(3)))[0]
        np.testing.assert_allclose(rest["loss"], whole["loss"][3:], rtol=1e-5)
        for name, tensor in whole["tensors"].items():
            np.testing.assert_allclose(rest["tensors"][name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)


def test_what_lies_on_disk(pool2: GlooPool, tmp_path: Path) -> None:
    """Plain fp32 tensors under the model's names, each once, and a manifest of everything."""
    (tmp_path / jobs.TOKENIZER).mkdir()
    (tmp_path / jobs.TOKENIZER / "vocab.txt").write_text("stands for a tokenizer")
    saved = pool2(jobs.train, 3, "fp32", 2, "", str(tmp_path))[0]
    path = tmp_path / checkpoint_name(2)
    weights: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("weights-*.safetensors")):
        part = load_file(file)
        assert not part.keys() & weights.keys()
        weights |= part
    assert weights.keys() == {name[1:] for name in saved["tensors"] if name.startswith(":")}
    assert all(tensor.dtype == np.float32 for tensor in weights.values())
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert files.keys() | {"manifest.json"} == {
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()
    }
    assert {"state.json", "config.yaml", "tokenizer/vocab.txt"} <= files.keys()


def test_a_kill_at_any_point_leaves_a_valid_checkpoint(pool1: GlooPool, tmp_path: Path) -> None:
    outcomes = pool1(save_jobs.interrupted_saves, str(tmp_path))[0]
    assert len(outcomes) > 6
    *killed, completed = outcomes
    assert completed[1:] == (checkpoint_name(2), False)
    assert all(died for _, _, died in killed)
    # Only the last point, the flush of the parent folder after the rename, may already show step 2.
    assert {name for _, name, _ in killed[:-1]} == {checkpoint_name(1)}
    assert not list(tmp_path.glob(".tmp-*"))  # leftovers are cleared by the next save


def test_a_full_disk_on_one_rank_stops_all_with_one_line(pool2: GlooPool, tmp_path: Path) -> None:
    for result in pool2(save_jobs.full_disk, str(tmp_path)):
        assert "rank 1: No space left on device" in result["message"]
        assert "\n" not in result["message"]
        assert result["after_failure"] == []
        assert result["newest"] == checkpoint_name(1)
        assert result["left"] == [checkpoint_name(1)]


def truncate(path: Path) -> None:
    file = next(path.glob("optim-*"))
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    file = next(path.glob("weights-*"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x10
    file.write_bytes(bytes(data))


def lose_a_file(path: Path) -> None:
    (path / "state.json").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_a_file, lose_the_manifest])
def test_damage_falls_back_loudly(pool1: GlooPool, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    first, second = checkpoint_name(2), checkpoint_name(4)
    pool1(jobs.train, 0, "fp32", 2, "", str(tmp_path))
    pool1(jobs.train, 0, "fp32", 4, str(tmp_path / first), str(tmp_path))
    assert pool1(jobs.newest, str(tmp_path))[0] == (second, "")
    damage(tmp_path / second)
    found, said = pool1(jobs.newest, str(tmp_path))[0]
    assert found == first
    assert f"WARNING: checkpoint {second} is damaged" in said
    assert (tmp_path / f".invalid-{second}").is_dir()
    damage(tmp_path / first)
    found, said = pool1(jobs.newest, str(tmp_path))[0]
    assert found.startswith("UserError") and "no checkpoint is valid" in found


def test_no_checkpoint_at_all(pool1: GlooPool, tmp_path: Path) -> None:
    assert pool1(jobs.newest, str(tmp_path / "absent"))[0] == ("None", "")


def test_prune_keeps_the_newest_and_the_ends_of_stages(tmp_path: Path) -> None:
    for step in range(1, 8):
        folder = tmp_path / checkpoint_name(step)
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"stage": "s", "step": step, "stage_done": step == 3}))
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(s) for s in (3, 6, 7)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_hold_every_parameter_once_and_respect_the_limit(world: int) -> None:
    sizes = {f"p{i}": 4 * (i % 7 + 1) for i in range(50)} | {"huge": 1000}
    shards = plan_shards(sizes, world, limit=64)
    assert [name for shard in shards for name in shard] == list(sizes)
    assert all(sum(sizes[n] for n in shard) <= 64 or shard == ["huge"] for shard in shards)
    assert len(plan_shards({"a": 10, "b": 10, "c": 10, "d": 10}, world)) >= world


def test_what_has_a_home_is_written_there_and_the_rest_takes_turns() -> None:
    sizes = {f"p{i}": 8 for i in range(12)}
    homes = {f"p{i}": i // 4 for i in range(8)}
    shards = deal(sizes, homes, world=3, limit=16)
    assert sorted(name for _, names in shards for name in names) == sorted(sizes)
    for owner, names in shards:
        assert len(names) <= 2 and ({homes[name] for name in names if name in homes} <= {owner})
        assert len({name in homes for name in names}) == 1  # never both kinds in one: only the rest is collective
    assert sorted({owner for owner, names in shards if names[0] not in homes}) == [0, 1, 2]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_partitions_are_saved_without_the_other_ranks(pool2: GlooPool, zero_stage: int) -> None:
    """All parameters but the one or two that a border cuts lie whole on a rank, and read there as they do full."""
    whole, cut, equal = pool2(save_jobs.own_and_full, zero_stage)[0]
    assert len(whole) == 2 and all(whole) and len(cut) <= 2 and equal
