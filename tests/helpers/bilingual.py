"""A corpus of four times as much English as Chinese."""

import json
from pathlib import Path

ZH = "小船在河上慢慢地走，孩子们数着岸边的树：一共{}棵。"
EN = "The small boat moves slowly down the river while the children count {} trees."


def write_texts(path: Path, texts: list[str]) -> str:
    """The path of a file of text rows."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def write_corpus(folder: Path) -> list[str]:
    """The paths of a Chinese and an English file."""
    return [
        write_texts(folder / "zh.jsonl", [ZH.format(i) * 3 for i in range(200)]),
        write_texts(folder / "en.jsonl", [EN.format(i) * 8 for i in range(250)]),
    ]
