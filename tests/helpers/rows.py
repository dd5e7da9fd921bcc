"""Rows of conversations, and their text as a dataset encodes it."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dataset.token_dataset import TokenDataset


def write(path: Path, rows: list[dict | str]) -> Path:
    """Write rows as JSON; a string is a line of its own."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chat(question: str = "What is 2 + 2?", answer: str = "4.", **extra: object) -> dict:
    """A row of one turn; extra: further fields of the assistant's message."""
    return {
        "conversations": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **extra},
        ]
    }


def text_of(tokenizer: PreTrainedTokenizerBase, dataset: TokenDataset, index: int = 0) -> str:
    return tokenizer.decode(dataset[index]["input_ids"], skip_special_tokens=False)


def targets_of(tokenizer: PreTrainedTokenizerBase, dataset: TokenDataset, index: int = 0) -> str:
    """The text of the tokens that count in the loss."""
    labels = dataset[index]["labels"]
    return tokenizer.decode(labels[labels != -100], skip_special_tokens=False)
