"""The tokenizer, and datasets of rows that a test gives: pretrain(rows), sft(rows)."""

import pytest
from transformers import AutoTokenizer

from dataset.lm_dataset import ROOT, PretrainDataset, SFTDataset
from tests.helpers.rows import write


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model")


@pytest.fixture
def pretrain(tmp_path, tokenizer):
    return lambda rows, max_seq_len=64, **options: PretrainDataset(
        write(tmp_path / "rows.jsonl", rows),
        tokenizer,
        max_seq_len,
        cache_dir=tmp_path / "cache",
        **options,
    )


@pytest.fixture
def sft(tmp_path, tokenizer):
    return lambda rows, max_seq_len=256, **options: SFTDataset(
        write(tmp_path / "rows.jsonl", rows),
        tokenizer,
        max_seq_len,
        cache_dir=tmp_path / "cache",
        **options,
    )
