"""From a command line to a typed configuration: Hydra's compose API over the schema and the YAML groups.

Whatever Hydra or OmegaConf finds wrong leaves this module as a one-line UserError that names the key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import schema
from conf.docs import comment_of
from conf.errors import UserError

T = TypeVar("T")
CONF = Path(__file__).parent


@overload
def compose(root: Literal["train"], overrides: Sequence[str]) -> schema.TrainConfig: ...
@overload
def compose(root: Literal["prepare"], overrides: Sequence[str]) -> schema.PrepareConfig: ...
@overload
def compose(root: Literal["bench_loader"], overrides: Sequence[str]) -> schema.LoaderBenchConfig: ...
@overload
def compose(root: Literal["export"], overrides: Sequence[str]) -> schema.ExportConfig: ...
@overload
def compose(root: Literal["import"], overrides: Sequence[str]) -> schema.ImportConfig: ...
@overload
def compose(root: Literal["eval"], overrides: Sequence[str]) -> schema.EvalConfig: ...
@overload
def compose(root: Literal["bench"], overrides: Sequence[str]) -> schema.BenchConfig: ...
@overload
def compose(root: Literal["bench_step"], overrides: Sequence[str]) -> schema.StepBenchConfig: ...
@overload
def compose(root: Literal["bench_generate"], overrides: Sequence[str]) -> schema.GenerateBenchConfig: ...
@overload
def compose(root: Literal["study"], overrides: Sequence[str]) -> schema.StudyConfig: ...
def compose(root: str, overrides: Sequence[str]) -> Any:
    """Compose `conf/<root>.yaml` with plain Hydra overrides (`key=value`, `+x=..`, `~x`, `group=choice`).

    Returns the root's dataclass, interpolations resolved. Raises UserError: unknown key or choice (with
    close matches or the choices there are), wrong type, syntax, or a mandatory key without a value.
    """
    schema.register()
    return _typed(root, schema.ROOTS[root], overrides)


def compose_train(overrides: Sequence[str], complete: Callable[[DictConfig], None]) -> schema.TrainConfig:
    """As `compose("train", ...)`, with `complete` filling in what the command line left out, in place.

    `complete` gets the typed configuration before it is known to lack anything; it may raise UserError.
    """
    schema.register()
    return _typed("train", schema.TrainConfig, overrides, complete)


def compose_plan(overrides: Sequence[str], complete: Callable[[DictConfig], None]) -> schema.PlanConfig:
    """As `compose_train`, for `moba plan`."""
    schema.register()
    return _typed("plan", schema.PlanConfig, overrides, complete)


def recompose(config: schema.TrainConfig, overrides: Sequence[str]) -> schema.TrainConfig:
    """`config` (of an existing run) with overrides on top. Groups are no longer there to choose from."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_saved", node=config)
    return _typed("train_saved", schema.TrainConfig, overrides)


def group_choices() -> dict[str, list[str]]:
    """Every config group with its choices, from the folders beside this file."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir())
    found = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
    return {name: choices for name, choices in found.items() if choices}


def root_groups(root: str) -> list[str]:
    """The groups that `conf/<root>.yaml` lists, in its order: those a plain `group=choice` can set."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / f"{root}.yaml"))
    assert isinstance(defaults, dict)
    return [next(iter(entry)) for entry in defaults["defaults"] if isinstance(entry, dict)]


def override_keys(overrides: Sequence[str]) -> dict[str, Any]:
    """Key (or `group@package`) -> value of each override, as Hydra's grammar reads them."""
    return {p.get_key_element().lstrip("+~"): p.value() for p in _parse(overrides)}


def is_group(key: str) -> bool:
    """Whether an override's key chooses from a config group (`recipe`, `attention@stages.long.attention`)."""
    return "@" in key or key in group_choices()


def _typed(
    config_name: str, cls: type[T], overrides: Sequence[str], complete: Callable[[DictConfig], None] | None = None
) -> T:
    _parse(overrides)
    return _explained(config_name, overrides, lambda: _resolved(_hydra(config_name, overrides), cls, complete))


def _hydra(config_name: str, overrides: Sequence[str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    entries = [parsed for parsed in _parse(overrides) if _adds_entry(parsed.input_line)]
    rest = [item for item in overrides if not _adds_entry(item)]
    with initialize_config_module("conf", version_base="1.3"):
        composed = hydra_compose(config_name, overrides=rest)
    for parsed in entries:
        value: Any = parsed.value()
        for name in reversed(parsed.key_or_group.split(".")):
            value = {name: value}
        OmegaConf.set_struct(composed, False)
        composed = cast(DictConfig, OmegaConf.merge(composed, value))
    return composed


def _adds_entry(override: str) -> bool:
    """Whether it is `+key=...` in a dict of dataclasses (`+data.sets.web={path: x}`), where Hydra adds nothing."""
    return re.match(r"\+(data\.sets\.\w|stages\.[\w-]+\.data\.rules\.\w)", override) is not None


def _resolved(composed: DictConfig, cls: type[T], complete: Callable[[DictConfig], None] | None) -> T:
    # `+key` opens a typed node for any key: merging into a fresh schema closes it again.
    plain = OmegaConf.create(cast(Any, OmegaConf.to_container(composed)))
    typed = OmegaConf.merge(OmegaConf.structured(cls), plain)
    if complete is not None:
        complete(cast(DictConfig, typed))
    if missing := [path for path, node in _nodes(typed) if node._is_missing()]:
        raise UserError(_missing(cls, missing))
    return cast(T, OmegaConf.to_object(typed))


def _missing(cls: type[Any], keys: list[str]) -> str:
    shown = [key for key in keys if not key.startswith("model.")]
    parts = [f"{key}=..." + (f" ({text})" if (text := comment_of(cls, key)) else "") for key in shown]
    if len(shown) < len(keys):
        groups = group_choices()
        parts.append(f"recipe={'|'.join(groups['recipe'])} or model={'|'.join(groups['model'])} or init.hf=FOLDER")
    return f"missing: {', '.join(parts)}"


def _parse(overrides: Sequence[str]) -> list[Any]:
    """The overrides as Hydra's grammar reads them, one clear line for the first that it cannot."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), []
    for item in overrides:
        if item.startswith("-"):
            raise UserError(f"unknown option {item}: settings are written key=value, options are --help and --cfg")
        if item.startswith("=") or ("=" not in item and not item.startswith("~")):
            raise UserError(f"cannot read '{item}': settings are written key=value")
        try:
            parsed.append(parser.parse_override(item))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot read '{item}': {reason}; quote values with special characters") from error
        if parsed[-1].is_sweep_override():
            raise UserError(f"{item}: one value per key; a list is written {item.split('=')[0]}=[a,b]")
        group = item.split("=")[0].split("@")[0].lstrip("+~")
        if is_group(group) and not item.startswith("~") and not isinstance(parsed[-1].value(), (str, list)):
            raise UserError(f"{item}: no such choice; choices of {group}: {', '.join(group_choices()[group])}")
    return parsed


def _explained(config_name: str, overrides: Sequence[str], build: Callable[[], T]) -> T:
    """Run `build`, turning what Hydra and OmegaConf raise into one line."""
    from hydra.errors import HydraException, MissingConfigException

    try:
        return build()
    except UserError:
        raise
    except MissingConfigException as error:
        raise UserError(_unknown_choice(error)) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
        if isinstance(cause, OmegaConfBaseException):
            raise UserError(_bad_key(config_name, overrides, cause)) from error
        deleted = re.search(r"delete.*'(.+)' does not exist", str(error))
        if deleted:
            raise UserError(_unknown_key(config_name, overrides, deleted[1])) from error
        raise UserError(" ".join(str(error).split("\nTo append")[0].split()) + _group_hint(str(error))) from error


def _unknown_choice(error: Any) -> str:
    group, _, choice = str(error.missing_cfg_file).partition("/")
    choices = list(error.options or group_choices().get(group, []))
    close = difflib.get_close_matches(choice, choices, cutoff=0.6)
    hint = f"; did you mean {close[0]}" if close else ""
    return f"{group}={choice}: no such choice{hint}; choices of {group}: {', '.join(choices)}"


def _group_hint(message: str) -> str:
    known = group_choices()
    named = next((name for name in known if f"'{name}" in message), None)
    return f"; choices of {named}: {', '.join(known[named])}" if named else ""


def _bad_key(config_name: str, overrides: Sequence[str], cause: OmegaConfBaseException) -> str:
    key = str(cause.full_key or cause.key)
    message = str(cause.msg or cause).splitlines()[0]
    if "not in" not in message:  # a known key with a wrong value
        return f"{key}: {message}"
    return _unknown_key(config_name, overrides, key)


def _unknown_key(config_name: str, overrides: Sequence[str], key: str) -> str:
    try:  # the names of stages and data sets are known once the groups are chosen
        known = _hydra(config_name, [item for item in overrides if is_group(item.split("=", 1)[0].lstrip("+~"))])
    except Exception:  # a second fault in the groups: the schema alone gives the names
        known = OmegaConf.structured(schema.ROOTS[config_name.partition("_")[0]])
    paths = [path for path, _ in _nodes(known)]
    parent, _, name = key.rpartition(".")
    siblings = [path.rpartition(".")[2] for path in paths if path.rpartition(".")[0] == parent]
    prefix = f"{parent}." if parent else ""
    close = [prefix + found for found in difflib.get_close_matches(name, siblings, cutoff=0.7)]
    close = close or [path for path in paths if path.rpartition(".")[2] == name]
    if close:
        return f"unknown key {key}; did you mean {' or '.join(close[:3])}?"
    return f"unknown key {key}; keys of {parent or 'the top level'}: {', '.join(siblings)}"


def _nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and node of every key below `config`, groups of keys included."""
    for key in config:
        node = config._get_node(key)
        yield f"{prefix}{key}", node
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            yield from _nodes(node, f"{prefix}{key}.")
