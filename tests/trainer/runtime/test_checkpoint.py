"""Checkpoints on disk: what they hold, which are kept, what a damaged or half-written one costs."""

import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from model.files import file_sha256
from tests.helpers.toy_runs import ToyTokenizer, toy_network, toy_optimizer, toy_run, train_step
from trainer.runtime import checkpoint as checkpoint_module
from trainer.runtime.checkpoint import Checkpoint, TrainState, copied, link_or_copy
from trainer.runtime.run_folder import newest_whole

GUARD = {"in_a_row": 0, "went_back": False, "learning_rate_share": 1.0}


class Toy:
    """A network in training, with its checkpoint in `folder`; resume: from what is there."""

    def __init__(self, folder, seed=0, resume=False, extra=None, fingerprint="the data", **flags):
        self.run = toy_run(folder, from_resume=resume, **flags)
        if resume:
            self.run.resume_from = newest_whole(folder)
            if self.run.resume_from:
                self.run.saved_step = self.run.resume_from[1]["step"]
        self.model = toy_network(seed)
        self.optimizer = toy_optimizer(self.model)
        state = TrainState(self.model, ToyTokenizer(), self.optimizer, fingerprint, extra=extra)
        self.checkpoint = Checkpoint(self.run, state)
        self.folder, self.saved = folder, folder / "checkpoints"

    def train(self, *steps):
        for step in steps:
            train_step(self.run, self.model, self.optimizer, step)

    def save(self, step, targets=0, guard=GUARD):
        self.checkpoint.save(step, targets, guard)
        self.checkpoint.wait()

    def state(self):
        return {**copied(self.model.state_dict())}, copied(self.optimizer.state_dict())

    def names(self):
        return sorted(path.name for path in self.saved.iterdir())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "toy"


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- saving and restoring ---


def test_a_checkpoint_restores_everything_bit_for_bit(folder):
    """Weights, optimizer, scaler, the numbers, the guard; and further training is the same."""
    toy = Toy(folder, dtype="float16")
    toy.train(0, 1)
    guard = {"in_a_row": 0, "went_back": True, "learning_rate_share": 0.5}
    toy.save(2, 16, guard)
    scale = toy.run.scaler.state_dict()
    toy.train(2, 3)
    again = Toy(folder, seed=1, resume=True, dtype="float16")
    assert again.checkpoint.restore() == (2, 16, guard)
    assert again.run.scaler.state_dict() == scale and again.checkpoint.saved_step == 2
    again.train(2, 3)
    assert_same(again.state(), toy.state())


def test_without_a_checkpoint_a_run_begins_at_0(folder, capsys):
    toy = Toy(folder, resume=True)
    before = toy.state()
    assert toy.checkpoint.restore() == (0, 0, None) and toy.checkpoint.saved_step is None
    assert_same(toy.state(), before)
    assert "resumed" not in capsys.readouterr().out


def test_training_continues_while_the_copied_state_is_written(folder, monkeypatch):
    """Also on the CPU, where an update works on the very tensors that are saved."""
    toy = Toy(folder)
    toy.train(0)
    at_1, write = toy.state(), Checkpoint.write

    def late(*given):
        toy.train(1)
        write(*given)

    monkeypatch.setattr(Checkpoint, "write", late)
    toy.save(1)
    again = Toy(folder, resume=True)
    again.checkpoint.restore()
    assert_same(again.state(), at_1)


def test_a_run_returns_to_its_last_checkpoint_as_often_as_it_wants(folder, capsys):
    toy = Toy(folder)
    toy.checkpoint.restore()
    toy.train(0)
    toy.save(1, 8)
    at_1 = toy.state()
    for _ in range(2):
        toy.train(1, 2)
        assert toy.checkpoint.restore() == (1, 8, GUARD)
        assert_same(toy.state(), at_1)
    assert capsys.readouterr().out.count("resumed after step 1") == 2


def test_another_object_with_a_state_is_saved_too(folder):
    critic, other = toy_network(3), toy_network(4)
    Toy(folder, extra=critic).save(1)
    Toy(folder, resume=True, extra=other).checkpoint.restore()
    assert_same(other.state_dict(), critic.state_dict())


def test_what_is_saved_may_be_another_object_than_the_model(folder):
    """An adapter: its folder and its weights are the only ones that are written and read."""
    saved = []

    class Adapter:
        def state_dict(self):
            return {"a": torch.ones(2)}

        def save_pretrained(self, path, state_dict):
            path.mkdir(parents=True)
            (path / "adapter_config.json").write_text("{}")
            saved.append(state_dict)

    run, model = toy_run(folder), toy_network()
    state = TrainState(model, ToyTokenizer(), toy_optimizer(model), "x", saved=Adapter())
    checkpoint = Checkpoint(run, state)
    checkpoint.save(1, 0, GUARD)
    checkpoint.wait()
    assert_same(saved, [{"a": torch.ones(2)}])
    assert (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists()


def test_a_checkpoint_is_a_folder_for_everyone_with_the_runs_state(folder):
    toy = Toy(folder, learning_rate=0.25)
    toy.train(0)
    toy.save(1, 8)
    path = toy.saved / "step-1"
    model_files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    state_files = {"training_state.pt", "progress.json"}
    assert {x.name for x in path.iterdir()} == {"manifest.json"} | model_files | state_files
    assert {x.name for x in folder.iterdir()} == {"checkpoints"} | model_files
    assert all(x.dtype == torch.float32 for x in load_file(path / "model.safetensors").values())
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest == {x: file_sha256(path / x) for x in model_files | state_files}
    progress = json.loads((path / "progress.json").read_text())
    assert progress.pop("arguments") == asdict(toy.run.args)
    assert progress == {
        "step": 1,
        "targets": 8,
        "rows_per_step": 8,
        "world_size": 1,
        "fingerprint": "the data",
        "arithmetic": "float32 on cpu",
        "guard": GUARD,
    }


def test_only_rank_0_writes(folder):
    toy = Toy(folder)
    toy.run.ranks.is_main_process = False
    toy.save(1)
    assert not folder.exists() and toy.checkpoint.saved_step == 1


# --- publishing ---


def test_the_published_weights_are_links_and_other_files_copies(folder):
    """An editor that writes config.json in place must not change the checkpoint."""
    toy = Toy(folder)
    toy.save(1)
    path = toy.saved / "step-1"
    assert (folder / "model.safetensors").samefile(path / "model.safetensors")
    assert not (folder / "config.json").samefile(path / "config.json")
    assert (folder / "config.json").read_bytes() == (path / "config.json").read_bytes()


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"x" * 100)

    def refuse(*given):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == source.read_bytes()
    assert not (tmp_path / "copy.safetensors").samefile(source)


def test_a_new_save_leaves_readers_of_the_old_weights_their_file(folder):
    toy = Toy(folder, keep=1)
    toy.save(1)
    before = load_file(folder / "model.safetensors")
    with open(folder / "model.safetensors", "rb") as reader:
        toy.train(0)
        toy.save(2)
        toy.save(3)
        assert reader.read() != (folder / "model.safetensors").read_bytes()
    assert not torch.equal(
        load_file(folder / "model.safetensors")["model.norm.weight"], before["model.norm.weight"]
    )


def test_a_chat_template_of_another_run_is_taken_away(folder):
    folder.mkdir()
    (folder / "chat_template.jinja").write_text("of a chat model")
    (folder / "notes.txt").write_text("mine")
    Toy(folder).save(1)
    assert not (folder / "chat_template.jinja").exists() and (folder / "notes.txt").exists()


def test_a_run_killed_between_writing_and_publishing_publishes_when_resumed(folder, monkeypatch):
    toy = Toy(folder)
    toy.save(1)
    toy.train(0)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "publish", lambda *given: None)
        toy.save(2)
    newest = (toy.saved / "step-2" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() != newest
    Toy(folder, resume=True).checkpoint.restore()
    assert (folder / "model.safetensors").read_bytes() == newest


# --- keeping ---


@pytest.mark.parametrize("keep, kept", [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_checkpoints_are_kept(keep, kept, folder):
    toy = Toy(folder, keep=keep)
    for step in (1, 2, 3, 4):
        toy.save(step)
    assert toy.names() == [f"step-{step}" for step in kept]


def test_a_damaged_newer_checkpoint_makes_room_for_its_repetition(folder, capsys):
    toy = Toy(folder, keep=3)
    for step in (2, 4, 6):
        toy.save(step)
    (toy.saved / "step-6" / "training_state.pt").write_bytes(b"")
    again = Toy(folder, resume=True, keep=3)
    assert again.checkpoint.restore()[0] == 4
    assert "training_state.pt is damaged; falling back" in capsys.readouterr().out
    again.save(5)
    assert again.names() == ["step-2", "step-4", "step-5"]


def test_a_step_that_is_saved_again_replaces_the_first_one(folder):
    toy = Toy(folder)
    toy.save(1)
    toy.train(0)
    toy.save(1, targets=8)
    found = newest_whole(folder)
    assert found[1]["targets"] == 8 and toy.names() == ["step-1"]


def test_the_remains_of_a_killed_process_are_removed(folder):
    (folder / "checkpoints" / ".step-3.77").mkdir(parents=True)
    (folder / "checkpoints" / ".step-3.77" / "model.safetensors").write_bytes(b"half")
    toy = Toy(folder)
    toy.save(1)
    assert toy.names() == ["step-1"]


# --- failures ---


def fail(*given, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "place, name", [("torch", "save"), ("flush", None), ("file_sha256", None), ("os", "link")]
)
def test_a_save_that_fails_keeps_everything_from_before(place, name, folder, monkeypatch):
    """It is raised by the next call, once, and a later save works. A refused link is no failure."""
    toy = Toy(folder)
    toy.save(1)
    before = (folder / "model.safetensors").read_bytes()
    toy.train(0)
    with monkeypatch.context() as patch:
        if name:
            patch.setattr(getattr(checkpoint_module, place), name, fail)
        else:
            patch.setattr(checkpoint_module, place, fail)
        toy.checkpoint.save(2, 0, GUARD)
        toy.checkpoint.writer.join()
    if place == "os":
        toy.checkpoint.wait()
        assert toy.names() == ["step-1", "step-2"]
        return
    message = r"could not save step 2 in .*No space left .*earlier checkpoints are intact: make ro"
    with pytest.raises(OSError, match=message):
        toy.checkpoint.raise_failure()
    toy.checkpoint.wait()  # said once
    assert toy.names() == ["step-1"] and (folder / "model.safetensors").read_bytes() == before
    toy.save(2)
    assert toy.names() == ["step-1", "step-2"]


def test_a_failed_save_is_raised_by_the_next_one(folder, monkeypatch):
    toy = Toy(folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.torch, "save", fail)
        toy.checkpoint.save(1, 0, GUARD)
        toy.checkpoint.writer.join()
    with pytest.raises(OSError, match="could not save step 1"):
        toy.checkpoint.save(2, 0, GUARD)


def test_a_bug_in_the_writer_is_not_hidden(folder, monkeypatch):
    toy = Toy(folder)
    monkeypatch.setattr(checkpoint_module.json, "dumps", lambda *given, **options: 1 / 0)
    toy.checkpoint.save(1, 0, GUARD)
    with pytest.raises(OSError) as caught:
        toy.checkpoint.wait()
    assert isinstance(caught.value.__cause__.__cause__, ZeroDivisionError)


def test_weights_of_another_shape_are_refused(folder):
    Toy(folder).save(1)
    run, model = toy_run(folder), toy_network(hidden_size=32)
    run.resume_from = newest_whole(folder)
    checkpoint = Checkpoint(run, TrainState(model, None, toy_optimizer(model), "the data"))
    with pytest.raises(ValueError, match="step-1"):
        checkpoint.restore()


# --- a run that is replaced ---


def test_what_is_replaced_is_deleted_when_the_new_run_begins_and_only_once(folder):
    Toy(folder).save(7)
    for name in ("bad_steps", "tensorboard"):
        (folder / name / "old").mkdir(parents=True)
        (folder / name / "old" / "file").touch()
    for name in ("metrics.jsonl", "loss.png", "chat_template.jinja", "notes.txt"):
        (folder / name).touch()
    toy = Toy(folder, overwrite=True)
    assert toy.names() == ["step-7"]  # until it begins
    assert toy.checkpoint.restore() == (0, 0, None)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    toy.save(2)
    assert toy.checkpoint.restore()[0] == 2 and toy.names() == ["step-2"]


def test_the_launch_is_told_that_this_run_has_begun(folder):
    toy, begun = Toy(folder), []
    toy.run.ranks.begin = begun.append
    toy.checkpoint.restore()
    assert begun == [folder]


# --- helpers ---


def test_a_copied_state_shares_no_memory():
    x = torch.ones(2, requires_grad=True)
    state = {"a": [x, 3, "text"], "b": {"c": torch.zeros(1)}}
    copy = copied(state)
    assert copy["a"][0].data_ptr() != x.data_ptr() and not copy["a"][0].requires_grad
    assert copy["a"][1:] == [3, "text"] and torch.equal(copy["b"]["c"], torch.zeros(1))


def test_the_state_of_the_model_is_saved_unless_another_object_is():
    model, adapter = SimpleNamespace(), SimpleNamespace()
    assert TrainState(model, None, None, "x").saved is model
    assert TrainState(model, None, None, "x", saved=adapter).saved is adapter
