"""Prompts, a network that completes them with letters, and a reward, small enough for
reinforcement learning whole in a test.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers.checkpoints import load_tokenizer, write_checkpoint
from tests.helpers.runs import as_flags, assert_same, metrics
from trainer.rl.rollout import Sample
from trainer.runtime.metrics import read_metrics

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, router_aux_loss_coef=0.5)
LONGEST = 8  # tokens of a completion
FUNCTION = """def early(text, row):
    return 0.5 if row.get("flat") else sum("a" <= letter <= "m" for letter in text[:8]) / 8
"""


def write_prompts(path: Path, count: int = 20, flat: int = 0) -> Path:
    """Rows of `count` questions; all completions of the last `flat` of them have one reward."""
    rows = [
        {
            "conversations": [{"role": "user", "content": f"{i}" * (1 + i % 3)}],
            "answer": str(i),
            "flat": i >= count - flat,
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_policy(folder: Path, seed: int = 1, **shape: Any) -> Path:
    """A checkpoint folder of a random network that writes letters from a to z, and now and then
    ends.
    """
    torch.manual_seed(seed)
    config = MiniMindConfig(
        vocab_size=6400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        qk_norm=True,
        **shape,
    )
    model, tokenizer = MiniMindForCausalLM(config), load_tokenizer()
    letters = tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz", tokenizer.eos_token])
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.1)  # so all hidden states share a direction,
        model.lm_head.weight.fill_(-1.0)  # and the head is against all tokens,
        model.lm_head.weight[letters] = 0.3 * torch.randn(27, 32)  # but for these
        model.lm_head.weight[tokenizer.eos_token_id] += 0.1
    return write_checkpoint(folder, model)


def policy_flags(folder: Path, start: Path | str, **changes: Any) -> list[str]:
    """A short run on `folder`/prompts.jsonl as a list of command-line arguments; None leaves a flag
    out.
    """
    function = folder / "reward.py"
    if not function.exists():
        function.write_text(FUNCTION)
    options = {
        "data_path": folder / "prompts.jsonl",
        "from_weight": start,
        "save_dir": folder / "out",
        "max_seq_len": 64,
        "max_completion_length": LONGEST,
        "num_prompts": 4,
        "num_generations": 4,
        "batch_size": 2,
        "rewards": f"{function}:early=1",
        "val_ratio": 0.2,
        "val_interval": 4,
        "save_interval": 4,
        "max_steps": 8,
        "device": "cpu",
        "learning_rate": 1e-3,
        **changes,
    }
    return as_flags(options)


def worth(row: dict, text: str) -> float:
    """The reward by FUNCTION, computed in another way."""
    if row["flat"]:
        return 0.5
    return len([letter for letter in text[:8] if letter in "abcdefghijklm"]) / LONGEST


def record_samples(monkeypatch: pytest.MonkeyPatch, stage: ModuleType) -> list[list[Sample]]:
    """A list that gets the Samples of every rollout of a stage's module, as lists."""
    rollouts, sample_groups = [], stage.sample_groups

    def sample(*args: Any) -> list[Sample]:
        rollouts.append(sample_groups(*args))
        return rollouts[-1]

    monkeypatch.setattr(stage, "sample_groups", sample)
    return rollouts


def record_steps(monkeypatch: pytest.MonkeyPatch, stage: ModuleType) -> list[int]:
    """A list that gets the number of every step that a stage begins."""
    begun, learning_rate_at = [], stage.learning_rate_at

    def note(step: int, num_steps: int, args: Any) -> float:
        begun.append(step)
        return learning_rate_at(step, num_steps, args)

    monkeypatch.setattr(stage, "learning_rate_at", note)
    return begun


def logits_of(network: torch.nn.Module, sample: Sample, temperature: float = 1.0) -> torch.Tensor:
    """A transformers network's logits / temperature at the places where a sample's tokens were
    drawn, [n, V].
    """
    ids = torch.tensor([sample.prompt + sample.tokens])
    return network(ids).logits[0, len(sample.prompt) - 1 : -1] / temperature


def log_probs_of(logits: torch.Tensor, sample: Sample) -> torch.Tensor:
    """log p of a sample's tokens, [n]."""
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]


def folder_of(save_dir: Path) -> Path:
    """The only run in a folder."""
    (folder,) = Path(save_dir).iterdir()
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the training steps."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def held_out_rewards(folder: Path) -> list[float]:
    """The mean rewards of all validations of a run, in their order."""
    rows = read_metrics(folder / "metrics.jsonl")
    name = "val_reward/total/held_out"
    return [row[name] for row in rows if name in row]


def transcripts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in open(folder / "transcripts.jsonl", "rb")]


def training_state(folder: Path, step: int) -> dict[str, Any]:
    """The optimizer's and the stage's extra state in a checkpoint."""
    path = folder / "checkpoints" / f"step-{step}" / "training_state.pt"
    return torch.load(path, weights_only=True)


def assert_close(
    a: dict[str, torch.Tensor],
    b: dict[str, torch.Tensor],
    at_most: float = 1e-4,
    on_average: float = 1e-6,
) -> None:
    """Weights within float error: AdamW's first steps enlarge that of gradients near 0."""
    assert a.keys() == b.keys()
    for name in a:
        difference = (a[name] - b[name]).abs()
        assert difference.max() < at_most and difference.mean() < on_average, name


def assert_same_end(resumed: Path, whole: Path) -> None:
    """Everything that a run leaves is the same: weights, optimizer, metrics, transcripts."""
    assert metrics(resumed) == metrics(whole)
    last = steps(whole)[-1]["step"]
    assert transcripts(resumed) == transcripts(whole)
    paths = [folder / "checkpoints" / f"step-{last}" for folder in (resumed, whole)]
    found = [name for name in WEIGHTS if (paths[1] / name).exists()]
    assert len(found) == 1
    assert_same(*(load_file(path / found[0]) for path in paths))
    ours, theirs = (training_state(folder, last) for folder in (resumed, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
