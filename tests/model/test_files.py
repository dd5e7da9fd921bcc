"""Files are replaced whole or not at all."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from model.files import as_typed, file_sha256, flush, replace_file, write_json, writing

ROOT = Path(__file__).resolve().parents[2]


def full_disk(temporary):
    temporary.write_text("half")
    raise OSError(28, "No space left on device")


def failing_library(temporary):
    temporary.write_text("half")
    raise SafetensorError("I/O error: No space left on device")


@pytest.mark.parametrize("write", [full_disk, failing_library])
def test_a_failed_write_leaves_the_old_file(write, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    message = r"could not write .*model.safetensors.*No space left.*make room on the disk"
    with pytest.raises(OSError, match=message):
        replace_file(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyboardInterrupt])
def test_a_mistake_of_the_writer_passes_through_and_leaves_nothing(error, tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise error("the writer's own")

    with pytest.raises(error, match="the writer's own"):
        replace_file(tmp_path / "new", write)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_with_the_rights_of_a_new_one(tmp_path):
    def write(temporary):
        assert path.read_text() == "old" and temporary.parent == tmp_path
        temporary.touch(mode=0o600)
        temporary.write_text("new")

    path, other = tmp_path / "file", tmp_path / "other"
    path.write_text("old")
    replace_file(str(path), write)
    other.touch()
    assert path.read_text() == "new" and sorted(tmp_path.iterdir()) == [path, other]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    write_json(path, {"text": "数学", "n": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "数学", "n": [1, None]}


def test_an_error_names_the_file_and_the_fix(tmp_path):
    with pytest.raises(OSError, match=r"could not write .*nowhere.* \(No such file.*make room"):
        replace_file(tmp_path / "nowhere" / "file", lambda temporary: temporary.write_text(""))
    with pytest.raises(OSError, match=r"could not write log \(.*\): make room .*; retry"):
        with writing("log", "; retry"):
            raise OSError(28, "No space left on device")


def test_files_and_folders_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    (tmp_path / "file").write_text("content")
    flush(tmp_path / "file")
    flush(tmp_path)
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 7])
def test_hashes_are_those_of_the_content(size, tmp_path):
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_terminal_that_cannot_spell_a_character_shows_a_question_mark():
    program = "from model.files import forgive_text\nforgive_text()\nprint(input(), '二')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=b"caf\xff\n",  # neither UTF-8 nor ASCII
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout.strip()) == (0, b"caf? ?"), done.stderr


def test_a_text_of_the_command_line_that_the_locale_cannot_read_is_read_as_utf8():
    assert as_typed(os.fsdecode(b"caf\xff")) == "caf\ufffd"
    assert as_typed("加") == "加" and as_typed("") == "" and as_typed(None) is None


def test_every_program_forgives():
    """Each ends in `command(main)`, which does, or says so itself; the bench_*.py are bench.py."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        text = path.read_text(encoding="utf-8")
        if "__main__" in text and "runpy" not in text and "sys.path" in text:
            assert "command(" in text or "forgive_text()" in text, path
