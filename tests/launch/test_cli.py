from __future__ import annotations

from pathlib import Path

import pytest

from conf.docs import walk
from conf.errors import UserError
from conf.load import load_train_config, to_typed
from conf.schema import ROOTS, TrainConfig
from launch import cli, train
from launch.cli import COMMANDS, main
from launch.packages import check_packages

SMOKE = ["train", "recipe=smoke"]


def test_overview_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for command in COMMANDS.values():
        assert command.name in bare and command.summary in bare
    assert {command.root for command in COMMANDS.values()} == set(ROOTS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    for doc in walk(ROOTS[COMMANDS[name].root]):
        row = next(line for line in text.splitlines() if line.split() and line.split()[0] == doc.key)
        assert doc.type in row
        assert not doc.comment or doc.comment.split()[0] in row
    for example in COMMANDS[name].examples:
        assert example in text


def test_help_shows_groups_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    text = capsys.readouterr().out
    for words in (
        ["recipe", "quickstart,", "smoke"],
        ["model", "tiny"],
        ["stage", "full,"],
        ["attention", "moba"],
    ):
        assert any(all(word in line for word in words) for line in text.splitlines()), words


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_compose(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in COMMANDS[name].examples:
        words = example.split("#")[0].split()
        assert words[: 1 + len(name.split())] == ["moba", *name.split()]
        settings = words[1 + len(name.split()) :]
        if settings != ["out=runs/x", "launch.nproc=1"]:  # that one goes on with a run that is not here
            COMMANDS[name].resolve(settings)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    known = ", ".join(COMMANDS)
    assert capsys.readouterr().err == f"error: unknown command trian: there are {known} (moba --help)\n"


def test_bad_key_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*SMOKE, f"out={tmp_path / 'run'}", "sed=3"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: unknown key sed; did you mean seed?\n" and not printed.out
    assert not (tmp_path / "run").exists()


def test_cfg_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    assert main([*SMOKE, "out=runs/y", "seed=9", "--cfg"]) == 0
    printed = to_typed(OmegaConf.create(capsys.readouterr().out), TrainConfig, "printed")
    assert printed.seed == 9 and printed.data.sets["text"].path == "runs/y/data"


def test_dry_run_prints_the_plan_and_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*SMOKE, f"out={out}", "dry_run=true", "stages.long.attention.full_after=0.9"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("short", "long", "0 moba 16x2", "from 90%", "theta 40000", "10 steps; stops at 10", "text 100%"):
        assert part in text, part
    assert not out.exists()


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert main(["train"]) == 130


def test_another_package_of_our_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.machinery import ModuleSpec

    foreign = ModuleSpec("data", None, origin="/elsewhere/data/__init__.py")
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: foreign if name == "data" else real(name))
    with pytest.raises(UserError, match="'data' resolves to /elsewhere"):
        check_packages()


def test_set_without_source_must_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*SMOKE, f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "data.sets.text.path" in error and "data.sets.text.source=FOLDER" in error
    assert not (tmp_path / "config.yaml").exists()


class TestDataOnDemand:
    """Through the real preparation, with the workers replaced by a recorder."""

    @pytest.fixture
    def texts(self, tmp_path: Path) -> Path:
        folder = tmp_path / "texts"
        folder.mkdir()
        for index, path in enumerate(sorted(Path(train.__file__).parents[1].glob("*/*.py"))[:40]):
            (folder / f"{index}.py").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        return folder

    def test_train_prepares_then_starts(
        self, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        started: list[list[str]] = []
        begin = lambda config, paths, lock: started.append(list(config.stages)) or 5  # noqa: E731
        monkeypatch.setattr(train, "starter", lambda launch: begin)
        command = [*SMOKE, f"out={tmp_path / 'run'}", f"data.sets.text.source={texts}", "seed=4"]
        assert main(command) == 5  # what the workers said
        assert started == [["short", "long", "full"]]
        assert load_train_config(tmp_path / "run" / "config.yaml").seed == 4
        assert (tmp_path / "run" / "data" / "manifest.json").is_file()

        # the run goes on with its own configuration
        assert main(["train", f"out={tmp_path / 'run'}", "max_steps=3"]) == 5
        saved = load_train_config(tmp_path / "run" / "config.yaml")
        assert saved.seed == 4 and saved.max_steps == 3

        # and, once something is trained, with no other
        (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
        capsys.readouterr()
        assert main(["train", f"out={tmp_path / 'run'}", "seed=5"]) == 2
        error = capsys.readouterr().err
        assert "seed=4" in error and "seed=5" in error and "another out=" in error

        # a model that is too small for the tokenizer
        small = ["model.vocab_size=400", "data.tokenizer.train_vocab_size=400", f"out={tmp_path / 'other'}"]
        assert main([*SMOKE, f"data.sets.text.path={tmp_path / 'run' / 'data'}", *small]) == 2
        assert "model.vocab_size=400" in capsys.readouterr().err
        assert len(started) == 2
