"""Train the tokenizer: byte-level BPE with 6,400 entries, Chinese and English on an equal footing.

Byte-pair encoding starts from the 256 bytes and, again and again, joins the pair of neighbours that is most frequent
in the text into a new entry (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes: GPT-2, Radford et al.
2019). Nothing is ever out of vocabulary, and decoding gives back the exact bytes. Before that the text is cut by
Qwen2's pattern, so no entry crosses a word's edge and every digit stands alone: a small model has to see the digits
that it adds up. A vocabulary this small takes 15 to 50% more tokens than one of 150,000 entries, but keeps the
embedding of a 26M model at 3M parameters instead of 77M.

    python trainer/train_tokenizer.py --save_dir out/tokenizer            # on the toy world: seconds on a CPU
    python trainer/train_tokenizer.py --save_dir out/tokenizer --data_path zh.jsonl.xz en.jsonl.xz@0.5 --sample_mb 64
    python trainer/train_tokenizer.py --save_dir out/tokenizer --data_path chat.jsonl --vocab_size 12800 --balance none

The shipped model/tokenizer.json came of 100 MB, half Chinese and half English, in 3 minutes on two cores; a token of it
holds 1.33 Chinese or 3.15 English characters of held-out text (scripts/bench_tokenizer.py compares it with others).
A new tokenizer needs a new model: weights that were trained with another one do not fit. The same text and the same
seed give the same file, byte for byte.
"""

import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dataset.jsonl import find_shards, in_share, read_rows
from dataset.toy_world import write_world
from trainer.arguments import arg, command, parse_args
from trainer.metrics import write_json

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
NUM_ADDED = 32  # the rest is reserved, so that a later stage can name a token without changing the model's shape
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HELD_OUT_EVERY = 50
HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
TOY = ROOT / "dataset" / "toy_mini"


@dataclass
class TokenizerArgs:
    data_path: list[str] = arg(
        [],
        "files of text or conversations rows (.jsonl, .jsonl.gz, .jsonl.xz); FILE@0.4 takes that share of its rows "
        "(default: the toy world)",
        nargs="+",
    )
    save_dir: str = arg(str(ROOT / "out" / "tokenizer"), "folder for tokenizer.json, its settings and the template")
    vocab_size: int = arg(6400, "entries, the 32 added tokens and the 256 bytes among them")
    sample_mb: float = arg(64.0, "train on about this many MB (10^6 bytes of UTF-8), rows chosen at random")
    balance: str = arg("bytes", "bytes: as much Chinese as English; none: as it comes", choices=["bytes", "none"])
    seed: int = arg(0, "chooses the rows of the sample")
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for values out of range."""
        if self.vocab_size < NUM_ADDED + 256:
            raise ValueError(f"--vocab_size {self.vocab_size}: give room for {NUM_ADDED} added tokens and 256 bytes, 288")
        if self.sample_mb <= 0:
            raise ValueError(f"--sample_mb {self.sample_mb}: give more than 0")


def toy_paths() -> list[str]:
    """Return the files that a run without --data_path reads: the toy world's, written here if they are missing."""
    write_world("mini", TOY)
    return [str(TOY / f"{stage}_train.jsonl") for stage in ("pretrain", "sft")]


def is_held_out(line_no: int) -> bool:
    """Tell whether a line is kept for measuring: every 50th, never trained on."""
    return line_no % HELD_OUT_EVERY == 0


def row_text(row: dict) -> str:
    """Return the text of a {"text"} or {"conversations"} row; ValueError where it is neither."""
    if isinstance(row.get("text"), str):
        return row["text"]
    messages = row.get("conversations")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('neither "text" nor "conversations". Give one of the two, a string or a list of messages.')
    keys = ("tools", "reasoning_content", "content", "tool_calls")
    values = [message[key] for message in messages for key in keys if message.get(key)]
    return "\n".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)


def iter_texts(data_path: list[str], held_out: bool = False) -> Iterator[tuple[str, str, str]]:
    """Yield (key of the row, "zh" or "en", text): of the rows to train on, or of the held-out ones."""
    for index, (path, share) in enumerate(find_shards(data_path)):
        for line_no, row in read_rows(path):
            if in_share(line_no, share) and is_held_out(line_no) == held_out:
                try:
                    text = row_text(row)
                except ValueError as error:
                    raise ValueError(f"{path}:{line_no}: {error}") from error
                yield f"{index}:{line_no}", language(text), text


def language(text: str) -> str:
    """Return "zh" where at least a tenth of the characters are Han, else "en"."""
    return "zh" if len(HAN.findall(text)) * 10 >= max(1, len(text)) else "en"


def num_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def sample_texts(args: TokenizerArgs) -> tuple[list[str], Counter]:
    """Return a random sample of the texts and its bytes per language.

    Equal bytes, not characters: a Chinese character takes three bytes and says about as much as three or four letters,
    so both languages then come out at about the same number of tokens.
    """
    sizes = Counter()
    for _, lang, text in iter_texts(args.data_path):
        sizes[lang] += num_bytes(text)
    if args.balance == "bytes" and len(sizes) == 2:
        share = min(args.sample_mb * 5e5, *sizes.values())
        keep = {lang: share / size for lang, size in sizes.items() if size}
    else:
        keep = dict.fromkeys(sizes, min(1.0, args.sample_mb * 1e6 / max(1, sizes.total())))

    texts, used = [], Counter()
    for key, lang, text in iter_texts(args.data_path):
        # Each row is drawn by its own place, so it does not matter what was drawn before it.
        if random.Random(f"{args.seed}:{key}").random() < keep.get(lang, 0.0):
            texts.append(text)
            used[lang] += num_bytes(text)
    if not texts:
        raise ValueError(f"no text to train on in {', '.join(args.data_path)}. Give more data or a larger --sample_mb.")
    return texts, used


def train(texts: list[str], vocab_size: int) -> dict:
    """Return the content of tokenizer.json for a byte-level BPE of vocab_size entries, fewer where the text is small."""
    names = CONTROL_TOKENS + MARKUP_TOKENS
    names += [f"<|reserved_{i}|>" for i in range(NUM_ADDED - len(names))]
    assert vocab_size >= NUM_ADDED + 256
    # No normalizer, unlike Qwen2's NFC: what is decoded must be what was encoded, byte for byte.
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**byte_level)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        print(f"warning: --vocab_size {vocab_size} not reached: the text has no pairs left to join after {size} entries")
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:  # skip_special_tokens=True must leave calls and reasoning in place
        token["special"] = token["content"] not in MARKUP_TOKENS
    return content


def save(content: dict, save_dir: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, ready for AutoTokenizer."""
    save_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    for name, value in {"tokenizer.json": content, "tokenizer_config.json": settings}.items():
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        (save_dir / name).write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
    template = (ROOT / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    (save_dir / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


def held_out_counts(data_path: list[str], tokenizer: Tokenizer) -> dict[str, Counter]:
    """Return rows, characters, bytes and tokens of the held-out text per language."""
    counts = defaultdict(Counter)
    for _, lang, text in iter_texts(data_path, held_out=True):
        counts[lang].update(rows=1, characters=len(text), bytes=num_bytes(text), tokens=len(tokenizer.encode(text).ids))
    return counts


def main(argv=None):
    args = parse_args(TokenizerArgs, argv)
    args.data_path = args.data_path or toy_paths()
    texts, used = sample_texts(args)
    print(f"{len(texts):,} rows: " + ", ".join(f"{size / 1e6:.2f} MB of {lang}" for lang, size in used.items()))
    content = train(texts, args.vocab_size)
    save(content, Path(args.save_dir))

    tokenizer = Tokenizer.from_str(json.dumps(content))
    figures = {"rows": len(texts), "bytes": dict(used), "vocab_size": tokenizer.get_vocab_size(), "held_out": {}}
    for lang, count in held_out_counts(args.data_path, tokenizer).items():
        figures["held_out"][lang] = dict(count)
        characters, size = (count[unit] / count["tokens"] for unit in ("characters", "bytes"))
        print(f"held out, {lang}: {count['rows']:,} rows, {characters:.3f} characters or {size:.3f} bytes per token")
    if args.json:
        write_json(args.json, figures)
    print(f"saved {args.save_dir}: {figures['vocab_size']:,} entries")


if __name__ == "__main__":
    command(main)
