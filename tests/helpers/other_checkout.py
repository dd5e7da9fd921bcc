"""A folder laid out like a checkout of another repository of this family: its data, its .pth files
and its tokenizer.
"""

import json
from pathlib import Path

import torch

from dataset.toy.tools import TOY_TOOLS
from model.model_minimind import MiniMindForCausalLM
from tests.helpers.other_tokenizer import trained_network, write_other_tokenizer
from tests.helpers.pair_rows import talk

CALCULATOR = [one for one in TOY_TOOLS.schemas() if one["function"]["name"] == "calculator"]
COUNT = 24  # rows of each file


def offer(question: str) -> list[dict]:
    """A system message that offers the calculator, as JSON in a text, and a question."""
    system = {"role": "system", "content": "Use tools.", "tools": json.dumps(CALCULATOR)}
    return [system, {"role": "user", "content": question}]


def calling(i: int) -> dict:
    """A conversation in which the calculator is called, and the result is read."""
    call = {"name": "calculator", "arguments": {"expression": f"{i} + 2"}}
    answers = [
        {"role": "assistant", "content": "", "tool_calls": json.dumps([call])},
        {"role": "tool", "content": json.dumps({"result": str(i + 2)})},
        {"role": "assistant", "content": f"It is {i + 2}.", "reasoning_content": "It says so."},
    ]
    return {"conversations": offer(f"What is {i} + 2?") + answers}


def rows_of(i: int) -> dict[str, dict]:
    """{file: its row number i}."""
    asked = [{"role": "user", "content": f"Name {i}."}, {"role": "assistant", "content": ""}]
    episode = [*offer(f"What is {i} + 3?"), {"role": "assistant", "content": ""}]
    chat = {"conversations": talk(f"Say {i}.", f"Here you are: {i}.")}
    return {
        "pretrain_t2t_mini.jsonl": {"text": f"On day {i} it rained in {i + 3} towns. " * 3},
        "sft_t2t_mini.jsonl": calling(i) if i % 2 else chat,
        "r1_mix_1024.jsonl": {
            "conversations": talk(f"Is {i} big?", f"<think>\nIt is {i}.\n</think>\n<answer>\nNo")
        },
        "lora_medical.jsonl": {"conversations": talk(f"Ache {i}?", f"Rest for {i} days.")},
        "dpo.jsonl": {
            "chosen": talk(f"Greet {i}.", f"Good morning, {i}!"),
            "rejected": talk(f"Greet {i}.", "What?"),
        },
        "rlaif.jsonl": {"conversations": asked},
        "agent_rl.jsonl": {"conversations": episode, "gt": [str(i + 3)]},
        "agent_rl_math.jsonl": {"conversations": episode, "gt": [str(i + 3)]},
    }


def write_checkout(folder: Path) -> Path:
    """The folder: dataset/, model/ with another tokenizer than ours, out/ with .pth files of a
    network that has learned with it, minimind-3/, the same for transformers; and the folders that
    its commands are typed in.
    """
    for name in ("dataset", "out", "trainer", "scripts"):
        (folder / name).mkdir(parents=True)
    rows = [rows_of(i) for i in range(COUNT)]
    for name in rows[0]:
        lines = [json.dumps(row[name], ensure_ascii=False) + "\n" for row in rows]
        (folder / "dataset" / name).write_text("".join(lines), encoding="utf-8")
    model = trained_network(write_other_tokenizer(folder / "model"))
    state = {name: x.half() for name, x in model.state_dict().items()}
    torch.save(state, folder / "out" / "full_sft_64.pth")
    layer = "model.layers.0.self_attn.o_proj.lora."
    lora = {f"{layer}A.weight": torch.ones(2, 64), f"{layer}B.weight": torch.ones(64, 2)}
    torch.save(lora, folder / "out" / "lora_medical_64.pth")
    write_folder(folder / "minimind-3", model, folder / "model")
    return folder


def write_folder(folder: Path, model: MiniMindForCausalLM, tokenizer: Path) -> None:
    """A checkpoint folder with the files of a tokenizer's folder."""
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
