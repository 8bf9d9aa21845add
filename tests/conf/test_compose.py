from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import compose, group_choices, is_group, override_keys, recompose
from conf.errors import UserError
from conf.load import load_train_config, save_config
from conf.schema import EvalConfig, ExportConfig, PrepareConfig, TrainConfig
from conf.validate import validate

QUICK = ["recipe=quickstart", "out=runs/x"]


def refusal(overrides: list[str], root: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        compose(root, overrides)  # type: ignore[call-overload]
    message = str(caught.value)
    assert "\n" not in message
    return message


# Recipes that bring no model of their own: one that fits, and the processes they are made for.
NEEDS_MODEL = {
    "extend_to_32k": ("llama_1b", 8),
    "llama8b_1m_moba": ("llama3_8b", 8),
    "moba_hybrid": ("moba_1_5b", 8),
    "prolong_64k_512k": ("llama3_8b", 8),
}


def sizes() -> list[tuple[str, int]]:
    """Every other recipe on one and two processes; an arm of a study runs on one."""
    names = [name for name in group_choices()["recipe"] if name not in NEEDS_MODEL]
    return [(name, nproc) for name in names for nproc in ([1] if name.startswith("study") else [1, 2])]


@pytest.mark.parametrize(("recipe", "nproc"), sizes())
def test_every_recipe_composes_and_validates(recipe: str, nproc: int) -> None:
    config = compose("train", [f"recipe={recipe}", "out=runs/x"])
    assert isinstance(config, TrainConfig)
    validate(config, nproc)


@pytest.mark.parametrize("recipe", NEEDS_MODEL)
def test_recipes_fit_their_natural_world_size(recipe: str) -> None:
    model, nproc = NEEDS_MODEL[recipe]
    config = compose("train", [f"recipe={recipe}", f"model={model}", "out=runs/x"])
    assert config.launch.nproc == nproc
    validate(config, nproc)
    with pytest.raises(UserError, match=r"missing: recipe=.* or model=.* or init\.hf=FOLDER"):
        compose("train", [f"recipe={recipe}", "out=runs/x"])


def test_quickstart_is_the_chain_it_promises() -> None:
    config = compose("train", QUICK)
    assert list(config.stages) == ["short", "long", "full"]  # the order is the chain
    assert [stage.attention.kind for stage in config.stages.values()] == ["full", "moba", "full"]
    short, long, _ = config.stages.values()
    assert long.seq_len > short.seq_len and long.rope.theta > short.rope.theta
    assert (long.attention.block_size, long.attention.topk, long.attention.full_last_layers) == (64, 4, 1)
    assert config.engine.precision == "fp32" and config.launch.nproc == 2


@pytest.mark.parametrize("group", ["model", "engine", "data", "launch"])
def test_every_choice_composes(group: str) -> None:
    for choice in group_choices()[group]:
        assert isinstance(compose("train", [*QUICK, f"{group}={choice}"]), TrainConfig)


@pytest.mark.parametrize("choice", group_choices()["attention"])
def test_attention_of_one_stage(choice: str) -> None:
    config = compose("train", [*QUICK, f"attention@stages.long.attention={choice}"])
    assert config.stages["long"].attention.kind == choice.split("_")[0]
    assert config.stages["short"].attention.kind == "full"


@pytest.mark.parametrize("choice", group_choices()["stage"])
def test_a_stage_can_be_added_and_removed(choice: str) -> None:
    sizes = "+stages.more={seq_len: 2048, tokens: 81920, global_batch: 4, data: {domains: {stdlib: 1.0}}}"
    config = compose("train", [*QUICK, f"+stage@stages.more={choice}", sizes, "~stages.full"])
    assert list(config.stages) == ["short", "long", "more"]
    assert config.stages["more"].attention.kind == ("full" if choice == "full" else "moba")


def test_other_roots() -> None:
    assert compose("export", ["checkpoint=a", "out=b"]) == ExportConfig(checkpoint="a", out="b")
    assert compose("prepare", ["source=stdlib", "out=b", "heldout=0.1"]) == PrepareConfig("b", "stdlib", 0.1)
    evaluation = compose("eval", ["checkpoint=a", "out=b", "attention.topk=2", "ruler.lengths=[64,128]"])
    assert isinstance(evaluation, EvalConfig)
    assert evaluation.attention.topk == 2 and evaluation.ruler.lengths == [64, 128]


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("stages.short.lr.peek=3", ["stages.short.lr.peek", "stages.short.lr.peak"]),
        ("stages.shrot.seq_len=64", ["stages.shrot", "stages.short"]),
        ("zero_stage=1", ["zero_stage", "engine.zero_stage"]),
        ("engine.zero=1", ["engine.zero", "zero_stage, precision"]),
        ("+zzz=1", ["zzz", "seed"]),
        ("~zzz", ["zzz", "seed"]),
        ("recipe=quickstrat", ["recipe=quickstrat", "quickstart", "smoke"]),
        ("recipe=3", ["recipe=3", "quickstart"]),
        ("model=zzz", ["model=zzz", "tiny"]),
        ("attention@stages.zzz.attention=moba", ["stages.zzz", "stages.long"]),
        ("attention@stages.long.attention=zzz", ["attention=zzz", "moba"]),
        ("seed=abc", ["seed", "abc", "Integer"]),
        ("stages.long.rope=3", ["stages.long.rope", "RopeConfig"]),
        ("data.sets.stdlib.path=${nothing}", ["data.sets.stdlib.path", "nothing"]),
        ("seed", ["'seed'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("--seed=3", ["--seed", "--help"]),
        ("seed=[1", ["seed=[1"]),
        ("seed=1,2", ["seed=1,2", "seed=[a,b]"]),
    ],
)
def test_what_is_wrong_is_told_in_one_line(override: str, wanted: list[str]) -> None:
    message = refusal([override] if override.startswith("recipe") else [*QUICK, override])
    for text in wanted:
        assert text in message


def test_missing_values_are_named() -> None:
    assert refusal(["recipe=quickstart"]) == "missing: out=... (run folder)"
    assert "|quickstart|smoke" in refusal(["out=x"]) and " or model=" in refusal(["out=x"])
    assert "stages.m.seq_len" in refusal([*QUICK, "+stage@stages.m=full"])
    assert "source=... (stdlib |" in refusal(["out=x"], root="prepare")


def test_wrong_group_for_a_root() -> None:
    assert "recipe" in refusal(["out=x", "source=stdlib", "recipe=quickstart"], root="prepare")


def test_recompose_changes_a_saved_configuration(tmp_path: Path) -> None:
    config = compose("train", [*QUICK, "seed=7"])
    save_config(config, tmp_path / "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    saved = load_train_config(tmp_path / "config.yaml")
    assert saved == config
    again = recompose(saved, ["max_steps=5", "stages.long.lr.peak=1e-4"])
    assert (again.seed, again.max_steps, again.stages["long"].lr.peak) == (7, 5, 1e-4)
    with pytest.raises(UserError, match=r"unknown key sed; did you mean seed\?"):
        recompose(saved, ["sed=4"])


def test_override_keys() -> None:
    asked = override_keys(["a=1", "+stage@stages.b=full", "~f", "out=runs/x y"])
    assert asked == {"a": 1, "stage@stages.b": "full", "f": None, "out": "runs/x y"}
    assert [is_group(key) for key in asked] == [False, True, False, False]


def test_a_data_set_or_a_rule_is_added_by_name() -> None:
    config = compose("train", [*QUICK, "+data.sets.web={path: x, source: y}", "+stages.long.data.rules.a.set=web"])
    assert (config.data.sets["web"].path, config.data.sets["web"].source) == ("x", "y")
    assert config.stages["long"].data.rules["a"].set == "web" and "stdlib" in config.data.sets
    assert "data.sets.web.pth" in refusal([*QUICK, "+data.sets.web={pth: x}"])
