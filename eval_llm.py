"""Talk to a model, or measure it.

    python eval_llm.py                                       # chat in the terminal with out/full_sft_*
    python eval_llm.py --weight pretrain --prompt "Once"     # a pretrained model continues the text
    python eval_llm.py --adapter out/lora_tiny               # with what an adapter has learned
    python eval_llm.py --weight full_sft --benchmark toy     # accuracy per skill, with chance level and 95% interval
    python eval_llm.py --benchmark keyword --data_path dataset/lora_examples/medical_heldout.jsonl --adapter out/lora_medical_tiny
    python eval_llm.py --weight pretrain --benchmark bpb --data_path held_out.jsonl

In the chat a line that ends with \\ goes on in the next one, and so does everything between two lines of three quotes;
/help lists the commands. Whether a checkpoint chats or only continues text is told by its tokenizer: a chat template is
there or it is not.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from dataset.chat_format import encode_prompt, normalize_conversation
from dataset.jsonl import find_shards, read_rows
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.lora_examples import keyword_questions
from dataset.toy_world import accuracy_table, format_table, heldout_questions, make_world
from model.engine import Engine
from model.model_lora import adapter_names, free_name, load_adapter, set_adapter
from model.model_minimind import PRESETS
from model.sampling import SamplingParams
from trainer.arguments import arg, check_not_negative, check_positive, check_share, command, parse_args
from trainer.evaluation import bits_per_byte, evaluation_engine, toy_answers
from trainer.metrics import write_json
from trainer.run import Compute
from trainer.weights import read_weight, take_template

TEST_PROMPTS = [
    "你是谁？", "Who are you?", "14 加 5 等于多少？", "What is 12 minus 7?", "把 9、2、5 从小到大排列。",
    "Which is larger, 8 or 13?", "用三句话介绍一下你自己。", "Explain why the sky is blue.",
    "写一首关于秋天的短诗。", "Give me two tips for learning a language."]
# values of --benchmark ("" is talking) -> the flags that have an effect with these alone
USED_BY = {
    ("",): {"prompt", "test_prompts", "system", "historys", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
            "int8", "show_speed"},
    ("", "toy", "keyword"): {"open_thinking", "max_new_tokens"}, ("toy",): {"toy_level", "limit"}, ("bpb",): {"max_seq_len"},
    ("bpb", "keyword"): {"data_path"}, ("toy", "bpb", "keyword"): {"json"}}
MAX_LEN = 8192  # tokens of a chat that the engine holds, where the model has more positions
HELP = """Type a message; Ctrl-C stops an answer. A line that ends with \\ goes on in the next one, and
three double quotes begin and end a block of lines. Commands:
/reset          forget the conversation
/system TEXT    set the system prompt and forget the conversation; without TEXT: show it
/think on|off   think before answering, or answer at once; /think auto leaves it to the model
/save FILE      append the conversation to FILE, as a row that can be trained on
/adapter NAME   use this one of the adapters (or the sum of several); /adapter none: the bare network
/exit           leave (or Ctrl-D)"""
THINKING = {"on": True, "off": False, "auto": None}


@dataclass
class EvalArgs:
    weight: str = arg("full_sft", "which model: the name of a run in SAVE_DIR, a checkpoint folder, or a .pth file")
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    adapter: list[str] = arg([], "folder of a LoRA adapter (PEFT format) to merge into the weights; of several, the changes are "
                                 "added up", nargs="+")
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
    min_p: float = arg(0.0, "sample only from tokens at least this share as likely as the likeliest")
    repetition_penalty: float = arg(1.0, "above 1: tokens that were used become less likely")
    int8: bool = arg(False, "int8 weights: faster on a CPU, and a little less exact")
    show_speed: bool = arg(True, "print the tokens per second after each answer")
    benchmark: str = arg("", "toy: accuracy per skill; bpb: bits per byte of --data_path; keyword: share of the questions "
                             "of --data_path whose answer holds the row's keyword", choices=["toy", "bpb", "keyword"])
    data_path: list[str] = arg([], "bpb: files of text or conversations, each scored by itself; keyword: of conversations with a "
                                   "keyword", nargs="+")
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
        check_share(self, "min_p")
        check_positive(self, "max_new_tokens", "limit", "repetition_penalty")
        if self.benchmark in ("bpb", "keyword") and not self.data_path:
            raise ValueError(f"--benchmark {self.benchmark} needs --data_path FILE")
        if self.prompt is not None and self.test_prompts:
            raise ValueError("--prompt asks one question, --test_prompts a list of others: choose one")
        for benchmarks, names in USED_BY.items():
            for name in sorted(names & self.given):
                if self.benchmark not in benchmarks:
                    way = " or ".join(f"--benchmark {one}" if one else "talking" for one in benchmarks)
                    raise ValueError(f"--{name} has an effect with {way} only: leave it out")


def load(args, device):
    """(model, tokenizer, whether it chats) of --weight, with every --adapter switched on."""
    model, tokenizer = read_weight(args.weight, args, device)
    for folder in args.adapter:
        load_adapter(model, folder, free_name(model, Path(folder).resolve().name))
    set_adapter(model, adapter_names(model))
    take_template(tokenizer, args.adapter)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    chats = bool(tokenizer.chat_template) if args.mode == "auto" else args.mode == "chat"
    if chats and not tokenizer.chat_template:
        raise ValueError(f"--mode chat: {args.weight} has no chat template, it was only pretrained; fine-tune it first "
                         "(trainer/train_full_sft.py), or leave --mode out")
    return model.to(device), tokenizer, chats


class Talk:
    """A conversation with a model: `messages` so far, and the settings that commands may change."""

    def __init__(self, model, tokenizer, chats, args, run):
        self.tokenizer, self.chats, self.args = tokenizer, chats, args
        self.engine = Engine(model, tokenizer, max_batch_size=2, max_len=min(MAX_LEN, model.config.max_position_embeddings),
                             dtype=run.dtype, int8=args.int8)
        self.system, self.thinking, self.messages = args.system, args.open_thinking, []

    def prompt_for(self, text):
        """Token ids of the conversation with `text` as its next message, or of a text to go on with."""
        if not self.chats:
            return [self.tokenizer.pad_token_id, *self.tokenizer(text).input_ids]  # <|endoftext|> begins a document
        system = [{"role": "system", "content": self.system}] if self.system else []
        rounds = self.messages[max(0, len(self.messages) - 2 * self.args.historys):]
        return encode_prompt(self.tokenizer, [*system, *rounds, {"role": "user", "content": text}], enable_thinking=self.thinking)

    def answer(self, text):
        """Reply to `text`, printed as it comes, and remember both. ValueError if the conversation has become too long."""
        prompt = self.prompt_for(text)
        if not self.chats:
            print(text, end="", flush=True)
        start = time.perf_counter()
        request = self.generate(prompt)
        if self.args.show_speed:
            print(f"[{len(request.sampled) / (time.perf_counter() - start):.1f} tokens/s]")
        if self.chats:
            thought = "<think>\n" if self.thinking else ""  # the prompt's part of the block; later rounds do not see it
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": thought + request.text}]

    def generate(self, prompt):
        """Print the continuation of the token ids as it is made; returns the finished Request."""
        args = self.args
        request = self.engine.add(prompt, SamplingParams(
            temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p, max_tokens=args.max_new_tokens,
            repetition_penalty=args.repetition_penalty, seed=args.seed + len(self.messages)))
        try:
            while request.finish_reason is None:
                for output in self.engine.step():
                    print(output.text, end="", flush=True)
            print()
        finally:
            if request.finish_reason is None:  # Ctrl-C
                self.engine.cancel(request)
                self.engine.step()
        return request

    def save(self, path):
        """Append the conversation to a .jsonl file, in the format of the SFT data."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages, _ = normalize_conversation(system + self.messages)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"conversations": messages}, ensure_ascii=False) + "\n")
        print(f"[{len(messages)} messages appended to {path}]")

    def obey(self, line):
        """Carry out a line that begins with a slash."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/reset", "/new"):
            self.messages = []
            print("[the conversation is forgotten]")
        elif name == "/system" and rest:
            self.system, self.messages = rest, []
            print(f"[system prompt: {rest}; the conversation is forgotten]")
        elif name == "/system":
            print(f"[system prompt: {self.system or 'none'}]")
        elif name == "/think" and rest in THINKING and self.chats:
            self.thinking = THINKING[rest]
        elif name == "/adapter" and rest:
            set_adapter(self.engine.model, None if rest == "none" else rest.split())
            self.engine.refresh()
            print(f"[adapter: {rest}]")
        elif name == "/save" and rest and self.messages:
            self.save(rest)
        elif name == "/save" and rest:
            print("[there is nothing to save yet]")
        else:
            print(f"[not understood: {line}]\n{HELP}")


def read_message():
    """One message from the terminal, which may take several lines. EOFError at the end of the input."""
    line = input("> ").strip()
    if line.startswith('"""'):
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input("... "))
        return "\n".join(lines).rstrip()[:-3].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("... ").rstrip()
    return line


def chat(talk):
    """Read messages from the terminal until the user leaves."""
    print(HELP if talk.chats else f"This model was only pretrained: it continues your text.\n{HELP}")
    while True:
        try:
            text = read_message()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("/exit", "/quit"):
            return
        try:
            if text.startswith("/"):
                talk.obey(text)
            elif text:
                talk.answer(text)
        except KeyboardInterrupt:
            print("\n[stopped; this round is forgotten]")
        except (ValueError, OSError) as error:
            print(f"[{error}]")


def benchmark_questions(model, tokenizer, chats, args, run):
    """Accuracy on held-out questions of the toy world, per skill, or on those of files, for each, and overall."""
    if not chats:
        raise ValueError(f"--benchmark {args.benchmark} asks questions in a chat, but this checkpoint was only pretrained; "
                         "give a fine-tuned one, or measure this one with --benchmark bpb")
    if args.benchmark == "toy":
        questions = heldout_questions(make_world(args.toy_level), args.limit)
    else:
        questions = [question for path in args.data_path for question in keyword_questions(path)]
    rows = accuracy_table(toy_answers(evaluation_engine(model, tokenizer, run), questions, args.open_thinking,
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
        rows = (benchmark_bpb(model, tokenizer, args, run) if args.benchmark == "bpb"
                else benchmark_questions(model, tokenizer, chats, args, run))
        if args.json:
            write_json(args.json, {"weight": args.weight, "benchmark": args.benchmark, "rows": rows})
        return
    talk = Talk(model, tokenizer, chats, args, run)
    if args.prompt is None and not args.test_prompts:
        chat(talk)
    for text in TEST_PROMPTS if args.test_prompts else [args.prompt] if args.prompt is not None else []:
        if args.test_prompts:
            print(f"> {text}" if chats else "")
        talk.messages = []
        talk.answer(text)


if __name__ == "__main__":
    command(main)
