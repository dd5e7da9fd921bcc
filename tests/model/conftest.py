"""What the tests of the model share."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(__file__).resolve().parents[2] / "model")
