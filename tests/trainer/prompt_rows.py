"""Prompts, a network that answers with letters, and a reward, small enough for reinforcement learning whole in a test."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.trainer.pair_rows import ROOT

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, router_aux_loss_coef=0.5)
LONGEST = 8  # tokens of an answer
FUNCTION = """def early(text, row):
    return 0.5 if row.get("flat") else sum("a" <= letter <= "m" for letter in text[:8]) / 8
"""


def write_prompts(path, count=20, flat=0):
    """Rows of `count` questions; the answers to each of the last `flat` of them are all as good."""
    rows = [{"conversations": [{"role": "user", "content": f"{i}" * (1 + i % 3)}], "answer": str(i), "flat": i >= count - flat}
            for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_policy(folder, seed=1, **shape):
    """A checkpoint folder of a random network that writes letters from a to z, and now and then ends."""
    torch.manual_seed(seed)
    config = MiniMindConfig(vocab_size=6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                            intermediate_size=64, initializer_range=0.1, tie_word_embeddings=False, qk_norm=True, **shape)
    model, tokenizer = MiniMindForCausalLM(config), AutoTokenizer.from_pretrained(ROOT / "model")
    letters = tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz", tokenizer.eos_token])
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1)  # so all hidden states share a direction,
        model.lm_head.weight.fill_(-1.0)  # and the head is against all tokens,
        model.lm_head.weight[letters] = 0.3 * torch.randn(27, 32)  # but for these
        model.lm_head.weight[tokenizer.eos_token_id] += 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def policy_flags(folder, start, **changes):
    """A short run on `folder`/prompts.jsonl as a list of command-line arguments; None leaves a flag out."""
    function = folder / "reward.py"
    if not function.exists():
        function.write_text(FUNCTION)
    options = {"data_path": folder / "prompts.jsonl", "from_weight": start, "save_dir": folder / "out", "max_seq_len": 64,
               "max_new_tokens": LONGEST, "num_prompts": 4, "num_generations": 4, "batch_size": 2,
               "rewards": f"{function}:early=1", "val_share": 0.2, "val_interval": 4, "save_interval": 4,
               "max_steps": 8, "device": "cpu", "learning_rate": 1e-3, **changes}
    return [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]


def worth(row, text):
    """What FUNCTION gives, said once more."""
    return 0.5 if row["flat"] else len([letter for letter in text[:8] if letter in "abcdefghijklm"]) / LONGEST


def record_samples(monkeypatch, stage):
    """A list that gets the Samples of every rollout of a stage's module, as lists."""
    rollouts, sample_groups = [], stage.sample_groups
    monkeypatch.setattr(stage, "sample_groups", lambda *args: rollouts.append(sample_groups(*args)) or rollouts[-1])
    return rollouts


def logits_of(network, sample, temperature=1.0):
    """A transformers network's logits / temperature at the places where a sample's tokens were drawn, [n, V]."""
    ids = torch.tensor([sample.prompt + sample.tokens])
    return network(ids).logits[0, len(sample.prompt) - 1 : -1] / temperature


def log_probs_of(logits, sample):
    """log p of a sample's tokens, [n]."""
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]


def folder_of(save_dir):
    """The only run in a folder."""
    folder, = Path(save_dir).iterdir()
    return folder
