"""When a loss or a gradient is not finite: the step is not applied, and there is a limit."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from model.files import writing
from trainer.runtime.data import documents_of
from trainer.runtime.run import Run, Update

LOWER = 0.5  # factor of the learning rate once the run has returned to a checkpoint
KEPT = 20  # bad steps whose rows stay on the disk


class NonFiniteGuard:
    """Counts updates in a row whose loss or gradient norm was not finite.

    After `max_bad_steps` of them the run returns to its last checkpoint once, with half the
    learning rate; after as many again it stops. It decides by sums over the ranks, so all ranks
    decide alike.
    """

    def __init__(self, max_bad_steps: int):
        self.max_bad_steps = max_bad_steps
        self.in_a_row, self.went_back, self.learning_rate_factor = 0, False, 1.0

    def count(self, is_finite: bool) -> None:
        """Take note of a step."""
        self.in_a_row = 0 if is_finite else self.in_a_row + 1

    @property
    def is_exhausted(self) -> bool:
        return self.in_a_row >= self.max_bad_steps

    def go_back(self) -> None:
        """Start again from a checkpoint, at a lower learning rate."""
        self.in_a_row, self.went_back, self.learning_rate_factor = 0, True, LOWER

    def state_dict(self) -> dict[str, object]:
        return {
            "in_a_row": self.in_a_row,
            "went_back": self.went_back,
            "learning_rate_share": self.learning_rate_factor,  # its name on disk
        }

    def load_state_dict(self, state: dict) -> None:
        self.in_a_row, self.went_back = state["in_a_row"], state["went_back"]
        self.learning_rate_factor = state["learning_rate_share"]


def fix_for_bad_steps(run: Run) -> str:
    """What to do about steps that are not finite, a sentence without its end."""
    if run.dtype == torch.float32:
        return "Look at them, or lower --learning_rate"
    return "Look at them, lower --learning_rate, or use --dtype float32"


def write_bad_rows(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    micro_batches: list[dict[str, torch.Tensor]],
    name: str,
    update: Update,
) -> Path:
    """Write the texts of a bad step to bad_steps/NAME-rank-R.jsonl in the run's folder.

    One document a line. Each rank writes its own, and deletes its older files but KEPT. Returns the
    path, for several ranks with * as the rank.
    """
    rank = run.ranks.rank
    path = run.folder / "bad_steps" / f"{name}-rank-{rank}.jsonl"
    about = {"loss": str(update.loss), "grad_norm": str(update.grad_norm)}
    with writing(path, ", and resume with --from_resume"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            json.dumps({"micro_batch": number, **about, "text": text}, ensure_ascii=False) + "\n"
            for number, micro in enumerate(micro_batches)
            for text in (tokenizer.decode(one["input_ids"]) for one in documents_of(micro))
        )
        path.write_text("".join(lines), encoding="utf-8")
        ours = path.parent.glob(f"step-*-rank-{rank}.jsonl")
        for old in sorted(ours, key=lambda file: file.stat().st_mtime_ns)[:-KEPT]:
            old.unlink()
    return path if run.ranks.world_size == 1 else path.with_name(f"{name}-rank-*.jsonl")
