"""The token cache: built once, whole or not at all, the same with one process and with several."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset import token_cache
from dataset.processes import WorkerPool
from dataset.token_cache import EncodedBlock, LineBlock, Report, TokenTable, open_or_build

ROOT = Path(__file__).resolve().parents[2]


def encode_block(block: LineBlock) -> EncodedBlock:
    """Encode each line as its characters' codes. Here at the top, where worker processes find it."""
    parts = [np.array([ord(char) for char in line], dtype=np.uint16) for _, line in block.lines]
    if any(line == "out of memory" for _, line in block.lines):
        os.kill(os.getpid(), signal.SIGKILL)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    report = Report(rows_read=len(parts), rows_used=len(parts), sequences=len(parts), tokens=len(ids))
    documents = np.array([line_no for line_no, _ in block.lines], dtype=np.uint64)
    return EncodedBlock({"input_ids": ids}, lengths, documents, report)


def line_blocks(count, start=0):
    return [LineBlock("f.jsonl", [(i, "x" * (i % 5 + 1)), (i, f"line {i}")]) for i in range(start, start + count)]


def encoded(count=3):
    return [encode_block(block) for block in line_blocks(count)]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def no_build():
    raise AssertionError("built although the cache is there")


def texts(table):
    return ["".join(map(chr, table["input_ids", i])) for i in range(len(table))]


def test_what_was_written_is_read_back(tmp_path):
    table = open_or_build(tmp_path / "cache", lambda: encoded(3))
    assert texts(table) == ["x", "line 0", "xx", "line 1", "xxx", "line 2"]
    assert table.lengths.tolist() == [1, 6, 2, 6, 3, 6]
    assert table.documents.tolist() == [0, 0, 1, 1, 2, 2]
    assert table.report.tokens == 24
    assert "input_ids" in table and "is_target" not in table


def test_reading_copies_nothing(tmp_path):
    table = open_or_build(tmp_path / "cache", encoded)
    part = table["input_ids", 1]
    assert part.dtype == np.uint16 and not part.flags.owndata and not part.flags.writeable


def test_the_folder_is_a_hugging_face_dataset(tmp_path):
    import datasets

    open_or_build(tmp_path / "cache", encoded)
    rows = datasets.load_from_disk(str(tmp_path / "cache"))
    assert rows[1]["input_ids"] == [ord(char) for char in "line 0"]


def test_a_second_use_builds_nothing(tmp_path):
    first = open_or_build(tmp_path / "cache", encoded)
    second = open_or_build(tmp_path / "cache", no_build)
    assert texts(first) == texts(second) and str(first.report) == str(second.report)
    assert names(tmp_path) == ["cache"]


def truncate(folder):
    file = next(folder.glob("*.arrow"))
    os.truncate(file, file.stat().st_size // 2)


def lose_a_sequence(folder):
    report = folder / "report.json"
    report.write_text(report.read_text().replace('"sequences": 6', '"sequences": 7'))


@pytest.mark.parametrize("damage", [
    truncate, lose_a_sequence, lambda folder: (folder / "report.json").unlink(),
    lambda folder: (folder / "report.json").write_text("{"), lambda folder: (folder / "state.json").unlink(),
    lambda folder: [file.unlink() for file in folder.iterdir()],
], ids=["half_the_data", "other_count", "no_report", "half_a_report", "no_state", "empty_folder"])
def test_a_damaged_cache_is_rebuilt(tmp_path, capsys, damage):
    folder = tmp_path / "cache"
    expected = texts(open_or_build(folder, encoded))
    damage(folder)
    assert texts(open_or_build(folder, encoded)) == expected
    assert "damaged token cache" in capsys.readouterr().out
    assert texts(open_or_build(folder, no_build)) == expected


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, code):
    def blocks():
        yield from encoded(2)
        raise OSError(code, "No space left on device")

    with pytest.raises(OSError, match=r"no space left for the token cache .* or make .* a link to a folder on") as caught:
        open_or_build(tmp_path / "cache", blocks)
    assert caught.value.errno == code
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_build_that_is_stopped_leaves_nothing(tmp_path, error):
    def blocks():
        yield from encoded(2)
        raise error

    with pytest.raises(error):
        open_or_build(tmp_path / "cache", blocks)
    assert names(tmp_path) == []
    assert len(open_or_build(tmp_path / "cache", encoded)) == 6


BUILDER = """
import os, pathlib, signal, sys, time
from dataset.processes import WorkerPool
from dataset.token_cache import open_or_build
from tests.dataset.test_token_cache import encode_block, line_blocks

def blocks(how, folder):
    print("building", flush=True)
    with WorkerPool(encode_block, 2) as pool:
        for number, block in enumerate(pool.map(line_blocks(60), "", len)):
            yield block
            if number == 20:
                print(*pool._executor._processes, flush=True)
                if how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60 if how == "hang" else 0.5)

if __name__ == "__main__":
    how, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    print(len(open_or_build(folder, lambda: blocks(how, folder))))
"""


@pytest.fixture
def builder(tmp_path):
    """builder(how): another process, in a group of its own, that builds tmp_path/cache."""
    (tmp_path / "builder.py").write_text(BUILDER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return lambda how: subprocess.Popen([sys.executable, tmp_path / "builder.py", how, tmp_path / "cache"], env=environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until_gone(pids):
    end = time.monotonic() + 20
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path, builder):
    said = [process.communicate(timeout=60)[0].splitlines() for process in (builder("slow"), builder("slow"))]
    assert sum("building" in lines for lines in said) == 1
    assert sum(lines[0].startswith("waiting for another process that is building") for lines in said) == 1
    assert [lines[-1] for lines in said] == ["120", "120"]
    assert names(tmp_path) == ["builder.py", "cache"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_killed_builder_leaves_no_lock_no_process_and_no_rubbish(tmp_path, builder):
    process = builder("die")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["builder.py", "cache.building"]
    wait_until_gone(said.splitlines()[1].split())
    assert len(open_or_build(tmp_path / "cache", encoded)) == 6
    assert names(tmp_path) == ["builder.py", "cache"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_an_interrupted_builder_leaves_nothing(tmp_path, builder):
    process = builder("hang")
    assert process.stdout.readline() == "building\n"
    workers = process.stdout.readline().split()
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does: to the parent and to the workers
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.count("Traceback") == 1 and errors.endswith("KeyboardInterrupt\n")
    assert names(tmp_path) == ["builder.py"]
    wait_until_gone(workers)


def test_blocks_without_a_sequence_are_no_trouble(tmp_path):
    empty = encode_block(LineBlock("f.jsonl", []))
    table = open_or_build(tmp_path / "cache", lambda: [empty, *encoded(1), empty])
    assert texts(table) == ["x", "line 0"]


def test_a_cache_may_hold_no_sequence(tmp_path):
    empty = encode_block(LineBlock("f.jsonl", []))
    empty.report.note("no_target", "f.jsonl:7")
    table = open_or_build(tmp_path / "cache", lambda: [empty])
    assert len(table) == len(table.documents) == 0
    assert len(open_or_build(tmp_path / "cache", no_build)) == 0 and table.report.rows_no_target == 1
    other = open_or_build(tmp_path / "other", encoded)
    assert texts(TokenTable.join([table, other, table])) == texts(other)


def test_joined_tables_are_one(tmp_path):
    tables = [open_or_build(tmp_path / str(i), lambda i=i: encoded(i)) for i in (2, 1, 3)]
    whole = TokenTable.join(tables)
    assert texts(whole) == [text for table in tables for text in texts(table)]
    assert whole.lengths.tolist() == [len(text) for text in texts(whole)]
    assert whole.documents.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2]
    assert (whole.report.sequences, whole.report.tokens) == (12, len("".join(texts(whole))))


def test_a_table_travels_by_name(tmp_path):
    table = TokenTable.join([open_or_build(tmp_path / "cache", lambda: encoded(200))] * 2)
    pickled = pickle.dumps(table)
    assert len(pickled) < 500 and texts(pickle.loads(pickled)) == texts(table)


READER = """
import pathlib, sys
import numpy as np
from dataset.lm_dataset import TokenDataset
from dataset.packing import PackedBatches
from dataset.token_cache import EncodedBlock, Report, open_or_build

def memory(kind):  # MB
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) / 1024

def blocks():
    for number in range(50):
        lengths = np.full(2000, 512)
        ids = np.full(lengths.sum(), number + 1, dtype=np.uint16)
        report = Report(sequences=len(lengths), tokens=len(ids))
        yield EncodedBlock({"input_ids": ids}, lengths, np.arange(2000, dtype=np.uint64) + 2000 * number, report)

before = memory("RssAnon")
dataset = TokenDataset.__new__(TokenDataset)
dataset._table = open_or_build(pathlib.Path(sys.argv[1]), blocks)
built = memory("RssAnon")
dataset.rows, dataset.lengths, dataset.fingerprint = np.arange(len(dataset._table)), dataset._table.lengths, ""
train, _ = dataset.held_out_split(0.01)
batches = PackedBatches(train, batch_size=64, accumulation_steps=1, max_seq_len=512, seed=0, epochs=1, pad_id=0)
seen = sum(int((micro["input_ids"] > 0).sum()) for step in batches for micro in step)
print(int(seen == train.lengths.sum()), built - before, memory("RssAnon") - built, memory("RssFile"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_cache_of_100_mb_is_built_and_read_in_a_fraction_of_that(tmp_path):
    shown = subprocess.run([sys.executable, "-c", READER, tmp_path / "cache"], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout
    complete, building, reading, from_the_map = map(float, shown.split())
    assert complete and building < 60 and reading < 30  # 20 and 12 on Linux: imports, a block of 2 MB, the indices
    assert from_the_map > 90  # the tokens were in memory, as pages that the system may drop


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the library `datasets`.*pip install"):
        open_or_build(tmp_path / "cache", encoded)


def test_a_killed_process_leaves_no_cache(tmp_path):
    blocks = [*line_blocks(20), LineBlock("f.jsonl", [(77, "out of memory")]), *line_blocks(40)]
    with WorkerPool(encode_block, 2) as pool, pytest.raises(OSError, match=r"one of 2 worker processes was killed.*--num_proc"):
        open_or_build(tmp_path / "cache", lambda: pool.map(blocks, "", len))
    assert names(tmp_path) == []


def test_reports_add_up_and_name_the_first_rows():
    total = Report()
    for start in (0, 4):
        part = Report(rows_read=4, tokens=10)
        for line in range(start, start + 4):
            part.note("cut", f"f:{line}")
        total.add(part)
    assert (total.rows_read, total.tokens, total.rows_cut) == (8, 20, 8)
    assert total.named == {"cut": ["f:0", "f:1", "f:2", "f:3", "f:4"]}
    assert str(total).endswith("cut: f:0; f:1; f:2; f:3; f:4; and 3 more")
    assert "8 read, 0 used, 8 cut, 0 skipped, 0 without a target" in str(total)


def test_fingerprints_tell_contents_apart(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    assert token_cache.file_sha256(tmp_path / "a") == token_cache.file_sha256(tmp_path / "b")
    (tmp_path / "b").write_text("y")
    assert token_cache.file_sha256(tmp_path / "a") != token_cache.file_sha256(tmp_path / "b")
    assert token_cache.fingerprint(a=1, b=2) == token_cache.fingerprint(b=2, a=1) != token_cache.fingerprint(a=2, b=1)
    with pytest.raises(ValueError, match="nowhere: no such file"):
        token_cache.file_sha256("nowhere")


def test_a_hash_is_remembered_while_the_file_stays_as_it_is(tmp_path, monkeypatch):
    path, memory = tmp_path / "a", tmp_path / "cache" / "hashes"
    path.write_text("x")
    x = token_cache.file_sha256(path, memory)
    assert not memory.exists()  # written a moment ago: another write might leave size and time as they are
    monkeypatch.setattr(token_cache, "SETTLED", -1e12)
    assert token_cache.file_sha256(path, memory) == x == token_cache.file_sha256(path)
    (record,) = memory.iterdir()
    record.write_text("from memory")
    assert token_cache.file_sha256(path, memory) == "from memory"
    state = path.stat()
    time.sleep(0.02)
    path.write_text("y")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size, same time of modification, as rsync leaves it
    assert token_cache.file_sha256(path, memory) == token_cache.file_sha256(path) != x
