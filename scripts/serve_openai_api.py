"""Serve checkpoints to every program that can talk to OpenAI's API: chat, completions, responses,
tools, JSON by a schema.

    python scripts/serve_openai_api.py                     # out/full_sft_*, at 127.0.0.1:8000
    python scripts/serve_openai_api.py --weight chat=out/full_sft_tiny base=out/pretrain_tiny
    python scripts/serve_openai_api.py --weight full_sft --adapter poet=out/lora_poet \\
        --api_key SECRET --host 0.0.0.0

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "full_sft", "messages": [{"role": "user", "content": "Who are you?"}],
        "stream": true}'

The base URL for clients is http://127.0.0.1:8000/v1, the model is the name given with --weight (or
its folder's). scripts/chat_api.py is such a client, /docs lists the fields, /metrics is for
Prometheus. Particular to this server:

- Null means "not given". Fields that the server does not know are ignored: each is named once in
  the log and in the response's header X-Ignored-Fields, and counted in /metrics. With --strict they
  are refused. Fields whose absence would change the answer (images, functions, suffix ...) always
  are.
- max_tokens above the room in the context is cut to that room; without max_tokens, or with -1, a
  completion may fill the context. top_p 0 is greedy decoding, as temperature 0.
- continue_final_message: true continues the text of the last message, an assistant's. With
  add_generation_prompt: false alone the model writes what follows the last message.
- response_format and tool calls are enforced while sampling, so the JSON fits its schema. If
  max_tokens ends it early, finish_reason is "length". A schema that cannot be enforced is an error;
  for a tool that is not strict, what cannot be enforced is left out.
- stop texts are looked for in free text alone: not in reasoning, in calls, or in JSON that is
  enforced.
- logprobs are those of the bare model, before temperature and penalties, for all tokens of the raw
  completion.
- Where JSON or a call is enforced, the model thinks before it only if it is asked to.
- Thinking is switched by chat_template_kwargs: {"enable_thinking": true} or by reasoning_effort,
  and comes as reasoning_content. Extensions: top_k, min_p, repetition_penalty, ignore_eos.
- /v1/responses is a second form of chat. Responses are kept in memory for previous_response_id,
  unless store is false; the oldest are forgotten.
- /tokenize, /detokenize and /apply-template have the names of vLLM's and llama.cpp's servers.
- Every response has an X-Request-Id, the client's own if it sent a good one.
- A text prompt may hold special tokens (`<|im_start|>`); one that does not begin with one gets
  <|endoftext|> before it.
- On a CPU one core is left to the connections, unless OMP_NUM_THREADS says how many the networks
  take. Where uvloop and httptools are installed, they are used.
- Web pages of other origins are shut out by the browser, unless --allow_origin names them.
- SIGTERM or Ctrl-C: running requests are finished, new ones get 503, then the program ends; a
  second signal ends it at once. A client that reads nothing for 30 seconds is given up.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+")
sys.path.insert(0, str(ROOT))

from scripts.checkpoint import WeightArgs
from trainer.runtime.arguments import arg, check_not_negative, check_positive, command, parse_args


@dataclass
class ServeArgs(WeightArgs):
    weight: list[str] = arg(
        ["full_sft"],
        "the models: names of runs in SAVE_DIR, checkpoint folders or .pth files; with "
        "NAME=FOLDER clients call it NAME",
        nargs="+",
    )
    adapter: list[str] = arg(
        [],
        "LoRA adapters to serve too, on the first --weight; with NAME=FOLDER clients call it NAME",
        nargs="+",
    )
    host: str = arg(
        "127.0.0.1",
        "who may connect: 127.0.0.1 this machine alone, 0.0.0.0 everyone in the network",
    )
    port: int = arg(8000, "where to listen; 0: any free port")
    api_key: str = arg(
        "",
        "clients must send it as Bearer token (default: the environment's MINIMIND_API_KEY, or "
        "none)",
    )
    allow_origin: list[str] = arg(
        [],
        "web pages that may use the server in a browser, as http://localhost:3000; *: all pages; "
        "null: files opened in the browser",
        nargs="+",
    )
    max_batch_size: int = arg(16, "completions of one model that are decoded at once")
    max_len: int | None = arg(
        None,
        "tokens of prompt and completion together (default: 2048, or the model's positions)",
        aliases=("max_seq_len", "max_model_len"),
    )
    max_queue: int = arg(256, "completions of one model that may wait; beyond that clients get 429")
    max_body_bytes: int = arg(4 << 20, "longest body of a request; beyond that clients get 413")
    max_stored_responses: int = arg(
        1000, "responses of /v1/responses that are kept in memory for later; 0: none"
    )
    strict: bool = arg(
        False,
        "refuse requests with fields that this server does not know, instead of ignoring them",
    )
    int8: bool = arg(
        False,
        "int8 weights on a CPU: less memory, a little less exact; other requests may then change a "
        "rare token of a completion (seeds are exact in float32 only)",
    )
    cuda_graphs: bool = arg(False, "on a GPU: replay a step's kernels instead of launching each")

    def check(self) -> None:
        super().check()
        check_positive(self, "max_batch_size", "max_len", "max_body_bytes")
        check_not_negative(self, "max_queue", "max_stored_responses")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port}: give one from 0 (any that is free) to 65535")
        for origin in self.allow_origin:
            if origin not in ("*", "null") and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--allow_origin {origin}: give scheme, host and port as the browser sends "
                    "them, http://localhost:3000, without a path, or * for all pages"
                )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(ServeArgs, argv)
    from scripts.openai_api.server import serve

    serve(args)


if __name__ == "__main__":
    command(main)
