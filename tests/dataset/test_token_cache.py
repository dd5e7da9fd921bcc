"""The token cache: built once, whole or not at all, the same with one process and with several."""

import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset.files.processes import WorkerPool
from dataset.token_cache import LineBlock, Report, TokenTable, open_or_build
from tests.helpers.token_blocks import encode_block, line_blocks

ROOT = Path(__file__).resolve().parents[2]


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


def test_building_and_reading_wait_for_no_heavy_library(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from dataset.token_cache import open_or_build\n"
        "from tests.helpers.token_blocks import encode_block, line_blocks\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "table = open_or_build(folder, lambda: map(encode_block, line_blocks(3)))\n"
        "print(len(table.documents), *{'torch', 'datasets', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "6\n", done.stderr


def test_the_folder_is_a_hugging_face_dataset(tmp_path):
    import datasets

    table = open_or_build(tmp_path / "cache", encoded)
    rows = datasets.load_from_disk(str(tmp_path / "cache"))
    assert rows[1]["input_ids"] == [ord(char) for char in "line 0"]
    rows.save_to_disk(str(tmp_path / "theirs"))  # as caches of earlier versions were written
    shutil.copy(tmp_path / "cache" / "report.json", tmp_path / "theirs")
    assert texts(open_or_build(tmp_path / "theirs", no_build)) == texts(table)


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


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lose_a_sequence,
        lambda folder: (folder / "report.json").unlink(),
        lambda folder: (folder / "report.json").write_text("{"),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: [file.unlink() for file in folder.iterdir()],
    ],
    ids=["half_the_data", "other_count", "no_report", "half_a_report", "no_state", "empty_folder"],
)
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

    with pytest.raises(
        OSError, match=r"no space left for the token cache .* or make .* a link to a folder on"
    ) as caught:
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
from dataset.files.processes import WorkerPool
from dataset.token_cache import open_or_build
from tests.helpers.token_blocks import encode_block, line_blocks

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
    return lambda how: subprocess.Popen(
        [sys.executable, tmp_path / "builder.py", how, tmp_path / "cache"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until_deaf(pids):
    """Until Ctrl-C means nothing to the workers: their first second is Python's own start."""
    for pid in pids:
        for _ in range(400):
            ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
            if int(ignored, 16) & 1 << signal.SIGINT - 1:
                break
            time.sleep(0.05)


def wait_until_gone(pids):
    end = time.monotonic() + 20
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path, builder):
    said = [
        process.communicate(timeout=60)[0].splitlines()
        for process in (builder("slow"), builder("slow"))
    ]
    assert sum("building" in lines for lines in said) == 1
    assert (
        sum(lines[0].startswith("waiting for another process that is building") for lines in said)
        == 1
    )
    assert [lines[-1] for lines in said] == ["120", "120"]
    assert names(tmp_path) == ["builder.py", "cache"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_killed_builder_leaves_no_lock_no_process_and_no_rubbish(tmp_path, builder):
    process = builder("die")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2 and names(tmp_path)[0].startswith(".cache.draft-")
    wait_until_gone(said.splitlines()[1].split())
    assert len(open_or_build(tmp_path / "cache", encoded)) == 6
    assert names(tmp_path) == ["builder.py", "cache"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_an_interrupted_builder_leaves_nothing(tmp_path, builder):
    process = builder("hang")
    assert process.stdout.readline() == "building\n"
    workers = process.stdout.readline().split()
    wait_until_deaf(workers)
    # as Ctrl-C in a terminal does: to the parent and to the workers
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode != 0
        and errors.count("Traceback") == 1
        and errors.endswith("KeyboardInterrupt\n")
    )
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
    assert (
        len(open_or_build(tmp_path / "cache", no_build)) == 0 and table.report.rows_no_target == 1
    )
    other = open_or_build(tmp_path / "other", encoded)
    assert texts(TokenTable(*table.folders, *other.folders, *table.folders)) == texts(other)


def test_joined_tables_are_one(tmp_path):
    tables = [open_or_build(tmp_path / str(i), lambda i=i: encoded(i)) for i in (2, 1, 3)]
    whole = TokenTable(*(tmp_path / str(i) for i in (2, 1, 3)))
    assert texts(whole) == [text for table in tables for text in texts(table)]
    assert whole.lengths.tolist() == [len(text) for text in texts(whole)]
    assert whole.documents.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2]
    assert (whole.report.sequences, whole.report.tokens) == (12, len("".join(texts(whole))))


def test_a_table_travels_by_name(tmp_path):
    open_or_build(tmp_path / "cache", lambda: encoded(200))
    table = TokenTable(*[tmp_path / "cache"] * 2)
    pickled = pickle.dumps(table)
    assert len(pickled) < 500 and texts(pickle.loads(pickled)) == texts(table)


READER = """
import pathlib, sys
import numpy as np
import torch
from dataset.packing import PackedBatches
from dataset.token_dataset import TokenDataset
from dataset.token_cache import EncodedBlock, Report, open_or_build

def memory(kind):  # MB
    lines = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return int(lines[0].split()[1]) / 1024

def blocks():
    for number in range(50):
        lengths = np.full(2000, 512)
        ids = np.full(lengths.sum(), number + 1, dtype=np.uint16)
        report = Report(sequences=len(lengths), tokens=len(ids))
        documents = np.arange(2000, dtype=np.uint64) + 2000 * number
        yield EncodedBlock({"input_ids": ids}, lengths, documents, report)

before = memory("RssAnon")
dataset = TokenDataset.__new__(TokenDataset)
dataset.table = open_or_build(pathlib.Path(sys.argv[1]), blocks)
built = memory("RssAnon")
dataset.rows, dataset.lengths = np.arange(len(dataset.table)), dataset.table.lengths
dataset.fingerprint = ""
train, _ = dataset.held_out_split(0.01)
batches = PackedBatches(
    train, batch_size=64, accumulation_steps=1, max_seq_len=512, seed=0, epochs=1, pad_id=0
)
seen = sum(int((micro["input_ids"] > 0).sum()) for step in batches for micro in step)
read = memory("RssAnon") - built
print(int(seen == train.lengths.sum()), built - before, read, memory("RssFile"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_cache_of_100_mb_is_built_and_read_in_a_fraction_of_that(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", READER, tmp_path / "cache"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout
    complete, building, reading, from_the_map = map(float, shown.split())
    assert (
        complete and building < 60 and reading < 30
    )  # 20 and 12 on Linux: imports, a block of 2 MB, the indices
    assert from_the_map > 90  # the tokens were in memory, as pages that the system may drop


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs the library `pyarrow`.*pip install"):
        open_or_build(tmp_path / "cache", encoded)


def test_a_killed_process_leaves_no_cache(tmp_path):
    blocks = [*line_blocks(20), LineBlock("f.jsonl", [(77, "out of memory")]), *line_blocks(40)]
    with (
        WorkerPool(encode_block, 2) as pool,
        pytest.raises(OSError, match=r"one of 2 worker processes was killed.*--num_proc"),
    ):
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
