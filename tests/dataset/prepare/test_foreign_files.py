"""Rows of other kinds of file."""

import json

import pyarrow
import pytest
from pyarrow import parquet

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
        ("a.json", b'{"text": "T"}', "no list of objects"),
        ("a.json", b"[", "not JSON in UTF-8"),
        ("a.txt", b"one\n" + "中".encode("gbk"), r"a\.txt:2: not UTF-8"),
        ("a.csv", b"text\n\xff\xfe\n", r"a\.csv:2: not UTF-8"),
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
