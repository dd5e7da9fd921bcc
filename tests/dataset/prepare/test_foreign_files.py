"""Rows of other kinds of file."""

import gzip
import json
import lzma
import re

import pyarrow
import pytest
from pyarrow import parquet

from dataset.prepare.convert import convert
from dataset.prepare.foreign_files import read_any


def test_every_kind_of_file(tmp_path):
    rows = [{"instruction": "问\n一", "output": 'A, "b"'}, {"instruction": "Q2", "output": "二"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    (tmp_path / "a.csv").write_text(
        '\ufeffinstruction,output\n"问\n一","A, ""b"""\nQ2,二\n', encoding="utf-8"
    )
    (tmp_path / "a.tsv").write_text(
        'instruction\toutput\n"问\n一"\t"A, ""b"""\nQ2\t二\n', encoding="utf-8"
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, second in (("json", 2), ("jsonl", 2), ("csv", 4), ("tsv", 4), ("parquet", 2)):
        found = [
            (line_no, json.loads(row) if name == "jsonl" else row)
            for line_no, row in read_any(tmp_path / f"a.{name}")
        ]
        assert found[1] == (second, rows[1]) and found[0][1] == rows[0], name


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n\n \nthree\n", encoding="utf-8")
    assert list(read_any(tmp_path / "a.txt")) == [(1, {"text": "one\ntwo"}), (5, {"text": "three"})]
    assert [row["text"] for _, row in read_any(tmp_path / "a.txt", "lines")] == [
        "one",
        "two",
        "three",
    ]
    assert [row["text"] for _, row in read_any(tmp_path / "a.txt", "file")] == [
        "one\ntwo\n\n \nthree\n"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"data": ["T"]}', "no list of objects"),
        ("a.json", b"[", "not JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{"train": [{}], "test": [{}]}', "several lists, train, test"),
        ("a.json.gz", gzip.compress(b"[1, 2, 3]" * 99, mtime=0)[:-9], "damaged archive"),
        ("a.jsonl.xz", b"no archive", "damaged archive"),
        ("a.csv", b'text\ngood\n"never closed\nand so on\n', r"a\.csv:3: no row of a table"),
        ("a.parquet", b"PAR1", "damaged Parquet file"),
        ("a.doc", b"x", "unknown file type"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_any(tmp_path / name))
    with pytest.raises(ValueError, match="no such file"):
        read_any(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n'),
        ("a.json", b'{"text": "good"}\n{"text": "\xff"}\n'),
        ("list.json", b'[{"text": "good"}, {"text": "\xff"}]'),
        ("a.txt", b"good\n\n\xff"),
        ("a.csv", b"text\ngood\n\xff\n"),
    ],
)
def test_a_row_with_a_byte_that_is_not_utf8_is_named_and_can_be_skipped(tmp_path, name, content):
    path, out = tmp_path / name, tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}:\d: not UTF-8 \(byte 0xff"):
        convert([path], out)
    report = convert([path], out, bad_rows="skip")
    assert (report.rows_written, report.rows_skipped) == (1, 1)
    assert re.search(rf"skipped .*{name}:\d: not UTF-8", str(report))
    assert out.read_text() == '{"text": "good"}\n'


ROW = {"instruction": "Q", "output": "A"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.jsonl", json.dumps([ROW, ROW])),
        ("lines.json", f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n"),
        ("wrapped.json", json.dumps({"version": 1, "data": [ROW, ROW]}, indent=1)),
        ("lines.jsonl.gz", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n"),
        ("list.json.gz", json.dumps([ROW, ROW])),
        ("table.csv.xz", "instruction,output\nQ,A\nQ,A\n"),
        ("upper.JSON", json.dumps({"data": [ROW, ROW]}, indent=1)),
        ("folder.tsv/a.csv", "instruction,output\nQ,A\nQ,A\n"),
        ("lines.gz", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n"),
    ],
)
def test_rows_are_found_in_whatever_holds_them(tmp_path, name, text):
    write = {".gz": gzip.open, ".xz": lzma.open}.get(f".{name.split('.')[-1]}", open)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    with write(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(text)
    rows = [row for _, row in read_any(tmp_path / name)]
    assert [json.loads(row) if isinstance(row, str) else row for row in rows] == [ROW, ROW]


def test_one_object_in_a_json_file_is_one_row(tmp_path):
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert [row for _, row in read_any(tmp_path / "a.json")] == [row]


def test_missing_cells_are_left_out(tmp_path):
    """pandas writes NaN, Parquet fills every struct with the fields of all others."""
    (tmp_path / "a.json").write_text('[{"instruction": "Q", "input": NaN, "output": "A"}]')
    assert next(iter(read_any(tmp_path / "a.json")))[1]["input"] is None
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "Q", "input": NaN, "output": "A", "system": NaN, "history": null}'
    )
    report = convert([tmp_path / "a.jsonl"], tmp_path / "out.jsonl")
    assert report.rows_written == 1
    table = pyarrow.table({"instruction": ["Q"], "input": [float("nan")], "output": ["A"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [row for _, row in read_any(tmp_path / "a.parquet")] == [ROW]
