"""The web page with an engine that writes, slowly, what the browser's tests expect; started by
`streamlit run`.
"""

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoTokenizer

from model.engine import Output
from model.sampling import SamplingParams
from scripts.web import engines, pages
from scripts.web_demo import ROOT, WebArgs, parse_args

TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "model")
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "27 * 34"}}\n</tool_call>'

SIGNS = "3~5天，7~9天\n:red[a] :smile: :material/home: at 12:30:45\n**bold** `a~b :smile:`"


def reply_to(prompt: str) -> Iterable[str]:
    """Pieces of the completion of a prompt."""
    if "<tool_response>" in prompt:
        return ["The ", "calculator ", "says ", "918."]
    if "27 * 34" in prompt:
        return [CALL[i : i + 8] for i in range(0, len(CALL), 8)]
    if "count" in prompt:
        return (f"{n} " for n in itertools.count(1))
    if "signs" in prompt:
        return [SIGNS]
    return ["<think>", "\nBe brief.\n", "</think>", "\n\n", "Hello."]


class SlowEngine:
    """Stands in for an EngineThread."""

    engine = SimpleNamespace(max_len=2048)

    def submit(
        self, prompt: list[int], params: SamplingParams, on_output: Callable[[Output], None]
    ) -> SimpleNamespace:
        request = SimpleNamespace(
            prompt=prompt, sampled=[], num_reused=0, finish_reason=None, is_cancelled=False
        )
        threading.Thread(
            target=self.write, args=(request, TOKENIZER.decode(prompt), on_output), daemon=True
        ).start()
        return request

    def write(
        self, request: SimpleNamespace, prompt: str, on_output: Callable[[Output], None]
    ) -> None:
        for piece in reply_to(prompt):
            time.sleep(0.05)
            if request.is_cancelled:
                return
            request.sampled.append(1)
            on_output(Output(request, piece))
        request.finish_reason = "stop"
        on_output(Output(request, ""))

    def cancel(self, request: SimpleNamespace) -> None:
        request.is_cancelled = True


engines.get = lambda run, base, args: engines.Loaded(run.name, SlowEngine(), TOKENIZER, True)
pages.draw(parse_args(WebArgs, sys.argv[1:]))
