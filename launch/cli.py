"""The `moba` command: `moba COMMAND key=value ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conf.constants import EXIT_USER_ERROR
from conf.errors import UserError, complain
from launch import (
    bench,
    bench_generate,
    bench_loader,
    bench_step,
    evaluate,
    export,
    import_hf,
    plan,
    prepare,
    train,
)
from launch.command import Command
from launch.help import overview, show
from launch.packages import check_packages
from launch.study import command as study

_MODULES = (
    train, plan, prepare, import_hf, export, evaluate, study, bench, bench_step, bench_generate, bench_loader,
)  # fmt: skip
COMMANDS: dict[str, Command] = {module.COMMAND.name: module.COMMAND for module in _MODULES}
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code.

    0 done; 2 bad input, told in one line on stderr, nothing started; 130 interrupted; else what failed inside.
    """
    try:
        check_packages()
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        complain(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        overview(list(COMMANDS.values()))
        return 0
    name, *rest = arguments
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(f"unknown command {name}: there are {', '.join(COMMANDS)} (moba --help)")
    if "--help" in rest or "-h" in rest:
        show(command)
        return 0
    overrides = [item for item in rest if item != "--cfg"]
    config = command.resolve(overrides)
    if len(overrides) < len(rest):
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
        return 0
    return command.run(config)


if __name__ == "__main__":
    sys.exit(main())
