"""transcripts.jsonl in a run's folder: samples of a run, for the eye."""

import json

import numpy as np

from model.files import writing
from trainer.rl.rollout import Sample
from trainer.runtime.metrics import RESUME, keep_lines
from trainer.runtime.run import Run

FIELDS = ("item", "rewards", "is_complete", "messages", "text")  # of a Sample


class Transcripts:
    """Writes --num_transcripts samples of every logged step; only rank 0 does.

    done: updates before this process. Lines about later steps are of a former attempt: dropped.
    """

    def __init__(self, run: Run, done: int):
        self.path, self.args, self.last = run.folder / "transcripts.jsonl", run.args, done
        self.is_on = run.ranks.is_main_process and run.args.num_transcripts > 0
        if run.ranks.is_main_process and self.path.exists():
            keep_lines(self.path, done)

    def write(self, step: int, samples: list[Sample]) -> None:
        """Add some of a step's samples, from the worst to the best by their reward."""
        if not self.is_on or not samples or step % self.args.log_interval:
            return
        if step <= self.last:  # the run has gone back
            keep_lines(self.path, step - 1)
        self.last = step
        ordered = sorted(samples, key=lambda sample: sample.rewards["total"])
        places = np.linspace(0, len(ordered) - 1, self.args.num_transcripts).round().astype(int)
        with writing(self.path, RESUME), open(self.path, "a", encoding="utf-8") as file:
            for sample in (ordered[i] for i in np.unique(places)):
                row = {"step": step} | {name: getattr(sample, name) for name in FIELDS}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
