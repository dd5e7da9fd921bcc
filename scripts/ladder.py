"""The old name of scripts/evaluate_stages.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.evaluate_stages import main
from trainer.runtime.arguments import command

if __name__ == "__main__":
    command(main)
