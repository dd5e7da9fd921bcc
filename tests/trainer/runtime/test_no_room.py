"""Whole runs without room: on a full disk, in folders that cannot be written, out of memory."""

import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import poison_losses
from trainer import train_pretrain
from trainer.runtime.arguments import command

NAMES = {"pretrain": "pretrain_32x2"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "arguments.json", "step-1-rank-0.jsonl"])
def test_a_full_disk_is_one_line(name, flags, monkeypatch):
    def full(write):
        def fails(path, *content, **options):
            if name in path.name:
                raise OSError(28, "No space left on device")
            return write(path, *content, **options)

        return fails

    for write in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, write, full(getattr(Path, write)))
    poison_losses(monkeypatch, lambda step, count: True)
    message = rf"error: could not write .*{name} \(No space left on device\): make room on the disk"
    with pytest.raises(SystemExit, match=message):
        command(lambda: train_pretrain.main(flags()))


def test_a_folder_that_cannot_be_written_is_named_before_training(flags, tmp_path, monkeypatch):
    train_pretrain.main(flags())
    (tmp_path / "out" / "wrong_32x2").write_text("a file where the run's folder would be")
    with pytest.raises(
        ValueError,
        match=r"wrong_32x2 cannot be written \(Not a directory\): choose another --save_dir than",
    ):
        train_pretrain.main(flags(save_weight="wrong"))
    folder = tmp_path / "out" / NAMES["pretrain"]
    deny(monkeypatch, folder)
    with pytest.raises(ValueError, match=r"pretrain_32x2 cannot be written"):
        train_pretrain.main([*flags(), "--from_resume"])


def deny(monkeypatch, folder):
    """Let no file be made in `folder`: the tests may run as root, whom permissions do not stop."""
    mkdtemp = tempfile.mkdtemp

    def refuse(suffix=None, prefix=None, dir=None):
        if dir == folder:
            raise OSError(30, "Read-only file system")
        return mkdtemp(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)


def test_a_token_cache_that_cannot_be_written_is_named_before_any_text_is_encoded(
    flags, tmp_path, monkeypatch
):
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            SystemExit,
            match=r"cache cannot be written \(Read-only file system\)\. "
            r"Choose another --cache_dir than .*cache\.$",
        ),
    ):
        (tmp_path / "cache").mkdir()
        deny(patch, tmp_path / "cache")
        command(lambda: train_pretrain.main(flags()))
    assert not list((tmp_path / "cache").iterdir())
    train_pretrain.main(flags(max_steps=1))
    deny(monkeypatch, tmp_path / "cache")
    train_pretrain.main([*flags(max_steps=1), "--overwrite"])  # everything is cached


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_place_where_not_even_root_can_write_is_named(flags):
    with pytest.raises(
        SystemExit,
        match=r"error: /proc cannot be written \(.*\): choose another --save_dir than /proc/nope",
    ):
        command(lambda: train_pretrain.main(flags(save_dir="/proc/nope")))


@pytest.fixture
def out_of_memory(flags, monkeypatch):
    """out_of_memory(step, *switches, **flags): the error of a run without memory in a step."""

    def make(full_at, *switches, **changes):
        def full(run, step):
            if step == full_at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        command = [*flags(**{"max_seq_len": 256, "epochs": 9, **changes}), *switches]
        with monkeypatch.context() as patch, pytest.raises(MemoryError) as error:
            patch.setattr(train_pretrain.Run, "seed", full)
            train_pretrain.main(command)
        text = str(error.value)
        before = "out of memory on cpu: CUDA out of memory. Tried to allocate 2.00 GiB."
        assert text.startswith(before)
        return text.removeprefix(before)

    return make


LEAST = dict(batch_size=1, accumulation_steps=4, gradient_checkpointing=1)


@pytest.mark.parametrize(
    "changes, fix",
    [
        (
            dict(batch_size=4),
            " Fix: --batch_size 2 --accumulation_steps 2 gives the same update in ",
        ),
        (
            dict(batch_size=1, accumulation_steps=4),
            " Fix: --batch_size 1 --accumulation_steps 4 --gradient_checkpointing gives the same",
        ),
        (LEAST, " Fix: not even one batch row at a time fits; --batch_size 1 --accumulation_steps"),
    ],
)
def test_out_of_memory_ends_with_flags_that_need_less(changes, fix, out_of_memory):
    """Whatever the estimate said."""
    text = out_of_memory(0, **changes)
    assert text.startswith(fix)
    assert "from_resume" not in text and "is saved" not in text
    if changes == LEAST:
        assert "--gradient_checkpointing --max_seq_len 128 does" in text


@pytest.mark.slow
def test_out_of_memory_after_a_save_is_followed_by_a_resumption(out_of_memory, flags):
    """--from_resume where something is saved, but not with a flag that it would refuse."""
    assert out_of_memory(5, batch_size=4).startswith(
        " Step 4 is saved. Fix: --batch_size 2 --accumulation_steps 2 --from_resume gives"
    )
    text = out_of_memory(5, "--from_resume", **LEAST)
    assert "--max_seq_len 128 does" in text and "--from_resume" not in text
    assert text.endswith(", in a new run under another --save_weight")
    options = dict(max_seq_len=256, epochs=9, batch_size=2, accumulation_steps=2)
    train_pretrain.main([*flags(**options), "--from_resume"])


def test_out_of_memory_before_the_weights_are_there(flags, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_pretrain, "load_model", full)
    message = r"the weights and their optimizer are too large: distribute .* smaller --preset$"
    with pytest.raises(MemoryError, match=message):
        train_pretrain.main(flags())
