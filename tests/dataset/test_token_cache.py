"""The token cache: built once, whole or not at all, the same with one process and with several."""

import errno
import os

import numpy as np
import pytest

from dataset import token_cache
from dataset.token_cache import EncodedBlock, LineBlock, Report, TokenTable, encode_blocks, open_or_build


def encode_block(block: LineBlock) -> EncodedBlock:
    """Encode each line as its characters' codes. Here at the top, where worker processes find it."""
    parts = [np.array([ord(char) for char in line], dtype=np.uint16) for _, line in block.lines]
    if any(line == "bad" for _, line in block.lines):
        raise ValueError(f"{block.path}:{block.lines[0][0]}: bad line. Mend it.")
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    report = Report(rows_read=len(parts), rows_used=len(parts), sequences=len(parts), tokens=len(ids))
    documents = np.array([line_no for line_no, _ in block.lines], dtype=np.uint64)
    return EncodedBlock({"input_ids": ids}, lengths, documents, report)


def line_blocks(count, start=0):
    return [LineBlock("f.jsonl", 0, [(i, "x" * (i % 5 + 1)), (i, f"line {i}")]) for i in range(start, start + count)]


def encoded(count=3):
    return [encode_block(block) for block in line_blocks(count)]


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
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


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
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_build_that_is_stopped_leaves_nothing(tmp_path, error):
    def blocks():
        yield from encoded(2)
        raise error

    with pytest.raises(error):
        open_or_build(tmp_path / "cache", blocks)
    assert list(tmp_path.iterdir()) == []
    assert len(open_or_build(tmp_path / "cache", encoded)) == 6


def test_two_builders_at_once_share_one_result(tmp_path):
    folder = tmp_path / "cache"

    def blocks_of_the_slower():
        yield from encoded(2)
        open_or_build(folder, encoded)  # the faster one finishes while this one is still at work
        yield encode_block(line_blocks(1, start=2)[0])

    table = open_or_build(folder, blocks_of_the_slower)
    assert texts(table) == texts(TokenTable(folder)) and len(table) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_blocks_without_a_sequence_are_no_trouble(tmp_path):
    empty = encode_block(LineBlock("f.jsonl", 0, []))
    table = open_or_build(tmp_path / "cache", lambda: [empty, *encoded(1), empty])
    assert texts(table) == ["x", "line 0"]


def test_nothing_to_train_on_is_an_error_with_the_report(tmp_path):
    empty = encode_block(LineBlock("f.jsonl", 0, []))
    empty.report.note("no_target", "f.jsonl:7")
    with pytest.raises(ValueError, match=r"no sequence to train on.*\n.*\n.*\nno target: f.jsonl:7"):
        open_or_build(tmp_path / "cache", lambda: [empty])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the library `datasets`.*pip install"):
        open_or_build(tmp_path / "cache", encoded)


def test_two_processes_give_what_one_gives():
    blocks = line_blocks(40)
    alone = list(encode_blocks(encode_block, blocks, num_proc=1))
    together = list(encode_blocks(encode_block, blocks, num_proc=2))
    assert len(alone) == len(together) == 40
    for a, b in zip(alone, together, strict=True):
        assert a.columns["input_ids"].tolist() == b.columns["input_ids"].tolist()
        assert (a.lengths.tolist(), a.documents.tolist(), a.report) == (b.lengths.tolist(), b.documents.tolist(), b.report)


def test_an_error_in_a_process_reaches_the_user():
    blocks = [*line_blocks(20), LineBlock("f.jsonl", 0, [(77, "bad")]), *line_blocks(5)]
    with pytest.raises(ValueError, match=r"f\.jsonl:77: bad line\. Mend it\."):
        list(encode_blocks(encode_block, blocks, num_proc=2))


def test_a_small_file_starts_no_process(monkeypatch):
    monkeypatch.setattr(token_cache, "ProcessPoolExecutor", None)
    assert len(list(encode_blocks(encode_block, line_blocks(token_cache.SERIAL_BLOCKS), num_proc=2))) == 8


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
