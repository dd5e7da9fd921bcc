"""What happens when a loss or a gradient is not finite: nothing is learned from it, and it does not go on like that."""

import json
import math

import torch

from trainer.metrics import writing

LOWER = 0.5  # the learning rate after going back, as a share of what it would have been
KEPT = 20  # bad steps whose rows stay on the disk


class NonFiniteGuard:
    """Counts steps in a row whose loss or gradient norm is not finite; they are not applied.

    After `max_bad_steps` of them the run goes back to its last checkpoint once, with half the learning rate; after as
    many again it stops. All numbers that it decides by are sums over the ranks, so all ranks decide alike.
    """

    def __init__(self, max_bad_steps):
        self.max_bad_steps = max_bad_steps
        self.in_a_row, self.went_back, self.learning_rate_share = 0, False, 1.0

    def check(self, loss, grad_norm, is_overflow=False):
        """Whether the step may be applied. is_overflow: float16's scaler will deal with this gradient norm itself."""
        good = math.isfinite(loss) and (math.isfinite(grad_norm) or is_overflow)
        self.in_a_row = 0 if good else self.in_a_row + 1
        return good

    @property
    def is_exhausted(self):
        return self.in_a_row >= self.max_bad_steps

    def go_back(self, checkpoint, record):
        """Restore the last checkpoint, on all ranks, and take back its later lines in `record`; returns its step.

        FloatingPointError if there is none, or if the run has gone back before.
        """
        count, was_there = self.in_a_row, self.went_back
        step, targets = (0, 0) if was_there else checkpoint.restore()
        if was_there or not checkpoint.is_resumed:
            raise FloatingPointError(
                f"{count} steps in a row had a loss or gradient that is not finite, "
                f"{'with half the learning rate too' if was_there else 'and there is no checkpoint to go back to'}. "
                f"Their rows are in {record.folder / 'bad_steps'}. {cure(record.run)}"
                f"{'; the checkpoints are from before' if was_there else ''}")
        self.in_a_row, self.went_back, self.learning_rate_share = 0, True, LOWER
        record.go_back(step, targets)
        record.say(f"{count} steps in a row were not finite: back to step {step}, with half the learning rate")
        return step

    def state_dict(self):
        return {"in_a_row": self.in_a_row, "went_back": self.went_back, "learning_rate_share": self.learning_rate_share}

    def load_state_dict(self, state):
        self.__dict__.update(state)


def cure(run):
    """What to do about steps that are not finite, a sentence without its end."""
    if run.dtype == torch.float32:
        return "Look at them, or lower --learning_rate"
    return "Look at them, lower --learning_rate, or use --dtype float32"


def write_bad_rows(folder, tokenizer, micro_batches, step, run, loss, grad_norm):
    """Write the texts of a bad step to `folder`/bad_steps/step-N-rank-R.jsonl, one document a line; returns what to say.

    `step` is the number of the update, from 1, as in metrics.jsonl; once the run has gone back the name is step-N-again-rank-R.
    Each rank writes its own, and deletes those of its older bad steps that are more than KEPT.
    """
    ranks, name = run.ranks, f"step-{step}-again" if run.guard.went_back else f"step-{step}"
    path, lines = folder / "bad_steps" / f"{name}-rank-{ranks.rank}.jsonl", []
    for number, micro in enumerate(micro_batches):
        starts = torch.nonzero(micro["position_ids"].flatten() == 0).flatten().tolist()
        ids, targets = micro["input_ids"].flatten(), (micro["labels"] != -100).flatten()
        for start, end in zip(starts, [*starts[1:], len(ids)]):
            if targets[start:end].any():  # the rest is padding
                lines.append({"micro_batch": number, "loss": str(loss), "grad_norm": str(grad_norm),
                              "text": tokenizer.decode(ids[start:end])})
    with writing(path, ", and go on with --from_resume"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        ours = sorted(path.parent.glob(f"step-*-rank-{ranks.rank}.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        for old in ours[:-KEPT]:
            old.unlink()
    named = path if ranks.world_size == 1 else path.with_name(f"{name}-rank-*.jsonl")
    return f"step {step}: loss {loss}, gradient norm {grad_norm}: not applied; its rows are in {named}"
