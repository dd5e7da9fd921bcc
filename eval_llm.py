"""Talk to a model, or measure it.

    python eval_llm.py                                       # chat in the terminal with out/full_sft_*
    python eval_llm.py --weight pretrain --prompt "Once"     # a pretrained model continues the text
    python eval_llm.py --weight full_sft --benchmark toy     # accuracy per skill, with chance level and 95% interval
    python eval_llm.py --weight pretrain --benchmark bpb --data_path held_out.jsonl

Whether a checkpoint chats or only continues text is told by its tokenizer: a chat template is there or it is not.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import TextStreamer

from dataset.chat_format import encode_prompt
from dataset.jsonl import find_shards, read_rows
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.toy_world import accuracy_table, format_table, heldout_questions, make_world
from model.model_minimind import PRESETS
from trainer.arguments import arg, check_not_negative, check_positive, command, parse_args
from trainer.evaluation import bits_per_byte, toy_answers
from trainer.metrics import write_json
from trainer.run import Compute, seed_everything
from trainer.weights import read_weight

TEST_PROMPTS = [
    "你是谁？", "Who are you?", "14 加 5 等于多少？", "What is 12 minus 7?", "把 9、2、5 从小到大排列。",
    "Which is larger, 8 or 13?", "用三句话介绍一下你自己。", "Explain why the sky is blue.",
    "写一首关于秋天的短诗。", "Give me two tips for learning a language."]
# values of --benchmark ("" is talking) -> the flags that have an effect with these alone
USED_BY = {
    ("",): {"prompt", "test_prompts", "system", "historys", "temperature", "top_p", "top_k", "repetition_penalty", "show_speed"},
    ("", "toy"): {"open_thinking", "max_new_tokens"}, ("toy",): {"toy_level", "limit"}, ("bpb",): {"data_path", "max_seq_len"},
    ("toy", "bpb"): {"json"}}
HELP = "Type a message. /new forgets the conversation, /exit (or Ctrl-D) leaves."


@dataclass
class EvalArgs:
    weight: str = arg("full_sft", "which model: the name of a run in SAVE_DIR, a checkpoint folder, or a .pth file")
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    preset: str = arg("", "which of the runs of that name; for a .pth file, its shape", choices=list(PRESETS))
    hidden_size: int | None = arg(None, "for a .pth file: width, in place of the preset's")
    num_hidden_layers: int | None = arg(None, "for a .pth file: layers, in place of the preset's")
    use_moe: bool = arg(False, "for a .pth file: it is a mixture of experts")
    mode: str = arg("auto", "chat, or completion of a text; auto: as the checkpoint says", choices=["auto", "chat", "completion"])
    prompt: str | None = arg(None, "answer this one prompt and stop")
    test_prompts: bool = arg(False, "answer a list of built-in prompts and stop")
    system: str = arg("", "system prompt of the chat")
    open_thinking: bool | None = arg(None, "1: think before answering, 0: answer at once (default: as the model likes)")
    historys: int = arg(6, "earlier rounds of the chat that the model sees")
    max_new_tokens: int = arg(512, "longest answer, in tokens")
    temperature: float = arg(0.7, "0: always the likeliest token")
    top_p: float = arg(0.9, "sample from the likeliest tokens that together have this probability")
    top_k: int = arg(0, "sample from so many likeliest tokens only; 0: from all")
    repetition_penalty: float = arg(1.0, "above 1: tokens that were used become less likely")
    show_speed: bool = arg(True, "print the tokens per second after each answer")
    benchmark: str = arg("", "toy: accuracy per skill; bpb: bits per byte of --data_path", choices=["toy", "bpb"])
    data_path: list[str] = arg([], "bpb: files of text or conversations, each scored by itself", nargs="+")
    max_seq_len: int = arg(512, "bpb: tokens of a packed row")
    toy_level: str = arg("mini", "toy: which world", choices=["mini", "full"])
    limit: int = arg(40, "toy: questions of each skill")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])
    seed: int = arg(42, "decides what is sampled")
    json: str = arg("", "write the figures of a benchmark to this file too")

    def check(self):
        """ValueError for values out of range and for flags without effect."""
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p}: give a share above 0, up to 1")
        check_not_negative(self, "temperature", "top_k", "historys", "seed")
        check_positive(self, "max_new_tokens", "limit", "repetition_penalty")
        if self.benchmark == "bpb" and not self.data_path:
            raise ValueError("--benchmark bpb needs --data_path FILE")
        if self.prompt is not None and self.test_prompts:
            raise ValueError("--prompt asks one question, --test_prompts a list of others: choose one")
        for benchmarks, names in USED_BY.items():
            for name in sorted(names & self.given):
                if self.benchmark not in benchmarks:
                    way = " or ".join(f"--benchmark {one}" if one else "talking" for one in benchmarks)
                    raise ValueError(f"--{name} has an effect with {way} only: leave it out")


def load(args, device):
    """(model, tokenizer, whether it chats) of --weight."""
    model, tokenizer = read_weight(args.weight, args, device)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    chats = bool(tokenizer.chat_template) if args.mode == "auto" else args.mode == "chat"
    if chats and not tokenizer.chat_template:
        raise ValueError(f"--mode chat: {args.weight} has no chat template, it was only pretrained; fine-tune it first "
                         "(trainer/train_full_sft.py), or leave --mode out")
    return model.to(device), tokenizer, chats


def generate(model, tokenizer, ids, args, run):
    """Print the model's continuation of the token ids as it is made; returns (its text, tokens per second)."""
    room = model.config.max_position_embeddings - len(ids)
    if room <= 0:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model sees {len(ids) + room} at most: shorten it")
    sampling = dict(do_sample=False) if args.temperature == 0 else dict(
        do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    prompt = torch.tensor([ids], device=run.device)
    start = time.perf_counter()
    with run.autocast():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=min(args.max_new_tokens, room),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            repetition_penalty=args.repetition_penalty, **sampling)
    new = out[0, len(ids):]
    return tokenizer.decode(new, skip_special_tokens=True), len(new) / (time.perf_counter() - start)


def answer(model, tokenizer, chats, history, text, args, run):
    """Reply to `text`, printed as it comes; returns the history with this round added."""
    messages = [*history, {"role": "user", "content": text}]
    if chats:
        system = [{"role": "system", "content": args.system}] if args.system else []
        rounds = messages[max(0, len(messages) - 1 - 2 * args.historys):]
        ids = encode_prompt(tokenizer, system + rounds, enable_thinking=args.open_thinking)
    else:
        ids = [tokenizer.pad_token_id, *tokenizer(text).input_ids]  # <|endoftext|> begins a document
        print(text, end="", flush=True)
    reply, speed = generate(model, tokenizer, ids, args, run)
    if args.show_speed:
        print(f"[{speed:.1f} tokens/s]")
    thought = "<think>\n" if chats and args.open_thinking else ""  # the prompt's part of the block; later rounds do not see it
    return [*messages, {"role": "assistant", "content": thought + reply}]


def chat(model, tokenizer, chats, args, run):
    """Read messages from the terminal until the user leaves."""
    print(HELP if chats else f"This model was only pretrained: it continues your text. {HELP}")
    history = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/new":
            history = []
        elif text.startswith("/"):
            print(HELP)
        elif text:
            try:
                history = answer(model, tokenizer, chats, history if chats else [], text, args, run)
            except KeyboardInterrupt:
                print("\n[stopped; this round is forgotten]")


def benchmark_toy(model, tokenizer, chats, args, run):
    """Accuracy on held-out questions of the toy world, per skill and overall."""
    if not chats:
        raise ValueError("--benchmark toy asks questions in a chat, but this checkpoint was only pretrained; "
                         "give a fine-tuned one, or measure this one with --benchmark bpb")
    questions = heldout_questions(make_world(args.toy_level), args.limit)
    rows = accuracy_table(toy_answers(model, tokenizer, questions, run, args.open_thinking,
                                     args.max_new_tokens if "max_new_tokens" in args.given else 128))
    print(format_table(rows))
    return rows


def benchmark_bpb(model, tokenizer, args, run):
    """Bits per byte of each file of --data_path."""
    rows = []
    for path in args.data_path:
        _, first = next(iter(read_rows(find_shards(path)[0][0])))
        if "conversations" in first and not tokenizer.chat_template:
            tokenizer.chat_template = (ROOT / "model" / "chat_template.jinja").read_text(encoding="utf-8")
        dataset = (SFTDataset if "conversations" in first else PretrainDataset)(path, tokenizer, args.max_seq_len)
        rows.append({"file": path, **bits_per_byte(model, tokenizer, dataset, run, args.max_seq_len)})
        print("{file}: {bpb:.4f} bits per byte, {loss:.4f} nats per token, {tokens:,} tokens, {bytes:,} bytes".format(**rows[-1]))
    return rows


def main(argv=None):
    args = parse_args(EvalArgs, argv)
    run = Compute(args)
    model, tokenizer, chats = load(args, run.device)
    if args.benchmark:
        rows = (benchmark_toy(model, tokenizer, chats, args, run) if args.benchmark == "toy"
                else benchmark_bpb(model, tokenizer, args, run))
        if args.json:
            write_json(args.json, {"weight": args.weight, "benchmark": args.benchmark, "rows": rows})
    elif args.prompt is not None or args.test_prompts:
        for text in TEST_PROMPTS if args.test_prompts else [args.prompt]:
            seed_everything(args.seed)
            if args.test_prompts:
                print(f"> {text}" if chats else "")
            answer(model, tokenizer, chats, [], text, args, run)
    else:
        chat(model, tokenizer, chats, args, run)


if __name__ == "__main__":
    command(main)
