"""A save folder as the web page finds it: checkpoints that chat and that do not, an adapter, runs
with curves.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers.checkpoints import load_tokenizer, random_network

WIDTH = 16


def make_save_folder(folder: Path) -> Path:
    """Fill a folder with small untrained networks: chat_a, more/chat_b, more/pretrain and the
    adapter lora_a of chat_a.
    """
    tokenizer = load_tokenizer()
    template = tokenizer.chat_template
    for seed, name in enumerate(("chat_a", "more/chat_b", "more/pretrain")):
        shape = dict(hidden_size=WIDTH, num_hidden_layers=1, intermediate_size=WIDTH)
        random_network(seed, **shape).save_pretrained(folder / name)
        tokenizer.chat_template = None if "pretrain" in name else template
        tokenizer.save_pretrained(folder / name)
        write_metrics(folder / name, 40)
    make_adapter(folder / "lora_a", "chat_a")
    return folder


def make_adapter(folder: Path, base: str) -> None:
    """A LoRA adapter in PEFT's format."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": base,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{layer}.lora_A.weight": torch.ones(2, WIDTH),
            f"{layer}.lora_B.weight": torch.ones(WIDTH, 2),
        },
        folder / "adapter_model.safetensors",
    )


def write_metrics(folder: Path, steps: int, of: int = 100) -> None:
    """The first steps of a run's metrics.jsonl."""
    rows = []
    for step in range(10, steps + 1, 10):
        rows.append(
            {
                "step": step,
                "loss": 5 / step,
                "learning_rate": 1e-3 / step,
                "tokens_per_second": 1000.0 + step,
                "targets": 100 * step,
                "seconds": 0.5 * step,
            }
        )
        if step % 20 == 0:
            rows.append(
                {
                    "step": step,
                    "val_bpb/held_out": 9 / step,
                    "targets": 100 * step,
                    "seconds": 0.5 * step,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "arguments.json").write_text(json.dumps({"num_steps": of}))
