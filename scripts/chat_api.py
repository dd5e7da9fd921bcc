"""Talk to a server with the official `openai` package: streaming, reasoning, and a loop that runs the tools it calls.

    python scripts/serve_openai_api.py --weight full_sft &          # any other server with this API will do as well
    python scripts/chat_api.py --prompt "Tell me the time in Lurubridge." --tools get_time get_weather
    python scripts/chat_api.py --tools my_tools.py                  # tools of your own: see dataset/tools.py
    python scripts/chat_api.py --think                              # without --prompt: a conversation
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import openai

from dataset.tools import ToolBox, load_tools
from dataset.toy_tools import TOY_TOOLS
from trainer.arguments import arg, check_positive, command, parse_args

MOST_ROUNDS = 5  # of tool calls for one question


@dataclass
class ChatArgs:
    base_url: str = arg("http://127.0.0.1:8000/v1", "the server")
    api_key: str = arg("none", "its key, if it asks for one")
    model: str = arg("", "the model's name there (default: the first that it serves)")
    prompt: str | None = arg(None, "ask this one question and stop")
    tools: list[str] = arg([], "tools that the model may call: names of the toy world's, .py files with your own", nargs="+")
    think: bool | None = arg(None, "1: think before answering, 0: answer at once (default: as the model likes)")
    temperature: float = arg(0.0, "0: always the likeliest token")
    max_tokens: int = arg(512, "longest answer, in tokens")

    def check(self):
        """ValueError for values out of range and for tools that are not there."""
        check_positive(self, "max_tokens")
        self.box = toolbox(self.tools)
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature {self.temperature}: give 0 to 2")


def toolbox(names):
    """The tools of the toy world that have these names, and all those in the .py files among them."""
    box = ToolBox()
    for name in names:
        if not name.endswith(".py") and name not in TOY_TOOLS.tools:
            raise ValueError(f"--tools {name}: give a .py file, or some of {', '.join(TOY_TOOLS.tools)}")
        for tool in load_tools(name).tools.values() if name.endswith(".py") else [TOY_TOOLS.tools[name]]:
            box.register(tool)
    return box


def reply_to(client, messages, args):
    """The assistant's next message, printed as it comes: text, reasoning in brackets, and the calls it makes."""
    options = {"tools": args.box.schemas()} if args.tools else {}
    if args.think is not None:
        options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": args.think}}
    chunks = client.chat.completions.create(model=args.model, messages=messages, stream=True, temperature=args.temperature,
                                            max_tokens=args.max_tokens, **options)
    content, calls, thinks = "", [], False
    for chunk in chunks:
        delta = chunk.choices[0].delta
        thought = getattr(delta, "reasoning_content", None) or ""  # not in the original API, so not in its types
        if bool(thought) != thinks and (thought or delta.content):
            print("]\n" if thinks else "[", end="")
            thinks = not thinks
        print(thought or delta.content or "", end="", flush=True)
        content += delta.content or ""
        for part in delta.tool_calls or ():
            if part.id:  # a call begins; its arguments follow in pieces
                calls.append({"id": part.id, "type": "function", "function": {"name": part.function.name, "arguments": ""}})
            calls[part.index]["function"]["arguments"] += part.function.arguments or ""
    print("]" if thinks else "")
    return {"role": "assistant", "content": content or None if calls else content, **({"tool_calls": calls} if calls else {})}


def answer(client, messages, args):
    """Append to the messages what it takes until the assistant calls no more tools."""
    for _ in range(MOST_ROUNDS):
        message = reply_to(client, messages, args)
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


def main(argv=None):
    args = parse_args(ChatArgs, argv)
    client = openai.OpenAI(base_url=args.base_url, api_key=args.api_key)
    try:
        args.model = args.model or client.models.list().data[0].id
        messages = []
        while True:
            messages.append({"role": "user", "content": args.prompt if args.prompt is not None else input("> ")})
            answer(client, messages, args)
            if args.prompt is not None:
                return
    except EOFError:
        print()
    except openai.APIConnectionError as error:
        raise OSError(f"no server answers at {args.base_url}: start one with scripts/serve_openai_api.py") from error
    except openai.APIError as error:  # of a status, or in the middle of a stream
        raise ValueError(f"{args.base_url}: {error.message}") from error


if __name__ == "__main__":
    command(main)
