"""Talk to a server with the official `openai` package: streaming, reasoning, and a loop that runs
the tools it calls.

    python scripts/serve_openai_api.py --weight full_sft &   # or any other server with this API
    python scripts/chat_api.py --prompt "Tell me the time in Lurubridge." --tools get_time
    python scripts/chat_api.py --tools my_tools.py           # your tools: see dataset/chat/tools.py
    python scripts/chat_api.py --tools dataset/chat/everyday_tools.py --prompt "256 * 37?"
    python scripts/chat_api.py --think                       # without --prompt: a conversation
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.chat.tools import ToolBox, load_tools
from dataset.toy.tools import TOY_TOOLS
from model.files import as_typed
from scripts.openai_api.client import (
    DEFAULT_URL,
    connected,
    first_model,
    read_stream,
    thinking_options,
)
from trainer.runtime.arguments import arg, check_positive, command, parse_args

if TYPE_CHECKING:
    from openai import OpenAI

MOST_ROUNDS = 5  # of tool calls for one question


@dataclass
class ChatArgs:
    base_url: str = arg(DEFAULT_URL, "the server")
    api_key: str = arg("", "its key, if it asks for one (default: OPENAI_API_KEY)")
    model: str = arg("", "the model's name there (default: the first that it serves)")
    prompt: str | None = arg(None, "ask this one question and stop")
    tools: list[str] = arg(
        [],
        "tools that the model may call: names of the toy world's, .py files with your own",
        nargs="+",
    )
    think: bool | None = arg(
        None, "1: think before answering, 0: answer at once (default: the model decides)"
    )
    temperature: float = arg(0.0, "0: greedy decoding")
    max_tokens: int = arg(512, "longest completion, in tokens")

    def check(self) -> None:
        self.prompt = as_typed(self.prompt)
        check_positive(self, "max_tokens")
        self.box = toolbox(self.tools)
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature {self.temperature}: give 0 to 2")


def toolbox(names: list[str]) -> ToolBox:
    """The toy world's tools of these names, and all tools in the .py files among them."""
    box = ToolBox()
    for name in names:
        is_file = name.endswith(".py")
        if not is_file and name not in TOY_TOOLS.tools:
            raise ValueError(
                f"--tools {name}: give a .py file, or some of {', '.join(TOY_TOOLS.tools)}"
            )
        for tool in load_tools(name).tools.values() if is_file else [TOY_TOOLS.tools[name]]:
            box.register(tool)
    return box


def complete(client: OpenAI, messages: list[dict], args: ChatArgs) -> dict:
    """The assistant's next message, printed as it comes: text, reasoning in brackets, and calls."""
    options = {"temperature": args.temperature, "max_tokens": args.max_tokens, "stream": True}
    if args.tools:
        options["tools"] = args.box.schemas()
    options |= thinking_options(args.think)
    reply = read_stream(
        client.chat.completions.create(model=args.model, messages=messages, **options)
    )
    if not reply.calls:
        return {"role": "assistant", "content": reply.content}
    return {"role": "assistant", "content": reply.content or None, "tool_calls": reply.calls}


def answer(client: OpenAI, messages: list[dict], args: ChatArgs) -> None:
    """Append the assistant's messages and the results of its tools, until it calls none."""
    for _ in range(MOST_ROUNDS):
        message = complete(client, messages, args)
        messages.append(message)
        if "tool_calls" not in message:
            return
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            try:
                result = args.box.run(name, json.loads(arguments))
            except json.JSONDecodeError:  # max_tokens has cut it off
                result = json.dumps({"error": "the arguments are no JSON"})
            print(f"{name}({arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


def main(argv: list[str] | None = None) -> None:
    args, messages = parse_args(ChatArgs, argv), []
    with connected(args.base_url, args.api_key) as client:
        args.model = args.model or first_model(client)
        while True:
            try:
                text = args.prompt if args.prompt is not None else input("> ")
            except EOFError:
                return print()
            messages.append({"role": "user", "content": text})
            answer(client, messages, args)
            if args.prompt is not None:
                return


if __name__ == "__main__":
    command(main)
