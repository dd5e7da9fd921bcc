"""The web page: talk to a checkpoint, compare two, watch the curves of runs. Chinese and English.

    python scripts/web_demo.py                           # http://127.0.0.1:8501, this machine alone
    python scripts/web_demo.py --port 8502 --save_dir out/quickstart
    python scripts/web_demo.py --tools my_tools.py       # your tools: see dataset/chat/tools.py
    streamlit run scripts/web_demo.py -- --save_dir out/quickstart   # Streamlit's flags before --

It offers the checkpoints and PEFT adapters that it finds in --save_dir, one or two levels deep.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.chat.tools import load_tools
from scripts.checkpoint import ComputeArgs
from trainer.runtime.arguments import arg, check_positive, command, parse_args


@dataclass
class WebArgs(ComputeArgs):
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    port: int = arg(8501, "where the page listens")
    address: str = arg(
        "127.0.0.1", "who may look: 127.0.0.1 this machine alone, 0.0.0.0 everyone in the network"
    )
    int8: bool = arg(False, "int8 weights on a CPU: less memory, a little less exact")
    max_len: int | None = arg(
        None, "tokens of prompt and completion together (default: 2048, or the model's positions)"
    )
    tools: str = arg("", "a Python file with your own tools, in addition to the toy world's")

    def check(self) -> None:
        check_positive(self, "port", "max_len")


def main(argv: list[str] | None = None) -> None:
    """Start Streamlit on this file."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(WebArgs, argv)
    if args.tools:
        load_tools(args.tools)  # a mistake in it shows here rather than on the page
    streamlit = [sys.executable, "-m", "streamlit", "run", str(Path(__file__).resolve())]
    streamlit += [f"--server.port={args.port}", f"--server.address={args.address}"]
    os.execv(sys.executable, [*streamlit, "--", *argv])


if __name__ == "__main__":
    if "streamlit" in sys.modules:  # which runs this file anew after every click
        from scripts.web.pages import draw

        draw(parse_args(WebArgs, sys.argv[1:]))
    else:
        command(main)
