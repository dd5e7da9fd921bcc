"""The folder of a run: its name, who may write there, and the checkpoint that it resumes from."""

import hashlib
import json
import tempfile

import pytest

from model.model_minimind import MiniMindConfig
from model.presets import PRESETS
from tests.helpers.toy_runs import toy_run
from trainer.runtime.run_folder import (
    checkpoints_in,
    damage,
    find_to_resume,
    newest_whole,
    open_run_folder,
    related_runs,
    shape_name,
)

CONFIG = MiniMindConfig(hidden_size=32, num_hidden_layers=2)


def write_checkpoint(run_folder, step, rows_per_step=8):
    """A checkpoint of two files, with its manifest."""
    path = run_folder / "checkpoints" / f"step-{step}"
    path.mkdir(parents=True)
    progress = {"step": step, "rows_per_step": rows_per_step}
    (path / "progress.json").write_text(json.dumps(progress))
    (path / "model.safetensors").write_bytes(b"weights " * step)
    manifest = {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


# --- names ---


def test_a_preset_is_known_by_its_shape():
    for name in PRESETS:
        config = MiniMindConfig.from_preset(name, rope_theta=1e4, max_position_embeddings=64)
        assert shape_name(config) == name


def test_another_shape_is_its_width_and_layers():
    assert shape_name(CONFIG) == "32x2"
    assert (
        shape_name(MiniMindConfig(hidden_size=48, num_hidden_layers=3, num_experts=4)) == "48x3_moe"
    )


# --- opening ---


@pytest.fixture
def open_folder(tmp_path):
    """open_folder(**flags): the Run whose folder is out/toy_32x2, opened."""

    def make(restarted=False, config=CONFIG, **flags):
        run = toy_run(tmp_path / "out" / "unopened", **flags)
        run.ranks.has_begun = lambda folder: restarted
        open_run_folder(run, config)
        return run

    return make


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out" / "toy_32x2"


def test_a_new_run_gets_the_name_and_the_shape(open_folder, folder):
    run = open_folder()
    assert run.folder == folder and run.resume_from is None and run.saved_step is None
    assert not folder.exists()  # until something is written


def test_a_run_that_is_there_is_neither_replaced_nor_resumed_by_itself(open_folder, folder):
    write_checkpoint(folder, 8)
    message = r"toy_32x2 holds a run, 8 updates long: .*--from_resume.*--save_weight.*--overwrite"
    with pytest.raises(ValueError, match=message):
        open_folder()
    assert open_folder(overwrite=True).resume_from is None
    assert open_folder(inspect=2).resume_from is None  # it writes nothing


def test_a_resumed_run_takes_over_the_newest_checkpoint_and_its_batch_rows(open_folder, folder):
    write_checkpoint(folder, 4)
    path = write_checkpoint(folder, 12, rows_per_step=6)
    run = open_folder(from_resume=True)
    assert run.resume_from == (path, {"step": 12, "rows_per_step": 6})
    assert (run.saved_step, run.rows_per_step) == (12, 6)


def test_ranks_that_are_started_again_resume_the_run_that_they_began(open_folder, folder):
    write_checkpoint(folder, 4)
    for flags in ({}, {"overwrite": True}):
        run = open_folder(restarted=True, **flags)
        assert run.saved_step == 4 and run.args.from_resume and not run.args.overwrite


def test_a_restart_before_the_first_save_begins_again(open_folder, tmp_path, capsys):
    write_checkpoint(tmp_path / "out" / "toy_64x1", 31)  # the same name, another shape
    run = open_folder(restarted=True)
    assert run.resume_from is None
    assert "finds no checkpoint" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named_before_training(open_folder, folder, monkeypatch):
    folder.parent.mkdir()
    folder.write_text("a file where the run's folder would be")
    message = r"toy_32x2 cannot be written \(Not a directory\): choose another --save_dir than"
    with pytest.raises(ValueError, match=message):
        open_folder()
    folder.unlink()
    write_checkpoint(folder, 4)
    mkdtemp = tempfile.mkdtemp

    def refuse(suffix=None, prefix=None, dir=None):  # root may write to all folders
        if dir == folder:
            raise OSError(30, "Read-only file system")
        return mkdtemp(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"toy_32x2 cannot be written \(Read-only file system\)"):
        open_folder(from_resume=True)


# --- the checkpoint to resume from ---


def test_checkpoints_are_found_by_their_number(folder):
    paths = {step: write_checkpoint(folder, step) for step in (9, 100, 20)}
    (folder / "checkpoints" / ".step-300.77").mkdir()  # of a killed process
    assert checkpoints_in(folder) == [(step, paths[step]) for step in (100, 20, 9)]
    assert checkpoints_in(folder.with_name("nowhere")) == []


def break_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [break_off, flip])
@pytest.mark.parametrize("name", ["model.safetensors", "progress.json", "manifest.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(name, harm, folder, capsys):
    before = write_checkpoint(folder, 4)
    path = write_checkpoint(folder, 8)
    assert damage(path) is None
    harm(path / name)
    assert newest_whole(folder) == (before, {"step": 4, "rows_per_step": 8})
    out = capsys.readouterr().out
    assert f"warning: {damage(path)}; falling back on the checkpoint before it" in out
    if (name, harm) != ("manifest.json", flip):  # a wrong digest accuses the file
        assert f"{path / name} is damaged" in out


@pytest.mark.parametrize("name", ["model.safetensors", "progress.json"])
def test_a_missing_file_is_named(name, folder):
    path = write_checkpoint(folder, 4)
    (path / name).unlink()
    assert damage(path) == f"{path / name} is missing"


def test_a_checkpoint_without_a_manifest_was_never_finished(folder):
    path = write_checkpoint(folder, 4)
    (path / "manifest.json").unlink()
    assert damage(path) == f"{path} was never finished (it has no manifest.json)"


def test_an_empty_manifest_vouches_for_nothing(folder):
    path = write_checkpoint(folder, 4)
    (path / "manifest.json").write_text("{}")
    assert damage(path) == f"{path / 'progress.json'} is damaged"


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(folder, capsys):
    for step in (4, 8):
        flip(write_checkpoint(folder, step) / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        newest_whole(folder)
    text = str(caught.value)
    assert text.startswith(f"nothing to resume from in {folder / 'checkpoints'}: ")
    assert "step-8/model.safetensors is damaged; " in text and "step-4/model.safet" in text
    assert "Delete that folder and start again without --from_resume" in text
    assert capsys.readouterr().out.count("falling back") == 1  # the last one has none before it


def test_no_checkpoint_at_all_is_a_new_run(folder, capsys):
    assert newest_whole(folder) is None
    assert find_to_resume(folder, toy_run(folder).args, is_restarted=False) is None
    message = "--from_resume finds no checkpoint in {}: starting from the beginning\n"
    assert message.format(folder / "checkpoints") in capsys.readouterr().out


def test_a_run_of_the_same_name_and_another_shape_is_asked_for(folder, capsys):
    for name in ("toy_64x1", "toy_tiny", "toy_big_tiny", "toys_32x2"):
        write_checkpoint(folder.with_name(name), 31)
    write_checkpoint(folder.with_name("toy_48x1_moe"), 7)
    (folder.with_name("toy_16x1")).mkdir()  # nothing is saved there
    args = toy_run(folder).args
    same, close = related_runs(folder, "toy")
    assert same == [("toy_48x1_moe", 7), ("toy_64x1", 31), ("toy_tiny", 31)]
    assert ("toys_32x2", 31) in close
    message = r"toy_48x1_moe has step 7, toy_64x1 has step 31, .*to resume it, its shape flags"
    with pytest.raises(ValueError, match=message):
        find_to_resume(folder, args, is_restarted=False)
    assert find_to_resume(folder, args, is_restarted=True) is None
    assert "was that meant?" in capsys.readouterr().out
