"""The texts that a tokenizer is trained on and measured on, each known as Chinese or English."""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from dataset.files.jsonl import find_shards, in_fraction, read_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELD_OUT_EVERY = 50
HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
MAX_WORD = 512  # characters: each join of a pair moves the rest of its word, so time is quadratic
RUNS = (r"[^\W\d_]", r"(?:[^\w\s]|_)", r"\s")  # letters, signs, spaces: no word has two of them
LONG_RUN = re.compile("|".join(rf"{one}{{{MAX_WORD}}}(?={one})" for one in RUNS))


def is_held_out(line_no: int) -> bool:
    """Whether a line is for measuring: each 50th, never trained on."""
    return line_no % HELD_OUT_EVERY == 0


def row_text(row: dict) -> str:
    """The text of a {"text"} or {"conversations"} row; ValueError if it is neither."""
    if isinstance(row.get("text"), str):
        return row["text"]
    messages = row.get("conversations")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(
            'neither "text" nor "conversations". Give one of the two, a string or a list of '
            "messages."
        )
    keys = ("tools", "reasoning_content", "content", "tool_calls")
    values = [message[key] for message in messages for key in keys if message.get(key)]
    return "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in values)


def iter_texts(data_path: list[str], held_out: bool = False) -> Iterator[tuple[str, str, str]]:
    """(key of the row, "zh" or "en", text) of the rows to train on, or of the held-out ones."""
    for index, (path, fraction) in enumerate(find_shards(data_path)):
        for line_no, row in read_rows(path):
            if in_fraction(line_no, fraction) and is_held_out(line_no) == held_out:
                try:
                    text = row_text(row)
                except ValueError as error:
                    raise ValueError(f"{path}:{line_no}: {error}") from error
                yield f"{index}:{line_no}", language(text), text


def language(text: str) -> str:
    """ "zh" if a tenth of the characters or more are Han, else "en"."""
    return "zh" if len(HAN.findall(text)) * 10 >= max(1, len(text)) else "en"


def cut_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each cut after every MAX_WORD characters of a longer run of letters, signs or
    spaces; where there is none, the text as it is.
    """
    for text in texts:
        ends = [match.end() for match in LONG_RUN.finditer(text)]
        for start, end in zip([0, *ends], [*ends, len(text)]):
            yield text[start:end]


def num_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def sample_texts(
    data_path: list[str], sample_mb: float, balance: str = "bytes", seed: int = 0
) -> tuple[list[str], Counter]:
    """A random sample of about `sample_mb` MB of the texts, and its bytes per language.

    balance: "bytes" (as much Chinese as English) or "none". Equal bytes, not characters: a Chinese
    character takes three bytes and says about as much as three or four letters, so both languages
    take about the same number of tokens.
    """
    sizes = Counter()
    for _, lang, text in iter_texts(data_path):
        sizes[lang] += num_bytes(text)
    if balance == "bytes" and len(sizes) == 2:
        part = min(sample_mb * 5e5, *sizes.values())
        keep = {lang: part / size for lang, size in sizes.items() if size}
    else:
        keep = dict.fromkeys(sizes, min(1.0, sample_mb * 1e6 / max(1, sizes.total())))

    texts, used = [], Counter()
    for key, lang, text in iter_texts(data_path):
        # the draw depends on the row's place alone, not on the draws before it
        if random.Random(f"{seed}:{key}").random() < keep.get(lang, 0.0):
            texts.append(text)
            used[lang] += num_bytes(text)
    if not texts:
        files = ", ".join(data_path)
        raise ValueError(f"no text to train on in {files}. Give more data or a larger --sample_mb.")
    return texts, used


def held_out_counts(data_path: list[str], tokenizer: "Tokenizer") -> dict[str, Counter]:
    """Rows, characters, bytes and tokens of the held-out text per language."""
    counts = defaultdict(Counter)
    for _, lang, text in iter_texts(data_path, held_out=True):
        tokens = len(tokenizer.encode(text).ids)
        counts[lang].update(rows=1, characters=len(text), bytes=num_bytes(text), tokens=tokens)
    return counts
