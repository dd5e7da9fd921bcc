"""The name that train_reason.py has in tutorials of 2025."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("train_reason.py")), run_name="__main__")
