"""Conversations in one text, as the function-calling data of glaive has them -> messages."""

import json
import re

SPEAKER = re.compile(r"(?:\A|\n)\s*(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):\s*")
ROLES = {"SYSTEM": "system", "USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
# between the system prompt and the list of functions, for which our template has words of its own
OFFER = re.compile(r"\s*with access to.*|\s*Use them if.*", re.DOTALL)


def from_glaive(row: dict) -> dict:
    """A conversation in one text, with "USER:", "ASSISTANT:" and "FUNCTION RESPONSE:" in it."""
    text = "\n".join(str(row[key]) for key in ("system", "sample", "chat") if row.get(key))
    first, *parts = SPEAKER.split(text)
    if first.strip() or not parts:
        raise ValueError('no text that begins with "SYSTEM:" or "USER:". Give --format.')
    messages = []
    for speaker, said in zip(parts[::2], parts[1::2]):
        said = said.strip().removesuffix("<|endoftext|>").strip()
        message = {"role": ROLES[speaker], "content": said}
        messages.append(message | tools_of(said) if speaker == "SYSTEM" else message)
    return {"conversations": messages}


def tools_of(text: str) -> dict:
    """Return {"content", "tools"} of a system text that ends with JSON objects; {} without one."""
    start, tools, decoder = text.find("\n{"), [], json.JSONDecoder()
    if start < 0:
        return {}
    position = start + 1
    while position < len(text):
        try:
            tool, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"a tool in the system text is no JSON ({error}). Repair it."
            ) from error
        tools.append(tool)
        position = len(text) - len(text[position:].lstrip())
    content = OFFER.sub("", text[:start]).rstrip(" -,.")
    return {"content": content, "tools": json.dumps(tools, ensure_ascii=False)}
