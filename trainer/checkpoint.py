"""Checkpoints that a run can be resumed from, bit for bit, and that cannot be half-written.

    out/pretrain_tiny/                  the newest weights: a Hugging Face folder, for the next stage and for everyone
    out/pretrain_tiny/checkpoints/step-400/
        config.json model.safetensors tokenizer.json ...    the same kind of folder, float32, after 400 updates
        training_state.pt               optimizer, scaler, random states, arguments
        manifest.json                   SHA-256 of every file: written last, it makes the checkpoint complete

A checkpoint is built beside its place and renamed when it is whole; then its weights are linked into the run's folder.
"""

import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from model.native_format import load_strictly, read_state

KEEP = 2  # the newest, and one to fall back on should it be damaged
STATE_ONLY = ("training_state.pt", "manifest.json")


class Checkpoint:
    """Saves and restores one run in `folder`.

    `args`: the stage's dataclass; `fingerprint`: of the data. Both must be the same when the run is resumed, apart
    from the flags that `args.FREE` lists.
    """

    def __init__(self, folder, args, run, model, tokenizer, optimizer, fingerprint):
        self.folder, self.args, self.fingerprint = Path(folder), args, fingerprint
        self.model, self.tokenizer, self.optimizer, self.scaler = model, tokenizer, optimizer, run.scaler
        self.arithmetic = f"{run.dtype} on {run.device.type}".removeprefix("torch.")
        self.is_resumed = False

    def steps(self):
        """[(updates done, folder)] of the checkpoints that are there, newest first."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return sorted(((int(path.name.split("-")[1]), path) for path in folders), reverse=True)

    def save(self, step, targets):
        """Write the state after `step` updates on `targets` target tokens.

        Raises OSError, with everything that was saved before intact, if it cannot be written.
        """
        final = self.folder / "checkpoints" / f"step-{step}"
        building = final.with_name(f".{final.name}.{os.getpid()}")
        for left_over in final.parent.glob(".step-*"):  # of a process that was killed
            shutil.rmtree(left_over)
        try:
            self.model.save_pretrained(building)
            self.tokenizer.save_pretrained(building)
            torch.save(self.state(step, targets), building / "training_state.pt")
            manifest = {path.name: sha256(path) for path in sorted(building.iterdir())}
            (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for path in building.iterdir():
                flush(path)
            if final.exists():
                shutil.rmtree(final)
            building.rename(final)
            self.publish(final)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(building, ignore_errors=True)
            raise OSError(f"could not save step {step} in {final}: {error}. The checkpoints from before are intact: "
                          "make room on the disk and go on with --from_resume") from error
        others = [path for _, path in self.steps() if path != final]
        for old in others[KEEP - 1:] if self.is_resumed else others:  # those of an earlier run under this name are not ours
            shutil.rmtree(old)
        self.is_resumed = True

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
        if not (checkpoint / "chat_template.jinja").exists():
            (self.folder / "chat_template.jinja").unlink(missing_ok=True)  # from another run: it would call this one a chat model

    def state(self, step, targets):
        """Everything but the weights, in types that torch.load(weights_only=True) accepts."""
        numpy_state = np.random.get_state()
        return {
            "step": step, "targets": targets, "fingerprint": self.fingerprint, "arguments": asdict(self.args),
            "arithmetic": self.arithmetic, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "random": {
                "python": random.getstate(), "numpy": (*numpy_state[:1], numpy_state[1].tolist(), *numpy_state[2:]),
                "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []},
        }

    def restore(self):
        """Load the newest whole checkpoint into model, optimizer, scaler and generators.

        Returns (updates done, target tokens trained on), (0, 0) with a warning if there is no checkpoint.

        ValueError if all are damaged, or if the data or a flag that matters has changed.
        """
        problems = []
        for step, path in self.steps():
            problem = damage(path)
            if problem is None:
                state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
                self.compare(state, path)
                load_strictly(self.model, read_state(path, self.model.config.num_experts), path)
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
                restore_random(state["random"])
                self.is_resumed = True
                return step, state["targets"]
            problems.append(problem)
            print(f"warning: {problem}; falling back on the checkpoint before it")
        if problems:
            raise ValueError(f"nothing to resume from in {self.folder / 'checkpoints'}: {'; '.join(problems)}. "
                             "Delete that folder and start again without --from_resume")
        print(f"warning: --from_resume finds no checkpoint in {self.folder / 'checkpoints'}: starting from the beginning")
        return 0, 0

    def compare(self, state, path):
        """ValueError if the run that wrote `state` would have gone on differently from this one."""
        ours, theirs = asdict(self.args), state["arguments"]
        changed = [f"--{name} {theirs[name]!r} -> {ours[name]!r}" for name in ours
                   if name not in (*self.args.FREE, "data_path", "val_path") and name in theirs and ours[name] != theirs[name]]
        if state["fingerprint"] != self.fingerprint:
            changed.insert(0, "the data (or the tokenizer, or its template)")
        if state["arithmetic"] != self.arithmetic:
            changed.append(f"{state['arithmetic']} -> {self.arithmetic}")
        if changed:
            raise ValueError(f"{path} cannot be resumed, because something changed: {', '.join(changed)}. "
                             "Set it back, or start a new run without --from_resume under another --save_weight")


def damage(path):
    """None if every file of the checkpoint folder is what its manifest says, else a sentence that names what is wrong."""
    if not (path / "manifest.json").is_file():
        return f"{path} was never finished (it has no manifest.json)"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except json.JSONDecodeError:
        return f"{path / 'manifest.json'} is damaged"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if sha256(path / name) != digest:
            return f"{path / name} is damaged"
    return None


def restore_random(state):
    """Put back the generators of Python, NumPy and PyTorch."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def flush(path):
    """Ask the system to bring a file onto the disk itself: a rename must not overtake the data."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sha256(path):
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
