#!/usr/bin/env bash
# transformers Trainer: eval_loss, and so the perplexity, depends on per_device_eval_batch_size
#
# Expected: eval_loss is the loss per target token of the evaluation set. The language-model
#   example scripts of transformers report perplexity = exp(eval_loss), and in training the
#   Trainer divides by the number of target tokens of the whole step (num_items_in_batch),
#   whatever the micro-batch.
# What happens: evaluate() takes each batch's mean over its own tokens and averages these with the
#   number of rows as weight. Rows of unequal length then count by row and not by token, and which
#   rows share a batch changes the number. The logits do not change. It can turn the order of two
#   models round: below, one set, two models, and the better one by tokens loses at batch size 1.
# Who is hurt: whoever picks a checkpoint, stops early or compares perplexities between runs with
#   other batch sizes, or with tools that count tokens.
# Workaround: sum the losses and the target tokens oneself, or evaluate with all rows of one
#   length.
# Versions: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 \
    accelerate==1.15.0
cd "$work"
cat > evaluate.py <<'PY'
import math
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

LENGTHS = (4, 60, 6, 50, 5, 40, 8, 64)  # short replies and long ones in turn


def rows(seed, lengths):
    random = torch.Generator().manual_seed(seed)
    for length in lengths:  # short rows count by 1, long rows by 7
        start, step = int(torch.randint(61, (1,), generator=random)), 1 if length < 10 else 7
        yield [3 + (start + i * step) % 61 for i in range(length)]


def collate(batch):
    longest = max(len(ids) for ids in batch)
    pad = [longest - len(ids) for ids in batch]
    return {
        "input_ids": torch.tensor([ids + [0] * n for ids, n in zip(batch, pad)]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * n for i, n in zip(batch, pad)]),
        "labels": torch.tensor([ids + [-100] * n for ids, n in zip(batch, pad)]),
    }


def trained_on(lengths, steps):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        model(**collate(list(rows(100 + step, lengths)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def per_token(model, data):
    total = count = 0
    for ids in data:
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
        target = torch.tensor(ids[1:])
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        count += len(target)
    return total / count


def eval_loss(model, data, batch_size):
    args = TrainingArguments(
        output_dir="out",
        per_device_eval_batch_size=batch_size,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Trainer(model=model, args=args, eval_dataset=data, data_collator=collate)
    return trainer.evaluate()["eval_loss"]


print("transformers", transformers.__version__)
data = list(rows(0, LENGTHS))
models = {"A": trained_on([6] * 8, steps=60), "B": trained_on([64] * 8, steps=30)}
result = {}
for name, model in models.items():
    with torch.no_grad():
        exact = per_token(model, data)
    result[name] = [exact] + [eval_loss(model, data, size) for size in (1, 2, 4, 8)]
    cells = [f"{loss:.4f} (ppl {math.exp(loss):6.2f})" for loss in result[name]]
    by_batch = ", ".join(cells[1:])
    print(f"model {name}: by token {cells[0]}; eval_loss at batch 1, 2, 4, 8: {by_batch}")
order = ["A" if a < b else "B" for a, b in zip(result["A"], result["B"])]
print("lower loss: by token", order[0], "; by eval_loss at batch 1, 2, 4, 8:", *order[1:])

spread = max(abs(loss - row[0]) / row[0] for row in result.values() for loss in row[1:4])
whole = max(abs(row[4] - row[0]) for row in result.values())
same = spread > 0.02 and whole < 1e-4 and order[0] != order[1]
CHANGED = "the behaviour is not the one that the head of this script describes"
sys.exit(0 if same else CHANGED)
PY
timeout 250 env/bin/python evaluate.py 2>stderr.log | grep -v "^{" || {
    tail -n 2 stderr.log
    exit 1
}
