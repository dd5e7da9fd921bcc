"""Train the tokenizer: byte-level BPE with 6,400 entries, as much for Chinese as for English.

Byte-pair encoding starts from the 256 bytes and joins, again and again, the most frequent pair of
neighbours in the text into a new entry (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on
bytes: GPT-2, Radford et al. 2019). No text is ever out of vocabulary, and decoding gives back the
exact bytes. Qwen2's pattern cuts the text first, so no entry crosses the edge of a word, and each
digit is a token: a small model must see the digits that it adds. A vocabulary this small takes 15
to 50% more tokens than one of 150,000 entries, but keeps the embedding of a 26M model at 3M
parameters instead of 77M.

    python trainer/train_tokenizer.py --save_dir out/tokenizer    # the toy world: seconds on a CPU
    python trainer/train_tokenizer.py --save_dir out/tokenizer \\
        --data_path zh.jsonl.xz en.jsonl.xz@0.5 --sample_mb 64
    python trainer/train_tokenizer.py --save_dir out/tokenizer --data_path chat.jsonl \\
        --vocab_size 12800 --balance none

The shipped model/tokenizer.json was trained on 100 MB, half Chinese and half English, in 3 minutes
on two cores; one of its tokens holds 1.33 Chinese or 3.15 English characters of held-out text
(scripts/bench.py tokenizer compares it with others). Text without spaces is fine too: "words" of
more than 512 characters (Chinese without punctuation, base64, a row of signs) are learned from in
pieces, because the time that one takes grows with the square of its length. A new tokenizer needs a
new model: weights trained with another one do not fit. The same text and the same seed give the
same file, byte for byte.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.runtime.arguments import ROOT, arg, check_flags, check_positive, command, parse_args

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP_TOKENS = [
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
]
# the rest is reserved: a later stage can name a token without a change of the model's shape
NUM_ADDED = 32
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SETTINGS = {
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


@dataclass
class TokenizerArgs:
    data_path: list[str] = arg(
        [],
        "files of text or conversations rows (.jsonl, .gz, .xz); FILE@0.4 takes that fraction of "
        "its rows (default: sft_t2t_mini.jsonl if it is in dataset/, else the toy world)",
    )
    save_dir: str = arg(
        str(ROOT / "out" / "tokenizer"), "folder for tokenizer.json, its settings and the template"
    )
    vocab_size: int = arg(6400, "entries, with the 32 added tokens and the 256 bytes")
    sample_mb: float = arg(
        64.0, "train on about this many MB (10^6 bytes of UTF-8), in rows chosen at random"
    )
    balance: str = arg(
        "bytes", "bytes: as much Chinese as English; none: as it comes", choices=["bytes", "none"]
    )
    seed: int = arg(0, "chooses the rows of the sample")
    json: str = arg("", "write the metrics to this file too")

    def check(self) -> None:
        """ValueError for values out of range."""
        if self.vocab_size < NUM_ADDED + 256:
            raise ValueError(
                f"--vocab_size {self.vocab_size}: give room for {NUM_ADDED} added tokens and 256 "
                "bytes, 288"
            )
        check_positive(self, "sample_mb")


check_flags(TokenizerArgs, __name__)  # --help need not wait for the imports below

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dataset.tokenizer_texts import cut_long_words, held_out_counts, sample_texts
from dataset.toy_world import write_world
from model.files import write_json
from trainer.runtime.usual_files import usual_file


def default_paths() -> list[str]:
    """The files of a run without --data_path: one of a usual name in dataset/, else `toy_paths`."""
    if found := usual_file("sft"):
        print(f"no --data_path: learning from {found}")
    return [str(found)] if found else toy_paths()


def toy_paths() -> list[str]:
    """The toy world's files, written if they are missing."""
    folder = ROOT / "dataset" / "toy_mini"
    write_world("mini", folder)
    return [str(folder / f"{stage}_train.jsonl") for stage in ("pretrain", "sft")]


def train(texts: list[str], vocab_size: int) -> dict:
    """The content of tokenizer.json: a byte-level BPE of vocab_size entries, or fewer if the text
    is small. Words of more than 512 characters are learned from in pieces.
    """
    names = CONTROL_TOKENS + MARKUP_TOKENS
    names += [f"<|reserved_{i}|>" for i in range(NUM_ADDED - len(names))]
    # no normalizer, unlike Qwen2's NFC: decoding must give back each byte that was encoded
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(cut_long_words(texts), trainer, length=len(texts))
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        print(
            f"warning: --vocab_size {vocab_size} not reached: the text has no pairs left to join "
            f"after {size} entries"
        )
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:  # skip_special_tokens must leave calls and reasoning
        token["special"] = token["content"] not in MARKUP_TOKENS
    return content


def save(content: dict, save_dir: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, for AutoTokenizer."""
    save_dir.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer.json": content, "tokenizer_config.json": SETTINGS}
    texts = {x: json.dumps(y, ensure_ascii=False, indent=1) + "\n" for x, y in files.items()}
    template = (ROOT / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    for name, text in {**texts, "chat_template.jinja": template}.items():
        # newline: the same bytes on every system
        (save_dir / name).write_text(text, encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(TokenizerArgs, argv)
    args.data_path = args.data_path or default_paths()
    texts, used = sample_texts(args.data_path, args.sample_mb, args.balance, args.seed)
    sizes = ", ".join(f"{size / 1e6:.2f} MB of {lang}" for lang, size in used.items())
    print(f"{len(texts):,} rows: {sizes}")
    content = train(texts, args.vocab_size)
    save(content, Path(args.save_dir))

    tokenizer = Tokenizer.from_str(json.dumps(content))
    entries, held_out = tokenizer.get_vocab_size(), held_out_counts(args.data_path, tokenizer)
    for lang, count in held_out.items():
        characters, size = (count[unit] / count["tokens"] for unit in ("characters", "bytes"))
        print(
            f"held out, {lang}: {count['rows']:,} rows, {characters:.3f} characters or {size:.3f} "
            "bytes per token"
        )
    if args.json:
        sample = {"rows": len(texts), "bytes": dict(used)}
        write_json(args.json, {**sample, "vocab_size": entries, "held_out": held_out})
    print(f"saved {args.save_dir}: {entries:,} entries")


if __name__ == "__main__":
    command(main)
