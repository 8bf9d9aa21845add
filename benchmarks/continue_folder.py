"""A folder of transformers, continued to 32K with a kill in the middle, exported, and compared number by number.

    python benchmarks/continue_folder.py --shape llama-1b --out result.json     # one GPU, 30 GB below --work
    python benchmarks/continue_folder.py --shape tiny                           # CPU, a minute or two

Random weights and a small tokenizer are saved by transformers. `moba train recipe=extend_to_32k init.hf=FOLDER`
runs twice side by side: once to its last step, once with a SIGKILL behind its first checkpoint and the same
command again. All rows of metrics must be equal, under engine.deterministic with full attention in one layer and
in the last steps. The export is loaded by transformers with full attention and with attn_implementation="moba"
and compared with the model here. Exit code 1 if something differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BEGAN = time.monotonic()
from benchmarks.folders import SHAPES, Shape, corpus, save_folder  # noqa: E402

EXACT, HALF = 1e-4, 3e-2  # relative differences: of each token's logits in fp32, of all logits in bf16
MOST_CHOSEN_OTHERWISE = 0.05  # of the tokens


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.1f} s] {text}", flush=True)


def command(shape: Shape, work: Path, out: Path, steps: int, every: int, extra: list[str]) -> list[str]:
    # fmt: off
    return [
        sys.executable, "-m", "launch.cli", "train", "recipe=extend_to_32k",
        f"init.hf={work / 'hf'}", f"out={out}",
        f"data.sets.text.source={work / 'texts'}", f"data.sets.text.path={work / 'data'}", "launch.nproc=1",
        f"stages.extend.seq_len={shape.seq_len}", "stages.extend.global_batch=1",
        f"stages.extend.tokens={steps * shape.seq_len}", "stages.extend.rope.kind=inherit",
        "stages.extend.rope.factor=0", f"stages.extend.attention.block_size={shape.block_size}",
        *shape.overrides,
        "stages.extend.lr.peak=3e-4", f"checkpoint.every={every}", "checkpoint.background=false",
        "stages.extend.attention.full_after=0.75", "stages.extend.attention.full_last_layers=1",
        "engine.deterministic=true", "eval.tokens=0", "metrics.batch_hash=true", *extra,
    ]
    # fmt: on


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=file)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Until `what` holds. The end of the process counts too if it was a good one."""
    deadline = time.monotonic() + seconds
    while not what():
        if process.poll() not in (None, 0) or time.monotonic() > deadline:
            process.kill()
            sys.exit(f"{log}:\n{log.read_text()[-3000:]}")
        time.sleep(0.02)


def rows(out: Path) -> list[dict[str, Any]]:
    """Of the training steps, without what depends on the clock."""
    from conf.paths import RunPaths

    path = RunPaths(out).metrics
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    read = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read if row["kind"] == "train"]


def speeds(out: Path) -> list[int]:
    from conf.paths import RunPaths

    read = [json.loads(line) for line in RunPaths(out).metrics.read_text(encoding="utf-8").splitlines()]
    return [round(row["tokens_per_s"]) for row in read if row["kind"] == "train"]


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the launcher and all its workers at once, as when a machine goes dark."""
    import psutil

    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    for one in tree[1:]:  # dead is enough: whoever inherits them may never ask for their exit codes
        with suppress(psutil.NoSuchProcess):
            while one.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)


def train(shape: Shape, work: Path, steps: int, extra: list[str]) -> dict[str, Any]:
    """Both runs. The undisturbed one ends with its last row: nothing is made of its weights."""
    from conf.paths import RunPaths

    alone, killed, logs = work / "alone", work / "killed", (work / "alone.log", work / "killed.log")
    arguments = command(shape, work, killed, steps, steps // 2, extra)
    second = start(arguments, logs[1])
    first = start(command(shape, work, alone, steps, 0, extra), logs[0])
    saved = RunPaths(killed).checkpoints / f"step-{steps // 2:08d}"

    def alone_is_done() -> bool:
        if first.poll() is None and len(rows(alone)) == steps:
            kill(first)
        return first.poll() is not None

    wait_for(lambda: saved.is_dir() or (alone_is_done() and False), second, logs[1], 300)
    kill(second)
    done = len(rows(killed))
    if done >= steps:
        sys.exit(f"killed too late, after {done} of {steps} steps: more --steps")
    say(f"killed after {done} rows, step {steps // 2} saved; again")
    second = start(arguments, logs[1])
    wait_for(lambda: second.poll() == 0 or (alone_is_done() and False), second, logs[1], 300)
    wait_for(alone_is_done, first, logs[0], 300)
    want, got = rows(alone), rows(killed)
    say("resumed to the end")
    for a, b in zip(want, got, strict=True):
        print(f"  step {a['step']}: loss {a['loss']:.9f} {b['loss']:.9f}, norm {a['grad_norm']:.9f} "
              f"{b['grad_norm']:.9f}, {a['batch_hash']} {a['plan']}")  # fmt: skip
    return {
        "rows_at_the_kill": done,
        "resumed_from": steps // 2,
        "losses": [row["loss"] for row in got],
        "rows_bit_equal": want == got,
        "largest_loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(want, got, strict=True)),
        "tokens_per_s": speeds(killed),
        "plans": [row["plan"] for row in got],
    }


def compare(shape: Shape, work: Path, device: str) -> list[dict[str, Any]]:
    """The export in transformers beside the checkpoint here, in both attentions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from conf.schema import EvalAttentionConfig
    from eval.load import compared_plans, load_model
    from model.hf import export_hf
    from model.hf_attention import register_moba

    folder = work / "export"
    export_hf(work / "killed", folder, "float32")
    say("exported")
    register_moba()
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((work / "texts").iterdir())[-40:])
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, : shape.seq_len].to(
        device
    )
    assert ids.shape[1] == shape.seq_len
    table = []
    for dtype, length in ((torch.float32, shape.exact), (torch.bfloat16, shape.seq_len)):
        exact = dtype == torch.float32  # from the checkpoint itself; its export is read faster
        ours = load_model(work / "killed" if exact else folder, device, dtype=dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba", dtype=dtype)
        theirs = theirs.to(device).eval()
        own = ids[:, :length]
        borders = torch.tensor([0, length], dtype=torch.int32, device=device)
        positions = torch.arange(length, device=device)[None]
        for name, plans in compared_plans(ours.source, EvalAttentionConfig()).items():
            theirs.set_attn_implementation("moba" if name == "moba" else "sdpa")
            with torch.no_grad():
                want = theirs(own).logits[0].float()
                hidden = ours.model.hidden(own, positions, borders, length, plans)
                got = ours.model.logits(hidden)[0].float()
            off = (got - want).norm(dim=-1) / want.norm(dim=-1)
            losses = [float(torch.nn.functional.cross_entropy(x[:-1], own[0, 1:])) for x in (got, want)]
            table.append({
                "attention": name, "dtype": str(dtype).removeprefix("torch."), "tokens": length,
                "logits_max": float((got - want).abs().max()),
                "logits_relative": float((got - want).norm() / want.norm()),
                "tokens_off": float((off > EXACT).float().mean()) if exact else None,
                "same_argmax": float((got.argmax(-1) == want.argmax(-1)).float().mean()),
                "loss": losses[0], "loss_transformers": losses[1],
            })  # fmt: skip
            del want, got, hidden
            say("  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) and "loss" not in k else f"{k} {v}"
                                 for k, v in table[-1].items()))  # fmt: skip
        del ours, theirs
    return table


def verdict(result: dict[str, Any]) -> list[str]:
    """What differs by more than rounding.

    MoBA chooses: where two blocks score alike, the last bit decides, and that token's logits differ by more.
    """
    bad = [] if result["train"]["rows_bit_equal"] else ["rows of metrics differ after the kill"]
    for row in result["compared"]:
        exact, chosen = row["dtype"] == "float32", row["attention"] == "moba"
        loss = abs(row["loss"] - row["loss_transformers"])
        near = row["logits_relative"] <= HALF  # what is not a number is not near
        if exact:
            near = near and row["tokens_off"] <= (MOST_CHOSEN_OTHERWISE if chosen else 0)
        if not (near and loss <= (1e-5 if exact else 2e-3)):
            bad.append(f"{row['attention']} in {row['dtype']}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "continue_folder", help="emptied first")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--steps", type=int, default=4, help="of training, half of them before the kill")
    parser.add_argument("overrides", nargs="*", help="more keys of moba train")
    options = parser.parse_args()
    import torch
    import transformers

    from eval.bench.environment import environment
    from eval.files import write_json

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, work = SHAPES[options.shape], options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    corpus(work / "texts")
    save_folder(shape, work / "texts", work / "hf", device)
    if device == "cuda":
        torch.cuda.empty_cache()
    say(f"saved by transformers: {options.shape}, {device}")
    name = torch.cuda.get_device_name() if device == "cuda" else device
    result: dict[str, Any] = {"benchmark": "continue_folder", "shape": options.shape, **environment(name)}
    result["transformers"] = transformers.__version__
    result["train"] = train(shape, work, options.steps, options.overrides)
    if options.out:  # what a time limit leaves
        write_json(options.out, result | {"differs": ["not compared yet"]})
    result["compared"] = compare(shape, work, device)
    result["seconds"] = round(time.monotonic() - BEGAN, 1)
    result["differs"] = verdict(result)
    if options.out:
        write_json(options.out, result)
    say("everything agrees" if not result["differs"] else "DIFFERS: " + "; ".join(result["differs"]))
    return 1 if result["differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
