"""The parts of scripts/eval_toolcall.py: the questions, the verdicts on their dialogues."""
