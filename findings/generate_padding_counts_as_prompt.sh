#!/usr/bin/env bash
# transformers generate(): padding counts as prompt for three options, so a batch changes a row
#
# Expected: a left-padded row with its attention_mask gives the tokens that the row gives alone.
#   It holds without options, and repetition_penalty leaves padding out. GenerationConfig
#   documents min_length as "the length of the input prompt" plus the new tokens,
#   encoder_repetition_penalty as a penalty on what "is not in the original input",
#   no_repeat_ngram_size as each n-gram once.
# What happens: min_length counts the padding, so a short row in a batch may end at once where it
#   must not alone. encoder_repetition_penalty takes the padding token as part of the prompt and
#   favours it: where the padding token is the end-of-text token, as is usual for models without
#   one of their own, padded rows end more easily. no_repeat_ngram_size=1 forbids the padding
#   token: there padded rows can never end before max_new_tokens. No warning.
# Who is hurt: batched evaluation and rollouts: lengths and texts depend on the longest prompt of
#   the batch.
# Workaround: min_new_tokens in place of min_length; a padding token that the model never emits;
#   or batches of prompts of one length when these options are on.
# Versions: transformers 5.23.0, torch 2.13.0.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$work"
cat > batch.py <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

EOS = 2  # also the padding token
OPTIONS = {
    "no option": {},
    "repetition_penalty=1.3": {"repetition_penalty": 1.3},
    "min_new_tokens=4": {"min_new_tokens": 4},
    "min_length=8": {"min_length": 8},
    "encoder_repetition_penalty=1.3": {"encoder_repetition_penalty": 1.3},
    "no_repeat_ngram_size=1": {"no_repeat_ngram_size": 1},
}
DIFFERS = {"min_length=8", "encoder_repetition_penalty=1.3", "no_repeat_ngram_size=1"}

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    eos_token_id=EOS,
)
model = LlamaForCausalLM(config).eval()
short, long = [5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17]
pad = len(long) - len(short)


def first_scores(ids, mask, options):
    """What row 0 of the batch picks its first new token from."""
    answer = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=EOS,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    return answer.scores[0][0]


print("transformers", transformers.__version__)
print("score of the end-of-text token, prompt of 4 tokens, alone and padded by 5 in a batch")
ok = True
for name, options in OPTIONS.items():
    alone = first_scores([short], [[1] * len(short)], options)
    mask = [[0] * pad + [1] * len(short), [1] * len(long)]
    batched = first_scores([[EOS] * pad + short, long], mask, options)
    others = [i for i in range(32) if i != EOS]
    other = torch.allclose(alone[others], batched[others], atol=1e-4)
    same = torch.isclose(alone[EOS], batched[EOS], atol=1e-4).item()
    print(
        f"  {name:32} alone {alone[EOS]:8.4f}  batched {batched[EOS]:8.4f}"
        f"  {'same' if same else 'DIFFERS'}; all other tokens {'same' if other else 'differ'}"
    )
    ok = ok and other and same != (name in DIFFERS)
CHANGED = "the behaviour is not the one that the head of this script describes"
sys.exit(0 if ok else CHANGED)
PY
timeout 250 env/bin/python batch.py 2>stderr.log || {
    tail -n 2 stderr.log
    exit 1
}
