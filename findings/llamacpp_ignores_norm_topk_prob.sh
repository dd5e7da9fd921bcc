#!/usr/bin/env bash
# llama.cpp: a Qwen3-MoE with norm_topk_prob=false is computed as if it were true
#
# Expected: config.json of Qwen3-MoE has the key norm_topk_prob (false is the default of
#   transformers' Qwen3MoeConfig): with false the output of each chosen expert is multiplied by
#   its probability among all experts. GGUF has a key for it, <arch>.expert_weights_norm, so a
#   file that carries `qwen3moe.expert_weights_norm = false` should give the logits of
#   transformers.
# What happens: llama.cpp divides the chosen probabilities by their sum for this architecture
#   whatever the key says. With one expert per token each weight becomes exactly 1. No warning;
#   the file loads and the text looks plausible.
# Who is hurt: small mixtures that are trained with norm_topk_prob=false, above all top-1 ones,
#   where it must be false: with true the weight is the constant 1 and the router gets no gradient
#   from the language-model loss. Their GGUF is a different function from the model that was
#   trained.
# Workaround: none by a key of the file. Train with norm_topk_prob=true and two or more experts
#   per token if llama.cpp is the target, or compare logits before publishing a GGUF.
# Versions: xllamacpp 2026.10.11549 (bundles llama.cpp), gguf 0.19.0, transformers 5.23.0, torch
#   2.13.0.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 \
    xllamacpp==2026.10.11549
cd "$work"

cat > write.py <<'PY'
"""Write moe.gguf and expected.json for argv: experts per token, norm_topk_prob (0 or 1)."""

import json
import sys

import gguf
import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

IDS = [10, 40, 77, 120, 200, 33]
SPECIAL = ["<s>", "</s>", "<pad>"]
LETTERS = [chr(ord("a") + i) for i in range(16)]
TOKENS = SPECIAL + LETTERS + [x + y for x in LETTERS for y in LETTERS]


def model_with(top_k, norm):
    config = Qwen3MoeConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm,
        initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


def gguf_tensors(model):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        block = name.removeprefix("model.layers.").split(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(array, 2, axis=1)):
                yield f"blk.{block}.ffn_{part}_exps.weight", np.ascontiguousarray(half)
        elif name.endswith("experts.down_proj"):
            yield f"blk.{block}.ffn_down_exps.weight", array
        else:
            yield names.get_name(name, try_suffixes=(".weight",)), array


def write(model, path):
    config = model.config
    out = gguf.GGUFWriter(path, "qwen3moe")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(256)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_expert_feed_forward_length(config.moe_intermediate_size)
    out.add_expert_count(config.num_experts)
    out.add_expert_used_count(config.num_experts_per_tok)
    out.add_expert_weights_norm(config.norm_topk_prob)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_freq_base(1e6)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    out.add_token_types([control] * len(SPECIAL) + [normal] * (len(TOKENS) - len(SPECIAL)))
    out.add_token_merges([f"{x} {y}" for x in LETTERS for y in LETTERS])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_pad_token_id(2)
    out.add_add_bos_token(False)
    for name, array in gguf_tensors(model):
        out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


top_k, norm = int(sys.argv[1]), bool(int(sys.argv[2]))
write(model_with(top_k, norm), "moe.gguf")
expected = {}
for key in (False, True):
    with torch.no_grad():
        logits = model_with(top_k, key)(torch.tensor([IDS])).logits[0, -1]
    expected[str(key)] = logits.double().log_softmax(-1).tolist()
with open("expected.json", "w") as file:
    json.dump({"ids": IDS, "top_k": top_k, "norm": norm, "log_probs": expected}, file)
PY

cat > compare.py <<'PY'
import json
import sys

import gguf
import numpy as np
import xllamacpp as xlc

with open("expected.json") as file:
    case = json.load(file)
key = gguf.GGUFReader("moe.gguf").fields["qwen3moe.expert_weights_norm"]
params = xlc.CommonParams()
params.model.path = "moe.gguf"
params.n_ctx = 256
params.n_parallel = 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = False
params.verbosity = 0
size = len(case["log_probs"]["True"])
request = {"prompt": case["ids"], "n_predict": 1, "n_probs": size, "temperature": 0}
answer = xlc.Server(params).handle_completions(request)
answer = answer if isinstance(answer, dict) else json.loads(answer)
found = np.empty(size)
for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
    found[entry["id"]] = entry["logprob"]

distance = {}
for norm in ("False", "True"):
    log_p = np.array(case["log_probs"][norm])
    kl = float((np.exp(log_p) * (log_p - found)).sum())
    distance[norm] = abs(log_p - found).max(), kl, log_p.argmax() == found.argmax()
for norm, (most, kl, greedy) in distance.items():
    print(
        f"  top-{case['top_k']}, file says {bool(key.parts[-1][0])!s:5}: against transformers with"
        f" norm_topk_prob={norm:5}: log-probs differ by up to {most:.4f}, KL {kl:.5f} nats,"
        f" same greedy token {greedy}"
    )
ok = distance["True"][0] < 0.02 and distance["False"][0] > 0.1
CHANGED = "the behaviour is not the one that the head of this script describes"
sys.exit(0 if ok else CHANGED)
PY

env/bin/pip list 2>/dev/null | grep -E '^(gguf|transformers|xllamacpp) '
result=0
for case in "1 0" "2 0" "2 1"; do
    # shellcheck disable=SC2086
    timeout 250 env/bin/python write.py $case 2>stderr.log || tail -n 2 stderr.log
    timeout 250 env/bin/python compare.py 2>stderr.log || { result=1; tail -n 2 stderr.log; }
    rm -f moe.gguf expected.json
done
exit $result
