#!/usr/bin/env bash
# torchao int8 on a mixture of experts of transformers 5: the experts stay in float32
#
# Expected: the transformers documentation gives TorchAoConfig(Int8WeightOnlyConfig()) as the way
#   to load a model with int8 weights, so nearly all weights of a Qwen3-MoE should take one byte;
#   so they do with the same model in transformers 4.57, where each expert is three nn.Linear
#   modules.
# What happens: transformers 5 keeps all experts of a layer in two parameters of three dimensions
#   (experts.gate_up_proj, experts.down_proj), and torchao looks for nn.Linear modules. The call
#   succeeds, attention becomes int8, and the experts, most of the model, stay as they were. No
#   warning, and the outputs are good, since hardly anything was quantized.
# Who is hurt: whoever plans memory or reports the quality of "int8" or "int4" MoE models: the
#   file and the memory hardly shrink, and the quality measured is that of the full-precision
#   experts.
# Workaround: count the int8 tensors after quantizing, as below; quantize with transformers 4.57,
#   or into a format that knows stacked experts (GGUF). Naming the two parameters in torchao's
#   FqnToConfig is no way out here: they become int8, and the forward pass then raises an error.
# Versions: torchao 0.18.0, torch 2.13.0, transformers 5.23.0 against 4.57.6.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
for release in 5.23.0 4.57.6; do
    python3 -m venv "$work/$release"
    "$work/$release/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchao==0.18.0 \
        accelerate==1.15.0 transformers==$release
done
cd "$work"

cat > quantize.py <<'PY'
import sys

import torch
import torchao
import transformers
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TorchAoConfig

config = Qwen3MoeConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=2,
)
torch.manual_seed(0)
Qwen3MoeForCausalLM(config).save_pretrained("moe")
by_hand = AutoModelForCausalLM.from_pretrained("moe", dtype=torch.float32)
quantize_(by_hand, Int8WeightOnlyConfig())
by_config = AutoModelForCausalLM.from_pretrained(
    "moe",
    dtype=torch.float32,
    quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
)


def is_int8(parameter):
    return type(parameter.data) is not torch.Tensor


ok = True
print("transformers", transformers.__version__, "torchao", torchao.__version__)
for name, model in (("quantize_", by_hand), ("TorchAoConfig", by_config)):
    experts = [p for key, p in model.named_parameters() if ".experts." in key]
    others = [p for key, p in model.named_parameters() if ".experts." not in key]
    share = sum(p.numel() for p in experts) / sum(p.numel() for p in model.parameters())
    done = sum(map(is_int8, experts)), sum(map(is_int8, others))
    print(
        f"  {name:14} experts are {share:.0%} of the weights; int8: {done[0]} of {len(experts)}"
        f" expert tensors, {done[1]} of {len(others)} others"
    )
    all_experts = transformers.__version__.startswith("4.")
    ok = ok and done[1] > 0 and done[0] == (len(experts) if all_experts else 0)
CHANGED = "the behaviour is not the one that the head of this script describes"
sys.exit(0 if ok else CHANGED)
PY

result=0
for release in 5.23.0 4.57.6; do
    timeout 250 "$release/bin/python" quantize.py 2> "$release.log" || result=1
    echo "  lines about experts in the warnings: $(grep -ci 'expert' "$release.log" || true)"
    if [ $result != 0 ]; then tail -n 3 "$release.log"; fi
done
exit $result
