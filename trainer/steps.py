"""The optimizer steps of a run: how it cuts its data into them; built ahead of time by other processes, from any step on."""

import signal
import time

import torch
from torch.utils.data import DataLoader


def step_batches(kind, dataset, args, run, tokenizer, checkpoint):
    """The steps of a run on `dataset` as its flags, its ranks and the checkpoint that it goes on from cut them.

    kind: PackedBatches or PairBatches.
    """
    return kind(dataset, batch_size=args.batch_size, accumulation_steps=args.accumulation_steps, max_seq_len=args.max_seq_len,
                seed=args.seed, epochs=args.epochs, max_steps=args.max_steps, pad_id=tokenizer.pad_token_id,
                rank=run.ranks.rank, world_size=run.ranks.world_size, rows_per_step=checkpoint.rows_per_step)


class Steps:
    """Iterates over (step, micro-batches) from `first` on; `go_back(step)` makes the next one that step.

    `num_workers` processes build batches while the training process computes (0: it builds them itself; None: 2 for a GPU,
    which must not wait, else 0). Which process builds a batch decides nothing. `seconds_waited` is how long training has
    waited for data so far.
    """

    def __init__(self, batches, first, num_workers, device):
        self.batches, self.next, self.seconds_waited = batches, first, 0.0
        num_workers = (2 if device.type == "cuda" else 0) if num_workers is None else num_workers
        self.options = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
        if num_workers:
            self.options |= {"worker_init_fn": leave_signals_to_the_parent, "prefetch_factor": 4}

    def go_back(self, step):
        self.next = step

    def __iter__(self):
        while self.next < len(self.batches):
            loader = iter(DataLoader(self.batches, batch_size=None, sampler=range(self.next, len(self.batches)), **self.options))
            expected = self.next
            while expected == self.next < len(self.batches):  # until go_back: then a new loader
                start = time.perf_counter()
                micro_batches = next(loader)
                self.seconds_waited += time.perf_counter() - start
                self.next = expected = expected + 1
                yield expected - 1, micro_batches


def leave_signals_to_the_parent(worker):
    """Ctrl-C reaches every process of a terminal, but batches are needed until the step under way is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def count_targets(micro_batches):
    """Number of tokens that are trained on in these micro-batches: the labels that are not -100."""
    return sum(int((micro["labels"] != -100).sum()) for micro in micro_batches)
