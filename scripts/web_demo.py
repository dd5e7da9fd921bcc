"""The web page: talk to a checkpoint, put two side by side, watch the curves of runs. Chinese and English.

    python scripts/web_demo.py                                       # http://127.0.0.1:8501, for this machine alone
    python scripts/web_demo.py --port 8502 --save_dir out/quickstart
    python scripts/web_demo.py --tools my_tools.py                   # offer tools of your own: see dataset/tools.py
    streamlit run scripts/web_demo.py -- --save_dir out/quickstart   # the same, with Streamlit's own flags before the --

It offers the checkpoints and PEFT adapters that it finds in --save_dir, one or two levels deep.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from streamlit.runtime.scriptrunner import get_script_run_ctx

from dataset.tools import load_tools
from trainer.arguments import arg, check_positive, command, parse_args


@dataclass
class WebArgs:
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    port: int = arg(8501, "where the page listens")
    address: str = arg("127.0.0.1", "who may look: 127.0.0.1 this machine alone, 0.0.0.0 everyone in the network")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])
    int8: bool = arg(False, "int8 weights on a CPU: less memory, a little less exact")
    max_len: int | None = arg(None, "tokens of prompt and answer together (default: 2048, or what the model has)")
    tools: str = arg("", "a Python file with tools of your own, offered beside those of the toy world")

    def check(self):
        """ValueError for values out of range."""
        check_positive(self, "port", "max_len")


def main(argv=None):
    """Start Streamlit on this file."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(WebArgs, argv)
    if args.tools:
        load_tools(args.tools)  # a mistake in it shows here rather than on the page
    os.execv(sys.executable, [
        sys.executable, "-m", "streamlit", "run", str(Path(__file__).resolve()), f"--server.port={args.port}",
        f"--server.address={args.address}", "--", *argv])


if __name__ == "__main__":
    if get_script_run_ctx(suppress_warning=True) is None:
        command(main)
    else:  # Streamlit runs this file anew after every click
        from scripts.web.pages import draw

        draw(parse_args(WebArgs, sys.argv[1:]))
