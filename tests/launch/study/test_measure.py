from __future__ import annotations

from pathlib import Path

import numpy as np

from conf.constants import IGNORE_INDEX
from conf.schema import SyntheticConfig, TokenizerConfig
from data.prepare import prepare
from data.store import TokenStore
from launch.study.measure import whole_documents
from tests.launch.study.texts import make_packages


def test_whole_documents_have_their_answers_as_only_targets(tmp_path: Path) -> None:
    text = make_packages(tmp_path / "in", 4, files=2)
    prepare(tmp_path / "text", str(text), 0.0, TokenizerConfig(train_vocab_size=400))
    own = TokenizerConfig(path=str(tmp_path / "text" / "tokenizer"))
    made = SyntheticConfig(tasks=["needle"], lengths=[256, 512], documents=12)
    prepare(tmp_path / "tasks", "synthetic", 0.5, own, synthetic=made)
    store = TokenStore(tmp_path / "tasks", "heldout")
    fitting = [i for i, n in enumerate(np.diff(store.offsets)) if 256 < n <= 512]
    batches = list(whole_documents(store, 512, 100))
    assert len(batches) == len(fitting) > 0
    for doc, batch in zip(fitting, batches, strict=True):
        mask = store.loss(doc)
        assert mask is not None and batch.input_ids.shape == (1, 512) and batch.weights is None
        assert int((batch.labels != IGNORE_INDEX).sum()) == int(mask[1:].sum()) < 30
    assert len(list(whole_documents(store, 512, 1))) == 1
