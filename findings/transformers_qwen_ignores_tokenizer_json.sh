#!/usr/bin/env bash
# transformers 5: a Qwen folder's own pre-tokenizer and normalizer in tokenizer.json are replaced
#
# Expected: tokenizer.json is the whole pipeline (the tokenizers documentation lists normalizer,
#   pre-tokenizer, model, post-processor), so AutoTokenizer gives the ids that
#   tokenizers.Tokenizer.from_file gives, as transformers does for a folder of type llama.
# What happens: for the model types qwen2, qwen3 and qwen3_moe AutoTokenizer builds a
#   Qwen2Tokenizer when the folder names no tokenizer_class. That class keeps vocabulary and
#   merges only, and puts in Qwen's splitting (each digit alone) and NFC. A tokenizer that was
#   trained with another pre-tokenizer gets other ids, and all its merges of digits are dead. A
#   Lowercase normalizer is lost. An <|endoftext|> is added with an id behind the last row of the
#   embedding. Decoding gives the text back, so a round trip does not show it. For qwen2 even an
#   explicit tokenizer_class PreTrainedTokenizerFast is overruled.
# Who is hurt: anyone who trains a small Qwen-shaped model with a tokenizer of their own: training
#   through tokenizers and inference through transformers (or any server above it) see other ids.
# Workaround: "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json (qwen3,
#   qwen3_moe); for qwen2 load with PreTrainedTokenizerFast.from_pretrained. Compare ids, not
#   text.
# Versions: transformers 5.23.0, tokenizers 0.23.3.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cd "$work"
timeout 300 env/bin/python - <<'PY' 2>&1 | grep -v "PyTorch was not found"
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

CORPUS = ["In 2024 the price rose from 1234 to 5678, and 99 of 100 people paid 1234."] * 20
TEXT = "Paid 1234 in 2024"
SAMPLES = {"PreTrainedTokenizerFast": "explicit", None: "absent"}


def train(lowercase):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def folder(tokenizer, model_type, tokenizer_class):
    path = Path(f"{model_type}-{tokenizer_class}")
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    AutoConfig.for_model(model_type, vocab_size=size).save_pretrained(path)
    fields = {"bos_token": "<s>", "eos_token": "</s>"}
    fields |= {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    return path


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
plain, lower = train(lowercase=False), train(lowercase=True)
reference = plain.encode(TEXT).ids
print(f"{TEXT!r}: tokenizers alone: {plain.encode(TEXT).tokens}")
equal = {}
for model_type in ("llama", "qwen3", "qwen3_moe", "qwen2"):
    for tokenizer_class, words in SAMPLES.items():
        loaded = AutoTokenizer.from_pretrained(folder(plain, model_type, tokenizer_class))
        ids = loaded.encode(TEXT, add_special_tokens=False)
        equal[model_type, words] = ids == reference
        extra = sorted(loaded.get_vocab().keys() - plain.get_vocab().keys())
        print(
            f"{model_type:10} tokenizer_class {words:9} {type(loaded).__name__:18}"
            f"{'same ids' if ids == reference else 'OTHER IDS'} {len(ids):3} ids, added {extra},"
            f" round trip {loaded.decode(ids) == TEXT}"
        )
        if (model_type, words) == ("qwen3", "absent"):
            print("  ", loaded.convert_ids_to_tokens(ids))
kept = AutoTokenizer.from_pretrained(folder(lower, "llama", None)).tokenize("ABC")
lost = AutoTokenizer.from_pretrained(folder(lower, "qwen3", None)).tokenize("ABC")
print(f"Lowercase normalizer, 'ABC': llama {kept}, qwen3 {lost}")
direct = PreTrainedTokenizerFast.from_pretrained(folder(plain, "qwen2", None))
direct_same = direct.encode(TEXT, add_special_tokens=False) == reference
print("qwen2 through PreTrainedTokenizerFast.from_pretrained:", direct_same)

wrong = {("qwen3", "absent"), ("qwen3_moe", "absent"), ("qwen2", "absent"), ("qwen2", "explicit")}
same = {case for case, is_equal in equal.items() if not is_equal} == wrong
same = same and "".join(kept) == "abc" and "".join(lost) == "ABC" and direct_same
CHANGED = "the behaviour is not the one that the head of this script describes"
raise SystemExit(0 if same else CHANGED)
PY
