"""Outputs appear whole or not at all; the next process removes the left-overs of a killed one."""

import gzip
import signal
import subprocess
import sys

import pytest

from dataset.files.outputs import check_outputs, scratch_folder, whole_file, whole_folder
from dataset.lm_dataset import ROOT

KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from dataset.files.outputs import scratch_folder, whole_file
folder = pathlib.Path({folder!r})
with scratch_folder(folder, ".cleaning-") as scratch, whole_file(folder / "out.jsonl") as file:
    (scratch / "hashes").write_text("x")
    file.write("half a row")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    with whole_file(tmp_path / "new" / "a.jsonl.gz") as file:
        file.write("一\n")
        assert "a.jsonl.gz" not in names(tmp_path / "new")
    assert gzip.open(tmp_path / "new" / "a.jsonl.gz").read() == "一\n".encode() and names(
        tmp_path / "new"
    ) == ["a.jsonl.gz"]
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "new" / "a.jsonl.gz"):
        raise KeyboardInterrupt
    assert gzip.open(tmp_path / "new" / "a.jsonl.gz").read() == "一\n".encode() and names(
        tmp_path / "new"
    ) == ["a.jsonl.gz"]


def test_two_do_not_write_one_file(tmp_path):
    with whole_file(tmp_path / "a.jsonl") as file:
        file.write("first\n")
        with (
            pytest.raises(OSError, match=r"a\.jsonl: another process is writing"),
            whole_file(tmp_path / "a.jsonl"),
        ):
            pass
    assert (tmp_path / "a.jsonl").read_text() == "first\n" and names(tmp_path) == ["a.jsonl"]


def test_a_folder_appears_when_it_is_whole_and_replaces_the_former_one(tmp_path):
    for text in ("old", "new"):
        with whole_folder(tmp_path / "a") as draft:
            (draft / text).write_text(text)
            assert (tmp_path / "a").exists() == (text == "new")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["new"]


def test_outputs_are_no_inputs_and_differ(tmp_path):
    check_outputs(["a.jsonl"], {"--out": "b.jsonl", "--rejected": ""})
    for out, rejected, message in (
        ("a.jsonl", "", "--out a.jsonl is one of"),
        ("b.jsonl", "./b.jsonl", "is the file of --out"),
        ("b.gz", "", "b.gz: unknown file type"),
    ):
        with pytest.raises(ValueError, match=message):
            check_outputs(["a.jsonl"], {"--out": out, "--rejected": rejected})


def test_left_overs_of_a_killed_process_go_and_those_of_a_running_one_stay(tmp_path):
    code = KILLED.format(root=str(ROOT), folder=str(tmp_path))
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
        == -signal.SIGKILL
    )
    left = names(tmp_path)
    assert (
        len(left) == 4
        and left[0].startswith(".cleaning-")
        and "out.jsonl.part" in left
        and "out.jsonl" not in left
    )
    with scratch_folder(tmp_path, ".cleaning-") as mine:
        assert mine.is_dir() and left[0] not in names(tmp_path)
        (mine / "hashes").write_text("x")
        with scratch_folder(tmp_path, ".cleaning-") as other:
            assert other != mine and (mine / "hashes").exists()
    with whole_file(tmp_path / "out.jsonl") as file:
        file.write("row\n")
    assert names(tmp_path) == ["out.jsonl"]
