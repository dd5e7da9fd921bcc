"""Checkpoints that a run can be resumed from, bit for bit, and that cannot be half-written.

    out/pretrain_tiny/                  the newest weights: a Hugging Face folder, for the next stage and for everyone
    out/pretrain_tiny/checkpoints/step-400/
        config.json model.safetensors tokenizer.json ...    the same kind of folder, float32, after 400 updates
        training_state.pt               optimizer and scaler; what else a stage trains
        progress.json                   position in the data, arguments, what the run decided on its way
        manifest.json                   SHA-256 of every file: written last, it makes the checkpoint complete

The state is copied while training waits, and written in a thread while it goes on. A checkpoint is built beside its
place and renamed when it is whole; then its weights are linked into the run's folder. No random state is stored: every
step draws from (seed, step, rank). Sharded runs write whole tensors, so the number of ranks may change.
"""

import hashlib
import json
import os
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError

from model.native_format import load_strictly
from trainer.weights import related_runs

STATE_ONLY = ("training_state.pt", "progress.json", "manifest.json")
PUBLISHED = ("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*", "special_tokens_map.json",
             "chat_template.jinja", "adapter_config.json", "adapter_model.safetensors")


class Checkpoint:
    """Saves and restores one run in `folder`.

    `args`: the stage's dataclass; `fingerprint`: of the data. Both must be the same when the run is resumed, apart
    from the flags that `args.FREE` lists. With --from_resume the checkpoint to go on from is chosen here and now.
    `extra`: what else has a state of tensors that training changes: an object with state_dict() and load_state_dict().

    ValueError if all are damaged, if the data or a flag that matters has changed, or if only a run of that name and another
    shape can be gone on with.
    """

    def __init__(self, folder, args, run, model, tokenizer, optimizer, fingerprint, extra=None):
        self.folder, self.args, self.run, self.fingerprint = Path(folder), args, run, fingerprint
        self.model, self.tokenizer, self.optimizer, self.extra = model, tokenizer, optimizer, extra
        self.arithmetic = f"{run.dtype} on {run.device.type}".removeprefix("torch.")
        self.writer, self.failure = None, None
        self.rows_per_step = args.rows_per_step(run.ranks.world_size)
        self.is_resumed = False  # whether the checkpoints in the folder are this run's
        self.must_replace = args.overwrite  # what is in the folder, once
        self.is_restarted = args.from_resume and run.ranks.has_begun(self.folder)
        self.found = run.ranks.from_first(self.find) if args.from_resume else None
        if self.found:
            self.compare(self.found[1], self.found[0])
            self.is_resumed, run.saved = True, self.found[1]["step"]

    def steps(self):
        """[(updates done, folder)] of the checkpoints that are there, newest first."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return sorted(((int(path.name.split("-")[1]), path) for path in folders), reverse=True)

    def is_due(self, step, is_last):
        """Whether to save after `step` updates, the last ones or not; OSError if the last save failed meanwhile."""
        self.raise_failure()
        # in a series of bad steps the weights may be what is bad: the checkpoint from before must stay the newest
        return (is_last or step % self.args.save_interval == 0) and not self.run.guard.in_a_row

    def save(self, step, targets):
        """Copy the state after `step` updates on `targets` target tokens and begin to write it; all ranks call together.

        At most one save is under way: a second one waits for it. What goes wrong is an OSError of the next call (or of
        `wait`), with everything that was saved before intact.
        """
        self.wait()
        engine = self.run.engine
        weights = engine.weights() if engine else self.model.state_dict()
        optimizer = engine.optimizer_state() if engine else self.optimizer.state_dict()
        self.is_resumed, self.run.saved = True, step
        if not self.run.ranks.is_first:
            return
        progress = {
            "step": step, "targets": targets, "rows_per_step": self.rows_per_step, "world_size": self.run.ranks.world_size,
            "fingerprint": self.fingerprint, "arithmetic": self.arithmetic, "guard": self.run.guard.state_dict(),
            "arguments": asdict(self.args)}
        state = {"optimizer": copied(optimizer), "scaler": self.run.scaler.state_dict()}
        if self.extra:
            state["extra"] = copied(self.extra.state_dict())
        self.writer = threading.Thread(target=self.write_or_note, args=(step, copied(weights), state, progress))
        self.writer.start()

    def wait(self):
        """Until what was saved is on the disk. Raises OSError if it could not be written."""
        if self.writer:
            self.writer.join()
            self.writer = None
        self.raise_failure()

    def raise_failure(self):
        if self.failure:
            failure, self.failure = self.failure, None
            raise OSError(f"{failure}. The checkpoints from before are intact: make room on the disk (or give back the right to "
                          "write) and go on with --from_resume") from failure

    def write_or_note(self, step, *state):
        """The thread's work; an error is kept for the training process to raise."""
        final = self.folder / "checkpoints" / f"step-{step}"
        building = final.with_name(f".{final.name}.{os.getpid()}")
        try:
            self.write(final, building, *state)
        except Exception as error:  # whatever it is, the run must hear of it
            self.failure = OSError(f"could not save step {step} in {final}: {error}")
            if not isinstance(error, (OSError, RuntimeError, SafetensorError)):
                self.failure.__cause__ = error
            shutil.rmtree(building, ignore_errors=True)

    def write(self, final, building, weights, state, progress):
        """Build the folder, move it to its place, publish its weights, delete what is too old."""
        for left_over in final.parent.glob(".step-*"):  # of a process that was killed
            shutil.rmtree(left_over)
        self.model.save_pretrained(building, state_dict=weights)
        self.tokenizer.save_pretrained(building)
        torch.save(state, building / "training_state.pt")
        (building / "progress.json").write_text(json.dumps(progress, indent=1, ensure_ascii=False))
        manifest = {path.name: sha256(path) for path in sorted(building.iterdir())}
        (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*building.iterdir(), building):
            flush(path)
        if final.exists():
            shutil.rmtree(final)
        building.rename(final)
        flush(final.parent)
        self.publish(final)
        # those of later steps are damaged ones that we fell back from
        earlier = [path for step, path in self.steps() if step < progress["step"]]
        for _, path in self.steps():
            if path not in (final, *earlier[:self.args.keep - 1]):
                shutil.rmtree(path)

    def publish(self, checkpoint):
        """Put the weights, configuration and tokenizer of `checkpoint` into the run's folder, file by file, atomically."""
        for path in checkpoint.iterdir():
            if path.name in STATE_ONLY:
                continue
            new = self.folder / f".{path.name}.new"
            new.unlink(missing_ok=True)
            try:
                if path.suffix != ".safetensors":  # small, and an editor that writes in place would change both
                    raise OSError
                os.link(path, new)
            except OSError:  # or a file system without hard links
                shutil.copyfile(path, new)
            os.replace(new, self.folder / path.name)
            new.unlink(missing_ok=True)  # it stays where both are links to one file already
        if not (checkpoint / "chat_template.jinja").exists():
            (self.folder / "chat_template.jinja").unlink(missing_ok=True)  # from another run: it would call this one a chat model

    def find(self):
        """(folder, its progress.json) of the newest whole checkpoint; None with a warning if there is no checkpoint at all.

        ValueError if all are damaged.
        """
        problems, steps = [], self.steps()
        for _, path in steps:
            problem = damage(path)
            if problem is None:
                self.publish(path)  # a run may have been killed between the two
                return path, json.loads((path / "progress.json").read_text())
            problems.append(problem)
            if path != steps[-1][1]:
                print(f"warning: {problem}; falling back on the checkpoint before it")
        if problems:
            raise ValueError(f"nothing to resume from in {self.folder / 'checkpoints'}: {'; '.join(problems)}. "
                             f"Delete that folder and start again without --from_resume; the weights published in {self.folder} "
                             "can still serve --from_weight, if they are intact")
        self.begin_without()
        return None

    def begin_without(self):
        """Say that there is no checkpoint; ValueError if the flags seem to lack the shape of a run that has some."""
        same, close = related_runs(self.folder, self.args.save_weight)
        if same and not self.is_restarted:
            raise ValueError(f"--from_resume finds no checkpoint in {self.folder / 'checkpoints'}, but {listed(same)}: to go on "
                             "with it, its shape flags (--preset, --hidden_size, ...) must be given again. "
                             "Leave --from_resume out to begin a new run")
        print(f"warning: --from_resume finds no checkpoint in {self.folder / 'checkpoints'}: starting from the beginning"
              f"{f' (but {listed(close)}: was that meant?)' if close else ''}")

    def restore(self):
        """Load the newest whole checkpoint into model, optimizer, scaler and guard; all ranks call together.

        Returns (updates done, target tokens trained on): (0, 0) where there is nothing to go on from. With --overwrite the
        run that was there before is deleted now: everything else that could refuse to begin has been asked.
        """
        self.wait()
        if self.must_replace:
            self.run.ranks.from_first(self.delete_former_run)
            self.must_replace = False
        self.run.ranks.begin(self.folder)
        found, self.found = self.found or (self.is_resumed and self.run.ranks.from_first(self.find)), None
        if not found:
            return 0, 0
        path, progress = found
        weights = self.model.read_weights(path)
        state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
        if self.run.engine:
            self.run.engine.load(weights, state["optimizer"])
        else:
            load_strictly(self.model, weights, path)
            self.optimizer.load_state_dict(state["optimizer"])
        if self.extra:
            self.extra.load_state_dict(state["extra"])
        self.run.scaler.load_state_dict(state["scaler"])
        self.run.guard.load_state_dict(progress["guard"])
        self.run.saved = progress["step"]
        self.run.say(f"going on after step {progress['step']}")
        return progress["step"], progress["targets"]

    def delete_former_run(self):
        """Delete the checkpoints, the record and the weights of an earlier run of this name.

        By now the weights have been read, should --from_weight name them. They must not pass for those of the new run.
        """
        old = self.folder / ".replaced"
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
        if (self.folder / "checkpoints").is_dir():
            (self.folder / "checkpoints").rename(old)  # at once: a part of them must never be resumed from
            shutil.rmtree(old)
        for name in ("bad_steps", "tensorboard"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for pattern in ("metrics.jsonl", "loss.png", *PUBLISHED):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def compare(self, progress, path):
        """ValueError if the run that wrote `progress` would have gone on differently from this one; take over its batch."""
        ours, theirs = asdict(self.args), progress["arguments"]
        changed = [f"--{name} {theirs[name]!r} -> {ours[name]!r}" for name in ours
                   if name not in (*self.args.FREE, "data_path", "val_path") and name in theirs and ours[name] != theirs[name]]
        if progress["fingerprint"] != self.fingerprint:
            changed.insert(0, "the data (or the tokenizer, its template, or the weights of the reference or teacher)")
        if progress["arithmetic"] != self.arithmetic:
            changed.append(f"{progress['arithmetic']} -> {self.arithmetic}")
        if self.rows_per_step != progress["rows_per_step"]:
            batch = [f"--{name} {theirs[name]} -> {ours[name]}" for name in ("batch_size", "accumulation_steps")
                     if ours[name] != theirs[name]]
            if batch:
                changed.append(f"{' and '.join(batch)}, so that a step has {self.rows_per_step} rows "
                               f"(batch_size x accumulation_steps x ranks) instead of {progress['rows_per_step']}")
            else:
                self.run.say(f"{progress['world_size']} ranks -> {self.run.ranks.world_size}: a step keeps its "
                             f"{progress['rows_per_step']} rows, each rank takes its share of them")
            self.rows_per_step = progress["rows_per_step"]
        if changed:
            raise ValueError(f"{path} cannot be resumed, because something changed: {', '.join(changed)}. "
                             "Set it back, or start a new run without --from_resume under another --save_weight")


def listed(runs):
    """[(name, updates done)] as words."""
    return ", ".join(f"{name} has step {step}" for name, step in runs)


def damage(path):
    """None if every file of the checkpoint folder is what its manifest says, else a sentence that names what is wrong."""
    if not (path / "manifest.json").is_file():
        return f"{path} was never finished (it has no manifest.json)"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except ValueError:
        return f"{path / 'manifest.json'} is damaged"
    for name, digest in {"progress.json": "", **manifest}.items():
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if sha256(path / name) != digest:
            return f"{path / name} is damaged"
    return None


def copied(tree):
    """A state dict with every tensor copied to the CPU, so that training may go on while it is written."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return type(tree)((name, copied(x)) for name, x in tree.items())
    return [copied(x) for x in tree] if isinstance(tree, list) else tree


def flush(path):
    """Ask the system to bring a file, or the names in a folder, onto the disk: a rename must not overtake the data."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
