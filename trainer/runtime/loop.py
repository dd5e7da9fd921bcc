"""Everything around the steps of a stage: checkpoints, metrics, validation, rollback, shutdown.

    loop = Loop(run, TrainState(model, tokenizer, optimizer, fingerprint), batches, evaluate)
    for step, micro_batches in loop:
        ...                                             # learning rate, forward, loss, backward
        metrics = loop.means.reduce(run.ranks)
        update = run.clip_and_step(model, optimizer, metrics["loss"])
        loop.log(update, micro_batches, num_targets, **metrics)

The loop owns the objects that it works with and passes plain values between them.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader

from model.files import write_json
from trainer.runtime.checkpoint import Checkpoint, TrainState
from trainer.runtime.costs import step_work, training_flops
from trainer.runtime.guard import NonFiniteGuard, fix_for_bad_steps, write_bad_rows
from trainer.runtime.means import Means
from trainer.runtime.metrics import plot_curve, read_metrics
from trainer.runtime.ranks import Ranks
from trainer.runtime.record import RunRecord
from trainer.runtime.run import Run, Update
from trainer.runtime.tracker import open_tracker

Evaluate = Callable[[int], tuple[dict[str, float], str]]


class Loop:
    """Iterates over (step, its data) of `batches`, from the checkpoint to the end or a signal.

    It seeds all generators before each step. `net` is the module to call, `means` collects the
    metrics of a step. The body adds up gradients, steps and calls `log`; a stage with several
    updates in a step calls `check` after each and then `advance`. evaluate(index) ->
    ({"val_...": number}, text to print) is called on all ranks every --val_interval steps and after
    the last; evaluate_first: also before the first step.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        batches: Any,
        evaluate: Evaluate | None = None,
        evaluate_first: bool = False,
    ):
        self.run, self.args, self.state, self.batches = run, run.args, state, batches
        self.evaluate, self.num_steps = evaluate, len(batches)
        self.checkpoint = Checkpoint(run, state)
        run.contexts.callback(self.checkpoint.join)  # whatever happens
        self.guard, self.means = NonFiniteGuard(self.args.max_bad_steps), Means()
        self.print_plan()
        self.net = run.wrap(state.model, state.optimizer)
        config = {
            **asdict(self.args),
            "num_steps": self.num_steps,
            "data_fingerprint": state.fingerprint,
            "arithmetic": self.checkpoint.arithmetic,
            "shape": state.model.config.to_dict(),
        }
        first = run.resume_from[1]["step"] if run.resume_from else 0
        tracker = None
        if run.ranks.is_main_process:  # before --overwrite deletes a run: it may refuse to start
            tracker = open_tracker(self.args, run.folder, config, first=first)
        self.done, targets = self.restore()
        self.must_evaluate = evaluate_first and self.done == 0
        self.data = StepData(batches, self.done, self.args.num_workers, run.device)
        self.is_stopped, self.grad_norm, self.num_updates = False, 0.0, 0
        record = RunRecord(run, self.done, targets, config, tracker)
        self.record = run.contexts.enter_context(record)
        run.contexts.enter_context(run.signals)

    def print_plan(self) -> None:
        """Say what will be trained, in how many steps, and how much memory a step needs."""
        run, model = self.run, self.state.model
        trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
        size = f"{model.num_parameters() / 1e6:.1f}M parameters"
        if trained < model.num_parameters():
            size = f"{trained:,} of {model.num_parameters():,} parameters are trained"
        plan = f"{size}, {self.num_steps} steps on {run}, {self.batches.describe()}"
        run.print0(f"{run.folder}: {plan}; {run.estimate_memory(model)}")

    def restore(self) -> tuple[int, int]:
        """Load the newest checkpoint: (updates done, target tokens trained on), 0 without one."""
        step, targets, guard_state = self.checkpoint.restore()
        if guard_state:
            self.guard.load_state_dict(guard_state)
        self.run.saved_step = self.checkpoint.saved_step
        return step, targets

    @property
    def learning_rate_factor(self) -> float:
        """1, or less once the run had to return to a checkpoint."""
        return self.guard.learning_rate_factor

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        if self.must_evaluate:
            self.validate()
        for step, micro_batches in self.data:
            self.run.seed(step)
            self.done, self.grad_norm, self.num_updates = step, 0.0, 0
            yield step, micro_batches
            if self.is_stopped:
                break
        self.finish()

    def log(
        self, update: Update, micro_batches: list[dict], num_targets: float, **metrics: float
    ) -> None:
        """Finish a step of one update: `check`, then `advance`."""
        if self.check(update, micro_batches):
            self.advance(micro_batches, num_targets, **metrics)

    def check(self, update: Update, micro_batches: list[dict]) -> bool:
        """Write the rows of an update that was not finite; True unless the run goes back.

        After too many of them it returns to its last checkpoint: False, and the step ends here.
        FloatingPointError if there is none, or if the run has been back before.
        """
        guard, run = self.guard, self.run
        guard.count(update.is_finite)
        self.grad_norm = update.grad_norm
        self.num_updates += 1  # of this step
        if update.is_finite:
            return True
        name = f"step-{self.done + 1}"
        name += f"-update-{self.num_updates}" if self.num_updates > 1 else ""
        name += "-again" if guard.went_back else ""
        path = write_bad_rows(run, self.state.tokenizer, micro_batches, name, update)
        self.record.print0(
            f"step {self.done + 1}: loss {update.loss}, gradient norm {update.grad_norm}: not "
            f"applied; its rows are in {path}"
        )
        if not guard.is_exhausted:
            return True
        count = f"{guard.in_a_row} steps in a row"
        bad = f"{count} had a loss or gradient that is not finite"
        where = f"Their rows are in {run.folder / 'bad_steps'}. {fix_for_bad_steps(run)}"
        if guard.went_back:
            raise FloatingPointError(
                f"{bad}, with half the learning rate too. {where}; the checkpoints are from before"
            )
        if self.checkpoint.saved_step is None:
            raise FloatingPointError(f"{bad}, and there is no checkpoint to go back to. {where}")
        step, targets = self.restore()
        guard.go_back()
        self.record.go_back(step, targets)
        self.record.print0(
            f"{count} were not finite: back to step {step}, with half the learning rate"
        )
        self.data.go_back(step)
        return False

    def advance(self, micro_batches: list[dict], num_targets: float, **metrics: float) -> None:
        """Count the step as done; log, validate and save when due.

        num_targets: tokens that the step was trained on, over all ranks. metrics: of all ranks,
        "loss" among them.
        """
        args, record, model = self.args, self.record, self.state.model
        learning_rate = self.state.optimizer.param_groups[0]["lr"]
        self.done += 1
        is_last = self.done == self.num_steps
        is_frozen = not all(x.requires_grad for x in model.parameters())
        flops = training_flops(model.config, *step_work(micro_batches), is_frozen)
        record.advance(self.done, num_targets, flops, self.data.take_seconds_waited())
        record.show(self.done, metrics["loss"], learning_rate)
        if self.done % args.log_interval == 0 or is_last:
            rest = {"learning_rate": learning_rate, "grad_norm": self.grad_norm}
            loss = {"loss": metrics.pop("loss")}
            self.write_metrics({**loss, **rest, **metrics})
        if self.done % args.val_interval == 0 or is_last:
            self.validate()
        self.is_stopped = self.run.stop_asked() and not is_last
        self.checkpoint.raise_failure()
        is_due = self.done % args.save_interval == 0 or is_last or self.is_stopped
        # in a series of bad steps the weights may be the fault: the earlier checkpoint must stay
        if is_due and not self.guard.in_a_row:
            self.checkpoint.save(self.done, record.targets, self.guard.state_dict())
            self.run.saved_step = self.done

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl, with the load of the experts; all ranks call together."""
        self.record.log(self.done, metrics, expert_load(self.state.model, self.run.ranks))

    def validate(self) -> None:
        """Log the scores of `evaluate`, and print its text."""
        scores, text = {}, ""
        if self.evaluate:
            scores, text = self.evaluate(self.done // self.args.val_interval)
        if scores:
            self.write_metrics(scores)
            self.record.print0(text)

    def finish(self) -> None:
        """Wait for the last save; end the program if a signal asked for it; else draw the curve."""
        self.run.contexts.close()  # the progress bar, the tracker, the signals' handlers
        self.checkpoint.wait()
        run, bad = self.run, self.guard.in_a_row
        where = f"their rows are in {run.folder / 'bad_steps'}"
        if self.is_stopped:
            self.exit_after_signal(where)
        problem = f"the last {bad} steps had a loss or gradient that is not finite"
        fix = f"{where}. {fix_for_bad_steps(run)}"
        if bad and not run.saved_step:
            raise FloatingPointError(f"{problem}, and nothing was saved before them; {fix}")
        if not run.ranks.is_main_process:
            return
        if bad:
            print(
                f"warning: {problem}: the weights are from the checkpoint before them, step "
                f"{run.saved_step}; {fix}"
            )
        plot_curve(run.folder)
        if self.args.json:
            rows = read_metrics(run.folder / "metrics.jsonl")
            last = {name: value for row in rows for name, value in row.items()}
            write_json(self.args.json, {"folder": str(run.folder), **last})
        print(f"done: the weights, loss.png and metrics.jsonl are in {run.folder}", flush=True)

    def exit_after_signal(self, where: str) -> None:
        """End the program as the signal wants it; everything is saved by now."""
        run, stopped = self.run, f"stopped after step {self.done}"
        resume = "resume with the same command and --from_resume"
        if run.saved_step == self.done:
            run.print0(f"{stopped}, which is saved in {run.folder}: {resume}")
        else:
            saved = f"There is no checkpoint yet; {where}"
            if run.saved_step:
                saved = f"Step {run.saved_step} is saved in {run.folder}: {resume}"
            run.print0(
                f"{stopped}, the last {self.guard.in_a_row} of them not finite: not saved. {saved}"
            )
        sys.exit(128 + (run.signals.received or signal.SIGTERM))


class StepData:
    """Iterates over (step, its micro-batches) from `first` on; `go_back(step)` makes that the next.

    `num_workers` processes build batches ahead of training (0: the training process does; None: 2
    for a GPU, which must not wait, else 0). Which process builds a batch decides nothing.
    """

    def __init__(self, batches: Any, first: int, num_workers: int | None, device: torch.device):
        self.batches, self.next, self.seconds_waited = batches, first, 0.0
        is_cuda = device.type == "cuda"
        num_workers = (2 if is_cuda else 0) if num_workers is None else num_workers
        self.options = {"num_workers": num_workers, "pin_memory": is_cuda}
        if num_workers:
            self.options |= {"worker_init_fn": ignore_ctrl_c, "prefetch_factor": 4}

    def go_back(self, step: int) -> None:
        """Continue with `step`."""
        self.next = step

    def take_seconds_waited(self) -> float:
        """Seconds that training has waited for data since the last call."""
        seconds, self.seconds_waited = self.seconds_waited, 0.0
        return seconds

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while self.next < len(self.batches):
            steps = range(self.next, len(self.batches))
            loader = iter(DataLoader(self.batches, batch_size=None, sampler=steps, **self.options))
            expected = self.next
            while expected == self.next < len(self.batches):  # until go_back: then a new loader
                start = time.perf_counter()
                micro_batches = next(loader)
                self.seconds_waited += time.perf_counter() - start
                self.next = expected = expected + 1
                yield expected - 1, micro_batches


def ignore_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, but the current step still needs its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def expert_load(model: torch.nn.Module, ranks: Ranks) -> dict[str, float]:
    """{"expert_load/e": fraction of the tokens that expert e got, "expert_load/max": the largest in
    a layer}, since the last call; {} for a dense network. All ranks call together.
    """
    counters = [x.tokens_per_expert for x in model.modules() if hasattr(x, "tokens_per_expert")]
    if not counters:
        return {}
    loads = ranks.sum_tensor(torch.stack(counters).double())
    loads /= loads.sum(-1, keepdim=True).clamp(min=1)  # layers, experts
    for counter in counters:
        counter.zero_()
    means = {f"expert_load/{e}": round(x, 4) for e, x in enumerate(loads.mean(0).tolist())}
    return {**means, "expert_load/max": round(loads.max().item(), 4)}
