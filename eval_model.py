"""The name that eval_llm.py has in tutorials of 2025."""

from eval_llm import main
from trainer.runtime.arguments import command

if __name__ == "__main__":
    command(main)
