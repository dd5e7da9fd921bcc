"""A conversation in the terminal: messages that the user types, commands, streamed completions."""

import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.chat.format import (
    document_start,
    encode_prompt,
    normalize_conversation,
    opens_reasoning,
)
from dataset.files.jsonl import dump_row
from model.engine import Engine, Request
from model.model_lora import set_adapter
from model.model_minimind import MiniMindForCausalLM
from model.sampling import SamplingParams
from trainer.runtime.process import Compute

MAX_LEN = 8192  # tokens of a chat, also where the model has more positions
HELP = """Type a message; Ctrl-C stops a completion. A line that ends with \\ continues in the next
line, and three double quotes begin and end a block of lines. Commands:
/reset          forget the conversation
/system TEXT    set the system prompt and forget the conversation; without TEXT: show it
/think on|off   think before answering, or answer at once; /think auto leaves it to the model
/save FILE      append the conversation to FILE, as a row that can be trained on
/adapter NAME   use this adapter (or the sum of several); /adapter none: the bare network
/exit           leave (or Ctrl-D)"""
THINKING = {"on": True, "off": False, "auto": None}


class Talk:
    """A conversation with a model: `messages` so far, and the settings that commands change."""

    def __init__(
        self,
        model: MiniMindForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        chats: bool,
        args: Any,  # eval_llm.EvalArgs
        run: Compute,
    ):
        self.tokenizer, self.chats, self.args = tokenizer, chats, args
        max_len = min(MAX_LEN, model.config.max_position_embeddings)
        self.engine = Engine(model, tokenizer, 2, max_len, dtype=run.dtype, int8=args.int8)
        self.system, self.thinking, self.messages = args.system, args.open_thinking, []

    def prompt_for(self, text: str) -> list[int]:
        """Token ids of the conversation with `text` as its next message, or of a text."""
        if not self.chats:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            return [*document_start(self.tokenizer), *ids]
        rounds = self.messages[max(0, len(self.messages) - 2 * self.args.historys) :]
        messages = [*self.system_message(), *rounds, {"role": "user", "content": text}]
        return encode_prompt(self.tokenizer, messages, enable_thinking=self.thinking)

    def system_message(self) -> list[dict]:
        """The system prompt as a list of messages, empty without one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> None:
        """Answer `text`, printed as it comes, and remember both. ValueError for too long a chat."""
        prompt = self.prompt_for(text)
        if not self.chats:
            print(text, end="", flush=True)
        start = time.perf_counter()
        request = self.generate(prompt)
        if self.args.show_speed:
            print(f"[{len(request.sampled) / (time.perf_counter() - start):.1f} tokens/s]")
        if self.chats:
            is_open = opens_reasoning(self.tokenizer, prompt)
            opened = "<think>\n" if is_open else ""  # by the prompt; later rounds omit it
            self.messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": opened + request.text},
            ]

    def generate(self, prompt: list[int]) -> Request:
        """Print the continuation of the token ids as it is made; returns the finished Request."""
        args, names = self.args, ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        options = {name: getattr(args, name) for name in names}
        options |= {"max_tokens": args.max_new_tokens, "seed": args.seed + len(self.messages)}
        params = SamplingParams(**options)
        request = self.engine.add(prompt, params)
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

    def save(self, path: str | Path) -> None:
        """Append the conversation to a .jsonl file, in the format of the SFT data."""
        messages, _ = normalize_conversation(self.system_message() + self.messages)
        with open(path, "a", encoding="utf-8") as file:
            file.write(dump_row({"conversations": messages}))
        print(f"[{len(messages)} messages appended to {path}]")

    def obey(self, line: str) -> None:
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
        elif name == "/help":
            print(HELP)
        else:
            print(f"[not understood: {line}]\n{HELP}")


def read_message() -> str:
    """One message from the terminal, of one or several lines. EOFError at the end of the input."""
    line = input("> ").strip()
    if line.startswith('"""'):
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input("... "))
        return "\n".join(lines).rstrip()[:-3].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input("... ").rstrip()
    return line


def chat(talk: Talk) -> None:
    """Read messages from the terminal until the user leaves."""
    if not talk.chats:
        print("This model was only pretrained: it continues your text.")
    print(HELP)
    while True:
        try:
            text = read_message()
        except (EOFError, KeyboardInterrupt):
            return print()
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
