"""Rows for tests, and what becomes of them as text."""

import json


def write(path, rows):
    """Write rows, of which a string is a line as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chat(question="What is 2 + 2?", answer="4.", **extra):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]}


def text_of(tokenizer, dataset, index=0):
    return tokenizer.decode(dataset[index]["input_ids"], skip_special_tokens=False)


def targets_of(tokenizer, dataset, index=0):
    labels = dataset[index]["labels"]
    return tokenizer.decode(labels[labels != -100], skip_special_tokens=False)
