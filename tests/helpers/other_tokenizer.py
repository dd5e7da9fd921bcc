"""A tokenizer with our entries under other ids, and networks that have learned with one."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoTokenizer

from dataset.toy.rows import heldout_questions
from dataset.toy.world import make_world
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    qk_norm=True,
)


def write_other_tokenizer(folder: Path) -> Path:
    """Our tokenizer, with the ids of its entries in the opposite order."""
    folder.mkdir(parents=True)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "model" / name, folder / name)
    content = json.loads((ROOT / "model" / "tokenizer.json").read_text("utf-8"))
    vocab = content["model"]["vocab"]
    first = 32  # the added tokens keep their ids
    last = len(vocab) - 1
    content["model"]["vocab"] = {
        entry: number if number < first else last - (number - first)
        for entry, number in vocab.items()
    }
    text = json.dumps(content, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


@lru_cache
def trained_network(tokenizer_folder: Path, steps: int = 60) -> MiniMindForCausalLM:
    """A network after a few seconds of training on the toy world's questions."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    asked = heldout_questions(make_world("mini"), 40)
    text = "<|im_end|>\n".join(str(question.messages[-1]["content"]) for question in asked)
    ids = torch.tensor(tokenizer(text).input_ids)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(steps):
        rows = torch.stack([ids[i : i + 65] for i in torch.randint(len(ids) - 65, (8,))])
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
