"""Hashes: equal for equal contents, remembered while a file stays as it is."""

import os
import time

import pytest

from dataset.files import hashes
from dataset.files.hashes import fingerprint, remembered_sha256


def test_fingerprints_tell_contents_apart(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    assert remembered_sha256(tmp_path / "a", None) == remembered_sha256(tmp_path / "b", None)
    (tmp_path / "b").write_text("y")
    assert remembered_sha256(tmp_path / "a", None) != remembered_sha256(tmp_path / "b", None)
    assert fingerprint(a=1, b=2) == fingerprint(b=2, a=1) != fingerprint(a=2, b=1)
    with pytest.raises(ValueError, match="nowhere: no such file"):
        remembered_sha256("nowhere", None)


def test_a_hash_is_remembered_while_the_file_stays_as_it_is(tmp_path, monkeypatch):
    path, memory = tmp_path / "a", tmp_path / "cache" / "hashes"
    path.write_text("x")
    x = remembered_sha256(path, memory)
    assert (
        not memory.exists()
    )  # written a moment ago: another write might leave size and time as they are
    monkeypatch.setattr(hashes, "SETTLED", -1e12)
    assert remembered_sha256(path, memory) == x == remembered_sha256(path, None)
    (record,) = memory.iterdir()
    record.write_text("from memory")
    assert remembered_sha256(path, memory) == "from memory"
    state = path.stat()
    time.sleep(0.02)
    path.write_text("y")
    os.utime(
        path, ns=(state.st_atime_ns, state.st_mtime_ns)
    )  # same size, same time of modification, as rsync leaves it
    assert remembered_sha256(path, memory) == remembered_sha256(path, None) != x
