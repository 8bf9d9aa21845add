"""How fast `moba prepare` tokenises on one core, and how much of that is the tokenizer itself.

    python benchmarks/prepare_speed.py --out result.json

In seconds of CPU, which other work on the machine disturbs little: the standard library's source (or --source FILE
or FOLDER), a byte-level BPE of 32,768 tokens trained on it (or --tokenizer FOLDER), one process, one thread. First
the text alone through `tokenizers`, then the parts of a set as a worker process makes them: reading, tokenising,
checksums, writing. Cores work on different parts, so n free cores do n times as much.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def train(texts: list[str], folder: Path) -> None:
    """A tokenizer as large ones are: byte-level BPE, trained by `tokenizers`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_768, special_tokens=["<|eos|>"], initial_alphabet=alphabet)
    words.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|eos|>").save_pretrained(folder)


def measure(source: str, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Both measurements, as tokens per second of CPU."""
    from conf.schema import ReadConfig, SyntheticConfig
    from data.encode import batches
    from data.encoder import load_encoder
    from data.parts import Job, group, part_bytes, run_part
    from data.readers import read_unit
    from data.sources import cut, list_files
    from data.tokenizer import load_tokenizer

    read, synthetic = ReadConfig(), SyntheticConfig()
    files = list_files(source)
    size = part_bytes(sum(file.bytes for file in files))
    units = cut(files, size, read, synthetic)
    eos = load_tokenizer(tokenizer).eos_id
    encoder, ids = load_encoder(tokenizer, eos), 0
    texts = [[d.text for d in batch] for u in units for batch in batches(read_unit(u, read, lambda *_: None))]
    began = time.process_time()
    for batch in texts:
        ids += sum(map(len, encoder.encode_batch(batch)))
    alone = time.process_time() - began
    del texts
    job = Job(
        folder,
        source,
        tokenizer,
        0.05,
        read,
        synthetic,
        "uint16",
        masked=False,
        weighted=False,
        eos_id=eos,
        light=True,
    )
    encoder, counted = load_encoder(tokenizer, eos), [0]

    def count(documents: int, tokens: int, text: int) -> None:
        counted[0] += tokens

    began = time.process_time()
    for number, part in enumerate(group(units, size)):
        run_part(job, number, part, encoder, count)
    whole = time.process_time() - began
    return {
        "tokens": counted[0],
        "tokenizers_alone_tokens_per_cpu_s": round(ids / alone),
        "prepare_tokens_per_cpu_s": round(counted[0] / whole),
        "share_of_tokenizers": round(min(1.0, (alone / ids) / (whole / counted[0])), 3),
    }


def main() -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Hugging Face fast tokenizer")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    from conf.schema import ReadConfig, SyntheticConfig
    from data.readers import read_unit
    from data.sources import cut, hash_order, list_files
    from eval.files import write_json
    from launch.bench_loader import environment

    with tempfile.TemporaryDirectory(prefix="moba-bench-") as scratch:
        tokenizer = options.tokenizer or Path(scratch) / "tokenizer"
        if options.tokenizer is None:
            units = hash_order(cut(list_files(options.source), 1 << 23, ReadConfig(), SyntheticConfig()))
            some = [d.text for u in units[:400] for d in read_unit(u, ReadConfig(), lambda *_: None)]
            train(some, tokenizer)
        folder = Path(scratch) / "set"
        folder.mkdir()
        result = {"benchmark": "prepare", **environment(), **measure(options.source, tokenizer, folder)}
    for key, value in result.items():
        print(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
    if options.out:
        write_json(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
