#!/usr/bin/env bash
# transformers 4.57 reads a folder that transformers 5 saved, with rope_theta 10000 in place of 1e6
#
# Expected: a Llama or Qwen3 folder is a standard folder: config.json says rope_theta 1000000, so
#   either release computes the same logits, or the older one refuses the folder or warns.
# What happens: transformers 5 writes rope_theta inside `rope_parameters` and no longer at the top.
#   4.57 has the classes and loads the weights without a missing key, keeps `rope_parameters` as an
#   unknown attribute, and takes its own default of 10000 for the top-level key. No warning. The
#   first few tokens nearly agree: the error grows with the distance between tokens.
# Who is hurt: whoever trains with 5 and serves or evaluates with software that still pins 4:
#   the logits are those of another model, and a test on a prompt of three tokens can miss it.
# Fix: add the old key to config.json beside the new one: "rope_theta": 1000000.0. transformers 5
#   reads such a file too, and the logits then agree; the script shows both.
# Versions: transformers 5.23.0 (writer), 4.57.6 (reader), torch 2.13.0.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
for release in 5.23.0 4.57.6; do
    python3 -m venv "$work/$release"
    "$work/$release/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==$release
done
cd "$work"

cat > write.py <<'PY'
import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

for kind in ("llama", "qwen3"):
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(kind)
    model.save_pretrained(f"{kind}-both-keys")
    with open(f"{kind}-both-keys/config.json") as file:
        fields = json.load(file)
    with open(f"{kind}-both-keys/config.json", "w") as file:
        json.dump(fields | {"rope_theta": 1e6}, file)
    ids = torch.randint(64, (1, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits}, f"{kind}.pt")
PY

cat > read.py <<'PY'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM

older = transformers.__version__.startswith("4.")
ok = True
for kind in ("llama", "qwen3"):
    saved = torch.load(f"{kind}.pt")
    for folder in (kind, f"{kind}-both-keys"):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = model(saved["ids"]).logits
        log_p, log_q = saved["logits"].log_softmax(-1), logits.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[0]
        greedy = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean()
        config = model.config
        theta = config.rope_theta if older else config.rope_parameters["rope_theta"]
        print(
            f"read by {transformers.__version__}: {folder:16} theta {theta:9.0f}, KL in nats:"
            f" tokens 0-3 {kl[:4].mean():.4f}, 4-31 {kl[4:32].mean():.4f},"
            f" 128-255 {kl[128:].mean():.4f};"
            f" same greedy token at {greedy:.0%}"
        )
        wrong = older and folder == kind
        ok = ok and (theta == 1e4 and kl[128:].mean() > 0.01 if wrong else kl.max() < 1e-4)
CHANGED = "the behaviour is not the one that the head of this script describes"
sys.exit(0 if ok else CHANGED)
PY

timeout 200 5.23.0/bin/python write.py 2>/dev/null
echo "RoPE keys that transformers 5.23.0 wrote, by kind:"
grep -H -A3 rope_parameters llama/config.json qwen3/config.json
result=0
for release in 5.23.0 4.57.6; do
    timeout 200 "$release/bin/python" read.py 2> "$release.log" || result=1
    echo "warnings of $release: $(grep -ciE 'warn|rope|missing|initial' "$release.log" || true)"
done
exit $result
