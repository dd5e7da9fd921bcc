"""Checkpoints that a run can be resumed from, bit for bit, and that cannot be half-written.

    out/pretrain_tiny/                  the newest weights: a Hugging Face folder, for everyone
    out/pretrain_tiny/checkpoints/step-400/
        config.json model.safetensors tokenizer.json ...    the same, float32, after 400 updates
        training_state.pt               optimizer, scaler, and the stage's extra state
        progress.json                   position in the data, arguments, the guard's decisions
        manifest.json                   SHA-256 of every file: written last, it completes the folder

The state is copied while training waits, and written in a thread while it continues. A checkpoint
is built next to its place and renamed when it is whole; then its weights are linked into the run's
folder. No random state is stored: every step draws from (seed, step, rank). Sharded runs write
whole tensors, so the number of ranks may change.
"""

import json
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from model.files import file_sha256, flush, replace_file
from model.native_format import load_strictly
from trainer.runtime.arguments import with_new_names
from trainer.runtime.run import Run
from trainer.runtime.run_folder import checkpoints_in, newest_whole
from trainer.runtime.tracker import tracker_id

STATE_ONLY = ("training_state.pt", "progress.json", "manifest.json")
PUBLISHED = (
    *("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*"),
    *("special_tokens_map.json", "chat_template.jinja", "adapter_config.json"),
    "adapter_model.safetensors",
)


@dataclass
class TrainState:
    """The objects that training changes and a checkpoint holds.

    fingerprint: of the data, and of other networks that decide the numbers. saved: what is written
    as the weights, if that is not the model (an adapter alone). extra: another object with a
    state_dict() of tensors, such as a critic.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    optimizer: Any
    fingerprint: str
    saved: Any = None
    extra: Any = None

    def __post_init__(self) -> None:
        self.saved = self.saved or self.model


class Checkpoint:
    """Saves and restores the TrainState of a run in its folder.

    ValueError if the run to resume had other data, or another value of a flag that matters.
    """

    def __init__(self, run: Run, state: TrainState):
        self.run, self.state, self.args, self.folder = run, state, run.args, run.folder
        self.arithmetic = f"{run.dtype} on {run.device.type}".removeprefix("torch.")
        self.writer, self.failure = None, None
        self.must_replace = run.args.overwrite  # the folder's content, once
        self.saved_step = run.saved_step  # updates in the newest checkpoint of this run, or None
        self.found = run.resume_from
        if self.found:
            self.compare(*self.found)

    def save(self, step: int, targets: int, guard_state: dict) -> None:
        """Copy the state after `step` updates on `targets` tokens and begin to write it.

        All ranks call together. At most one save is under way: a second one waits for it. A failure
        is an OSError of the next call (or of `wait`), with all earlier checkpoints intact.
        """
        self.wait()
        engine = self.run.engine
        weights = engine.weights() if engine else self.state.saved.state_dict()
        optimizer = engine.optimizer_state() if engine else self.state.optimizer.state_dict()
        self.saved_step = step
        if not self.run.ranks.is_main_process:
            return
        progress = {
            "step": step,
            "targets": targets,
            "rows_per_step": self.run.rows_per_step,
            "world_size": self.run.ranks.world_size,
            "fingerprint": self.state.fingerprint,
            "arithmetic": self.arithmetic,
            "guard": guard_state,
            "arguments": asdict(self.args),
        }
        state = {"optimizer": copied(optimizer), "scaler": self.run.scaler.state_dict()}
        if self.state.extra:
            state["extra"] = copied(self.state.extra.state_dict())
        arguments = (step, copied(weights), state, progress)
        self.writer = threading.Thread(target=self.write_or_note, args=arguments)
        self.writer.start()

    def wait(self) -> None:
        """Wait until the last save is on the disk. OSError if it could not be written."""
        self.join()
        self.raise_failure()

    def join(self) -> None:
        """Wait until nothing is being written, also after an error."""
        if self.writer:
            self.writer.join()
            self.writer = None

    def raise_failure(self) -> None:
        """OSError if the last save failed in its thread."""
        if self.failure:
            failure, self.failure = self.failure, None
            raise OSError(
                f"{failure}. The earlier checkpoints are intact: make room on the disk (or give "
                "back the right to write) and resume with --from_resume"
            ) from failure

    def write_or_note(self, step: int, *state: Any) -> None:
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

    def write(
        self, final: Path, building: Path, weights: dict, state: dict, progress: dict
    ) -> None:
        """Build the folder, move it to its place, publish its weights, delete old checkpoints."""
        for left_over in final.parent.glob(".step-*"):  # of a process that was killed
            shutil.rmtree(left_over)
        self.state.saved.save_pretrained(building, state_dict=weights)
        self.state.tokenizer.save_pretrained(building)
        torch.save(state, building / "training_state.pt")
        (building / "progress.json").write_text(
            json.dumps(progress, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        manifest = {path.name: file_sha256(path) for path in sorted(building.iterdir())}
        (building / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*building.iterdir(), building):
            flush(path)
        if final.exists():
            shutil.rmtree(final)
        building.rename(final)
        flush(final.parent)
        self.publish(final)
        # checkpoints of later steps are damaged ones that the run fell back from
        there = checkpoints_in(self.folder)
        earlier = [path for step, path in there if step < progress["step"]]
        for _, path in there:
            if path not in (final, *earlier[: self.args.keep - 1]):
                shutil.rmtree(path)

    def publish(self, checkpoint: Path) -> None:
        """Put the weights, configuration and tokenizer of `checkpoint` into the run's folder."""
        for path in checkpoint.iterdir():
            if path.name not in STATE_ONLY:
                target = self.folder / path.name
                replace_file(target, lambda new, path=path: link_or_copy(path, new))
        if not (checkpoint / "chat_template.jinja").exists():
            # from another run: it would call this one a chat model
            (self.folder / "chat_template.jinja").unlink(missing_ok=True)

    def restore(self) -> tuple[int, int, dict | None]:
        """Load the newest whole checkpoint into the state and the scaler; all ranks call together.

        Returns (updates done, target tokens trained on, the guard's state): (0, 0, None) if there
        is nothing to resume. With --overwrite the former run of this folder is deleted now, after
        everything that could refuse to begin has been asked.
        """
        self.wait()
        ranks = self.run.ranks
        if self.must_replace:
            ranks.from_main(self.delete_former_run)
            self.must_replace = False
        ranks.begin(self.folder)
        found, self.found = self.found, None
        if found is None and self.saved_step is not None:
            found = ranks.from_main(lambda: newest_whole(self.folder))
        if found is None:
            return 0, 0, None
        path, progress = found
        ranks.from_main(lambda: self.publish(path))  # a run may have been killed between the two
        weights = self.state.saved.read_weights(path)
        saved = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
        if self.run.engine:
            self.run.engine.load(weights, saved["optimizer"])
        else:
            load_strictly(self.state.saved, weights, path)
            self.state.optimizer.load_state_dict(saved["optimizer"])
        if self.state.extra:
            self.state.extra.load_state_dict(saved["extra"])
        self.run.scaler.load_state_dict(saved["scaler"])
        self.saved_step = progress["step"]
        self.run.print0(f"resumed after step {progress['step']}")
        return progress["step"], progress["targets"], progress["guard"]

    def delete_former_run(self) -> None:
        """Delete the checkpoints, the record and the weights of an earlier run of this name.

        They have been read already, should --from_weight name them, and must not pass for the new
        run's.
        """
        old = self.folder / ".replaced"
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
        if (self.folder / "checkpoints").is_dir():
            # at once: a part of them must never be resumed from
            (self.folder / "checkpoints").rename(old)
            shutil.rmtree(old)
        shutil.rmtree(self.folder / "bad_steps", ignore_errors=True)
        for path in self.folder.glob("tensorboard/*"):
            if path.name != tracker_id(self.folder):  # the new run's has begun already
                shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # not empty, or not there
            (self.folder / "tensorboard").rmdir()
        for pattern in ("metrics.jsonl", "loss.png", *PUBLISHED):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def compare(self, path: Path, progress: dict) -> None:
        """ValueError if the run that wrote `progress` would have continued differently."""
        args, run = self.args, self.run
        ours, theirs = asdict(args), with_new_names(type(args), progress["arguments"])
        free = (*args.FREE, "data_path", "val_path")  # the fingerprint compares the data
        changed = [
            f"--{name} {theirs[name]!r} -> {ours[name]!r}"
            for name in ours
            if name not in free and name in theirs and ours[name] != theirs[name]
        ]
        if progress["fingerprint"] != self.state.fingerprint:
            changed.insert(
                0,
                "the data (or the tokenizer, its template, or the weights of the reference or "
                "teacher)",
            )
        if progress["arithmetic"] != self.arithmetic:
            changed.append(f"{progress['arithmetic']} -> {self.arithmetic}")
        rows, before = args.rows_per_step(run.ranks.world_size), progress["rows_per_step"]
        if rows != before:
            batch = [
                f"--{name} {theirs[name]} -> {ours[name]}"
                for name in ("batch_size", "accumulation_steps")
                if ours[name] != theirs[name]
            ]
            if batch:
                changed.append(
                    f"{' and '.join(batch)}, so that a step has {rows} batch rows (batch_size x "
                    f"accumulation_steps x ranks) instead of {before}"
                )
            else:
                run.print0(
                    f"{progress['world_size']} ranks -> {run.ranks.world_size}: a step keeps its "
                    f"{before} batch rows, each rank takes its part of them"
                )
        if changed:
            raise ValueError(
                f"{path} cannot be resumed, because something changed: {', '.join(changed)}. Set "
                "it back, or start a new run without --from_resume under another --save_weight"
            )


def link_or_copy(path: Path, new: Path) -> None:
    """Make `new` the same file as `path`, or a copy of it."""
    try:
        # other files are small, and an editor that writes in place would change both
        if path.suffix != ".safetensors":
            raise OSError
        os.link(path, new)
    except OSError:  # or a file system without hard links
        shutil.copyfile(path, new)


def copied(tree: Any) -> Any:
    """A state dict with every tensor copied to the CPU: training may change the original."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return type(tree)((name, copied(x)) for name, x in tree.items())
    return [copied(x) for x in tree] if isinstance(tree, list) else tree
