"""Talk to a model, or measure it.

    python eval_llm.py                                    # chat in the terminal with out/full_sft_*
    python eval_llm.py --weight pretrain --prompt "Once"  # a pretrained model continues the text
    python eval_llm.py --adapter out/lora_tiny            # with a LoRA adapter
    python eval_llm.py --weight full_sft --benchmark toy  # accuracy per skill, with chance level
                                                          # and 95% interval
    python eval_llm.py --benchmark keyword --adapter out/lora_medical_tiny \\
        --data_path dataset/lora_examples/medical_heldout.jsonl
    python eval_llm.py --weight pretrain --benchmark bpb --data_path held_out.jsonl

In the chat a line that ends with \\ continues in the next one, and three double quotes begin and
end a block of lines; /help lists the commands. A checkpoint chats if its
tokenizer has a chat template; without one it only continues text.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from model.files import as_typed, write_json
from scripts.checkpoint import WeightArgs, load_checkpoint
from trainer.runtime.arguments import (
    arg,
    check_not_negative,
    check_positive,
    check_ratio,
    command,
    parse_args,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from model.model_minimind import MiniMindForCausalLM
    from trainer.runtime.process import Compute

TEST_PROMPTS = [
    "你是谁？",
    "Who are you?",
    "14 加 5 等于多少？",
    "What is 12 minus 7?",
    "把 9、2、5 从小到大排列。",
    "Which is larger, 8 or 13?",
    "用三句话介绍一下你自己。",
    "Explain why the sky is blue.",
    "写一首关于秋天的短诗。",
    "Give me two tips for learning a language.",
]
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
# values of --benchmark ("" is talking) -> the flags that have an effect with these alone
USED_BY = {
    ("",): {"prompt", "test_prompts", "system", "historys", "int8", "show_speed", *SAMPLING},
    ("", "toy", "keyword"): {"open_thinking", "max_new_tokens"},
    ("toy",): {"toy_level", "limit"},
    ("bpb",): {"max_seq_len"},
    ("bpb", "keyword"): {"data_path"},
    ("toy", "bpb", "keyword"): {"json"},
}


@dataclass
class EvalArgs(WeightArgs):
    mode: str = arg(
        "auto",
        "chat, or completion of a text; auto: chat if the checkpoint has a chat template",
        choices=["auto", "chat", "completion"],
    )
    prompt: str | None = arg(None, "answer this one prompt and stop")
    test_prompts: bool = arg(False, "answer a list of built-in prompts and stop")
    system: str = arg("", "system prompt of the chat")
    open_thinking: bool | None = arg(
        None, "1: think before answering, 0: answer at once (default: the model decides)"
    )
    historys: int = arg(6, "earlier rounds of the chat that the model sees")
    max_new_tokens: int = arg(512, "longest completion, in tokens")
    temperature: float = arg(0.7, "0: greedy decoding")
    top_p: float = arg(0.9, "sample from the most probable tokens that together reach this")
    top_k: int = arg(0, "sample from so many most probable tokens only; 0: from all")
    min_p: float = arg(
        0.0, "sample only tokens with at least this fraction of the greatest probability"
    )
    repetition_penalty: float = arg(1.0, "above 1: tokens that were used become less probable")
    int8: bool = arg(False, "int8 weights: faster on a CPU, and a little less exact")
    show_speed: bool = arg(True, "print the tokens per second after each completion")
    benchmark: str = arg(
        "",
        "toy: accuracy per skill; bpb: bits per byte of --data_path; keyword: accuracy on the "
        "questions of --data_path, whose completions must hold the row's keyword",
        choices=["toy", "bpb", "keyword"],
    )
    data_path: list[str] = arg(
        [],
        "bpb: files of text or conversations, each scored by itself; keyword: files of "
        "conversations with a keyword",
        nargs="+",
    )
    max_seq_len: int = arg(512, "bpb: tokens of a batch row")
    toy_level: str = arg("mini", "toy: which world", choices=["mini", "full"])
    limit: int = arg(40, "toy: questions of each skill")
    seed: int = arg(42, "of the sampling")
    json: str = arg("", "write the metrics of a benchmark to this file too")

    def check(self) -> None:
        """ValueError for values out of range and for flags without effect."""
        super().check()
        self.prompt, self.system = as_typed(self.prompt), as_typed(self.system)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p}: give a probability above 0, up to 1")
        check_not_negative(self, "temperature", "top_k", "historys", "seed")
        check_ratio(self, "min_p")
        check_positive(self, "max_new_tokens", "limit", "repetition_penalty")
        if self.benchmark in ("bpb", "keyword") and not self.data_path:
            raise ValueError(f"--benchmark {self.benchmark} needs --data_path FILE")
        if self.prompt is not None and self.test_prompts:
            raise ValueError(
                "--prompt asks one question, --test_prompts a list of others: choose one"
            )
        for benchmarks, names in USED_BY.items():
            for name in sorted(names & self.given):
                if self.benchmark not in benchmarks:
                    uses = [f"--benchmark {one}" if one else "talking" for one in benchmarks]
                    raise ValueError(
                        f"--{name} has an effect with {' or '.join(uses)} only: leave it out"
                    )


def load(
    args: WeightArgs, device: torch.device, mode: str = "auto"
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase, bool]:
    """(model, tokenizer, whether it chats) of --weight, with every --adapter switched on."""
    model, tokenizer = load_checkpoint(args.weight, args, device, args.adapter, merge=False)
    if mode == "chat" and not tokenizer.chat_template:
        raise ValueError(
            f"--mode chat: {args.weight} has no chat template, it was only pretrained; fine-tune "
            "it first (trainer/train_full_sft.py), or leave --mode out"
        )
    return model, tokenizer, bool(tokenizer.chat_template) if mode == "auto" else mode == "chat"


def benchmark_questions(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    chats: bool,
    args: EvalArgs,
    run: Compute,
) -> list[dict]:
    """Accuracy per skill, and overall, on held-out questions of the toy world or those of files."""
    from dataset.lora_examples import keyword_questions
    from dataset.toy.rows import heldout_questions
    from dataset.toy.scorer import accuracy_table, format_table
    from dataset.toy.world import make_world
    from scripts.toy_benchmark import evaluation_engine, toy_answers

    if not chats:
        raise ValueError(
            f"--benchmark {args.benchmark} asks questions in a chat, but this checkpoint was only "
            "pretrained; give a fine-tuned one, or measure this one with --benchmark bpb"
        )
    if args.benchmark == "toy":
        questions = heldout_questions(make_world(args.toy_level), args.limit)
    else:
        questions = [question for path in args.data_path for question in keyword_questions(path)]
    max_new_tokens = args.max_new_tokens if "max_new_tokens" in args.given else 128
    engine = evaluation_engine(model, tokenizer, run)
    options = {"enable_thinking": args.open_thinking, "max_new_tokens": max_new_tokens}
    rows = accuracy_table(toy_answers(engine, questions, **options))
    print(format_table(rows))
    return rows


def benchmark_bpb(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, args: EvalArgs, run: Compute
) -> list[dict]:
    """Bits per byte of each file of --data_path."""
    from dataset.files.jsonl import find_shards, read_rows
    from dataset.lm_dataset import PretrainDataset, SFTDataset
    from trainer.runtime.evaluation import bits_per_byte

    rows = []
    for path in args.data_path:
        _, first = next(iter(read_rows(find_shards(path)[0][0])))
        if "conversations" in first and not tokenizer.chat_template:
            template = ROOT / "model" / "chat_template.jinja"
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        kind = SFTDataset if "conversations" in first else PretrainDataset
        dataset = kind(path, tokenizer, args.max_seq_len)
        score = bits_per_byte(model, tokenizer, dataset, run, args.max_seq_len)
        rows.append({"file": path, **score})
        print(
            "{file}: {bpb:.4f} bits per byte, {loss:.4f} nats per token, {tokens:,} tokens, "
            "{bytes:,} bytes".format(**rows[-1])
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(EvalArgs, argv)
    from scripts.terminal_chat import Talk, chat
    from trainer.runtime.process import Compute

    run = Compute(args)
    model, tokenizer, chats = load(args, run.device, args.mode)
    if args.benchmark:
        if args.benchmark == "bpb":
            rows = benchmark_bpb(model, tokenizer, args, run)
        else:
            rows = benchmark_questions(model, tokenizer, chats, args, run)
        if args.json:
            record = {"weight": args.weight, "benchmark": args.benchmark, "rows": rows}
            write_json(args.json, record)
        return
    talk = Talk(model, tokenizer, chats, args, run)
    if args.prompt is None and not args.test_prompts:
        return chat(talk)
    for text in TEST_PROMPTS if args.test_prompts else [args.prompt]:
        if args.test_prompts:
            print(f"> {text}" if chats else "")
        talk.messages = []
        talk.answer(text)


if __name__ == "__main__":
    command(main)
