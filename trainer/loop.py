"""What every stage does around its loss: the learning rate before; clipping, the step, the log, validation and saving after.

    with Loop(...) as loop:
        for micro_batches in loop:
            ...                                             # forward, loss, backward: the stage's own
            loop.update(loss, num_targets, micro_batches)
"""

from contextlib import ExitStack

from trainer.guard import write_bad_rows
from trainer.optim import learning_rate_at, set_learning_rate
from trainer.record import RunRecord, finish
from trainer.steps import Steps


class Loop:
    """Iterates over the steps of `batches`, from where the checkpoint stands, until they end or a signal comes.

    It yields the micro-batches of a step, once all generators are seeded for it and the learning rate is set; `done` steps
    came before it. The body adds up gradients and calls `update`, or, if its step has several updates, `apply` for each and
    then `advance`. `evaluate(index)` -> ({"val_...": number}, text) is
    called on all ranks every --val_interval steps and after the last; None: no validation. evaluate_first: also before
    the first step, for a figure to start from. fingerprint: of the data. Leaving the `with` waits for what is being saved,
    draws the curve and writes --json.
    """

    def __init__(self, folder, args, run, model, optimizer, checkpoint, batches, fingerprint, evaluate=None,
                 evaluate_first=False):
        self.folder, self.args, self.run, self.model, self.optimizer = folder, args, run, model, optimizer
        self.checkpoint, self.batches, self.evaluate = checkpoint, batches, evaluate
        self.done, targets = checkpoint.restore()
        self.must_evaluate = evaluate_first and self.done == 0
        self.steps, self.stopped = Steps(batches, self.done, args.num_workers, run.device), False
        self.grad_norm = 0.0  # of the step's newest update, before clipping; 0 if it has none
        self.record = RunRecord(folder, args, run, model, self.steps, self.done, targets, len(batches),
                                data_fingerprint=fingerprint, arithmetic=checkpoint.arithmetic, shape=model.config.to_dict())
        self.contexts = ExitStack()

    def __enter__(self):
        self.contexts.enter_context(self.record)
        self.contexts.enter_context(self.run.signals)
        return self

    def __exit__(self, kind, error, trace):
        self.contexts.__exit__(kind, error, trace)
        if kind is None:
            self.checkpoint.wait()
            self.run.end_if_stopped(self.stopped, self.folder, self.done)
            finish(self.folder, self.args, self.run)

    def __iter__(self):
        if self.must_evaluate:
            self.validate()
        for step, micro_batches in self.steps:
            self.run.seed(step)
            share = self.run.guard.learning_rate_share  # lower once the run had to go back
            self.learning_rate = learning_rate_at(step, len(self.batches), self.args) * share
            set_learning_rate(self.optimizer, self.learning_rate)
            self.done, self.grad_norm = step, 0.0
            yield micro_batches
            if self.stopped:
                return

    def update(self, loss, num_targets, micro_batches, **figures):
        """Finish a step of one update, whose gradients are there: `apply`, then `advance`."""
        if self.apply(loss, micro_batches):
            self.advance(loss, num_targets, micro_batches, **figures)

    def apply(self, loss, micro_batches):
        """Clip the gradients that are there and update the weights; loss: of all ranks, float.

        A loss or gradient that is not finite is not applied, and its rows are written; after too many of them the run goes
        back to its last checkpoint: False, and the step ends here.
        """
        run = self.run
        self.grad_norm = run.clip_and_step(self.model, self.optimizer, loss)
        if run.guard.in_a_row:  # not finite, not applied
            self.record.say(write_bad_rows(self.folder, self.checkpoint.tokenizer, micro_batches, self.done + 1, run, loss,
                                           self.grad_norm))
            if run.guard.is_exhausted:
                self.steps.go_back(run.guard.go_back(self.checkpoint, self.record))
                return False
        return True

    def advance(self, loss, num_targets, micro_batches, **figures):
        """Count the step as done; log, validate and save where that is due.

        loss: over all ranks, float. num_targets: tokens that the step was trained on, over all ranks. `figures` are logged
        beside the loss.
        """
        record, args = self.record, self.args
        self.done += 1
        is_last = self.done == len(self.batches)
        self.stopped = self.run.stop_asked() and not is_last
        record.advance(self.done, num_targets, micro_batches, loss, self.learning_rate)
        if self.done % args.log_interval == 0 or is_last:
            record.log(self.done, loss=loss, learning_rate=self.learning_rate, grad_norm=self.grad_norm, **figures)
        if self.done % args.val_interval == 0 or is_last:
            self.validate()
        if self.checkpoint.is_due(self.done, is_last or self.stopped):
            self.checkpoint.save(self.done, record.targets)

    def validate(self):
        """Log what `evaluate` finds, and print its text."""
        if self.evaluate:
            scores, text = self.evaluate(self.done // self.args.val_interval)
            self.record.log(self.done, **scores)
            self.record.say(text)
