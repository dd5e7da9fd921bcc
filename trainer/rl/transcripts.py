"""transcripts.jsonl in a run's folder: samples of a run, for the eye."""

import json

import numpy as np

from model.files import replace_file, writing
from trainer.rl.rollout import Sample
from trainer.runtime.record import RESUME
from trainer.runtime.run import Run


class Transcripts:
    """Writes --num_transcripts samples of every logged step; only rank 0 does.

    done: updates before this process. Lines about later steps are of a former attempt: dropped.
    """

    def __init__(self, run: Run, done: int):
        self.path, self.args, self.last = run.folder / "transcripts.jsonl", run.args, done
        self.is_on = run.ranks.is_main_process and run.args.num_transcripts > 0
        if run.ranks.is_main_process:
            self.keep_lines(done)

    def keep_lines(self, done: int) -> None:
        """Drop the lines about steps after `done`, and one that is half written."""
        if not self.path.exists():
            return
        # bytes: a completion may hold other characters that end a line for Python
        lines = self.path.read_bytes().split(b"\n")[:-1]
        kept = [line + b"\n" for line in lines if json.loads(line)["step"] <= done]
        replace_file(self.path, lambda new: new.write_bytes(b"".join(kept)), RESUME)

    def write(self, step: int, samples: list[Sample]) -> None:
        """Add some of a step's samples, from the worst to the best by their reward."""
        if not self.is_on or not samples or step % self.args.log_interval:
            return
        if step <= self.last:  # the run has gone back
            self.keep_lines(step - 1)
        self.last = step
        ordered = sorted(samples, key=lambda sample: sample.rewards["total"])
        places = np.linspace(0, len(ordered) - 1, self.args.num_transcripts).round().astype(int)
        with writing(self.path, RESUME), open(self.path, "a", encoding="utf-8") as file:
            for sample in (ordered[i] for i in np.unique(places)):
                row = {
                    "step": step,
                    "item": sample.item,
                    "rewards": sample.rewards,
                    "is_complete": sample.is_complete,
                    "messages": sample.messages,
                    "text": sample.text,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
