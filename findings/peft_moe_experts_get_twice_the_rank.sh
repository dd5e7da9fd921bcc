#!/usr/bin/env bash
# PEFT: r=8 gives the experts of a Qwen3-MoE rank 16, and the warning about it says the reverse
#
# Expected: LoraConfig documents `r` as the rank of the update matrices, and "all-linear" as all
#   linear layers but the output layer: rank 8 everywhere, unless rank_pattern was given. When a
#   warning says that a rank_pattern key "did not match ... and was ignored", that key does
#   nothing.
# What happens: with transformers 5, which stacks gate_proj and up_proj of all experts in one
#   parameter, PEFT writes a rank_pattern and an alpha_pattern of its own into the config: r and
#   alpha times two for experts.gate_up_proj. It then warns that these two keys matched nothing
#   and were ignored, but the adapter really has rank 16 there. The router gets an adapter as
#   well, and target_modules no longer lists it: it is in target_parameters. The usual list of
#   seven projections gives the same doubled rank, without the router.
# Who is hurt: comparisons at an equal rank or budget; whoever trusts the warning and computes the
#   size from r; whoever wants the router frozen and asked for linear layers only.
# Workaround: count the trainable parameters by name, as below; pass the projections by name to
#   leave the router alone, and choose r knowing that gate_up_proj gets twice of it.
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cd "$work"
cat > ranks.py <<'PY'
import sys
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

R, EXPERTS = 8, 4
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GATE_UP, ROUTER = "mlp.experts.base_layer", "mlp.gate"


def delta_rank(layer):
    """The rank of one expert's update when B is random instead of zero."""
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        delta = layer.get_delta_weight("default")
    return int(torch.linalg.matrix_rank(delta[0].double(), rtol=1e-5))


print("peft", peft.__version__, "transformers", transformers.__version__)
ok = True
for targets in ("all-linear", SEVEN):
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=R, lora_alpha=2 * R, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(Qwen3MoeForCausalLM(config), lora)
    print(f"LoraConfig(r={R}, lora_alpha={2 * R}, target_modules={targets})")
    ignored = [str(w.message) for w in caught if "ignored" in str(w.message)]
    for message in ignored:
        print("  warning:", message)
    ranks = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "r", None), dict):
            short = name.removeprefix("base_model.model.model.layers.0.")
            ranks[short] = module.r["default"]
            print(f"  {short:24} r {module.r['default']:3} scaling {module.scaling['default']}")
            if short == GATE_UP:
                measured = delta_rank(module)
    used = model.peft_config["default"]
    print(f"  rank of the update of one expert's gate_up_proj, measured: {measured}")
    print(f"  in the config now: rank_pattern {used.rank_pattern}, alpha {used.alpha_pattern},")
    print(f"    target_parameters {sorted(used.target_parameters)}")
    ok = ok and len(ignored) == 2 and ranks[GATE_UP] == measured == 2 * R
    ok = ok and (ROUTER in ranks) == (targets == "all-linear")
CHANGED = "the behaviour is not the one that the head of this script describes"
sys.exit(0 if ok else CHANGED)
PY
timeout 250 env/bin/python ranks.py 2>stderr.log || {
    tail -n 2 stderr.log
    exit 1
}
