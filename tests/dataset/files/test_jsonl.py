import gzip
import lzma
from pathlib import Path

import pytest

from dataset.files.jsonl import (
    find_shards,
    in_fraction,
    iter_lines,
    parse_row,
    read_rows,
    split_fraction,
)

ROWS = [{"text": "one\u2028still one\x85\x0b\x0c"}, {"text": "二"}, {"text": ""}]
RAW = (
    '{"text": "one\u2028still one\x85\\u000b\\u000c"}\n\n  \n{"text": "二"}\r\n{"text": ""}'
).encode()


@pytest.mark.parametrize(
    ("name", "opener"), [("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.jsonl.xz", lzma.open)]
)
def test_rows_of_every_kind_of_file(tmp_path, name, opener):
    with opener(tmp_path / name, "wb") as file:
        file.write(RAW)
    # Blank lines are passed over but counted; only "\n" ends a line, with or without "\r" before
    # it.
    assert list(read_rows(tmp_path / name)) == [(1, ROWS[0]), (4, ROWS[1]), (5, ROWS[2])]
    assert [line_no for line_no, _ in iter_lines(str(tmp_path / name))] == [1, 4, 5]
    assert list(iter_lines(tmp_path / name))[1] == (4, '{"text": "二"}')


def test_byte_order_mark_at_the_start_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert list(read_rows(tmp_path / "a.jsonl")) == [(1, {"text": "a"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{",
            "not JSON (Expecting property name enclosed in double quotes, column 2). Put one JSON "
            "object on each line.",
        ),
        (
            "[1]",
            "a list, not an object. `python dataset/prepare_data.py convert` makes lines of its "
            "objects.",
        ),
        ('"text"', "a str, not an object. Each line must be a JSON object in braces."),
        ("null", "a NoneType, not an object. Each line must be a JSON object in braces."),
        (
            r'{"text": "\ud83d"}',
            r"half of a surrogate pair (\ud800-\udfff). Remove or repair that character.",
        ),
        (
            r'{"text": ["\uDC00"]}',
            r"half of a surrogate pair (\ud800-\udfff). Remove or repair that character.",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    with pytest.raises(ValueError) as caught:
        parse_row(line)
    assert str(caught.value) == message
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n", encoding="utf-8")
    rows = read_rows(path)
    assert next(rows) == (1, {"text": "good"})
    with pytest.raises(ValueError) as caught:
        next(rows)
    assert str(caught.value) == f"{path}:3: {message}"


def test_deep_nesting_is_a_bad_row():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_row('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


def test_whole_surrogate_pairs_and_escaped_backslashes_are_text():
    assert parse_row(r'{"text": "\ud83d\ude00 \\ud83d"}') == {"text": "😀 \\ud83d"}


def test_bad_files_are_named(tmp_path):
    def error(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            list(iter_lines(tmp_path / name))
        return str(caught.value).removeprefix(str(tmp_path / name))

    assert (
        error("none.jsonl") == ": no such file. Check the path, or make or download the data first."
    )
    assert (
        error("a.txt", b"{}")
        == ": unknown file type. Give a file that ends in .jsonl, .jsonl.gz or .jsonl.xz; make "
        f"one: python dataset/prepare_data.py convert {tmp_path / 'a.txt'} --out rows.jsonl"
    )
    assert (
        error("b.jsonl", b"") == ": the file is empty. Give a file with one JSON object per line."
    )
    assert (
        error("c.jsonl", b"\n \n")
        == ": the file is empty. Give a file with one JSON object per line."
    )
    assert (
        error("d.jsonl.gz", gzip.compress(b""))
        == ": the file is empty. Give a file with one JSON object per line."
    )
    for name, content in (
        ("f.jsonl.gz", b"{}\n"),
        ("g.jsonl.xz", b"{}\n"),
        ("h.jsonl.gz", gzip.compress(RAW)[:-9]),
        ("i.jsonl.xz", lzma.compress(RAW)[:-20]),
    ):
        assert ": damaged archive (" in error(name, content)
        assert error(name).endswith("). Fetch or compress it again.")


def test_a_byte_that_is_not_utf8_spoils_its_row_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xc3\xa9\xff"}\n{"a": 3}\n')
    lines = [line for _, line in iter_lines(path)]
    assert parse_row(lines[0]) == {"a": 1} and parse_row(lines[2]) == {"a": 3}
    message = (
        r":2: not UTF-8 \(byte 0xff, column 9\)\. Repair the line, or convert the file to UTF-8"
    )
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))


def test_missing_numbers_are_null():
    assert parse_row('{"a": NaN, "b": -Infinity}') == {"a": None, "b": None}


def test_a_missing_file_is_reported_before_the_first_row_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")


def test_split_fraction():
    assert split_fraction("a/b.jsonl@0.4") == ("a/b.jsonl", 0.4)
    assert split_fraction("a@2/b.jsonl") == ("a@2/b.jsonl", 1.0)
    assert split_fraction("me@home.jsonl") == ("me@home.jsonl", 1.0)
    assert split_fraction("a.jsonl@1") == ("a.jsonl", 1.0)
    for fraction in ("0", "1.5", "-0.1", ".", "1e"):
        with pytest.raises(
            ValueError,
            match=r"is no fraction of rows\. Give a number above 0 .* as in a\.jsonl@0\.4",
        ):
            split_fraction(f"a.jsonl@{fraction}")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for name in (
        "b.jsonl.xz",
        "a.jsonl",
        "c.jsonl.gz",
        "README.md",
        ".hidden.jsonl",
        "a.jsonl.tmp",
        "sub/d.jsonl",
    ):
        (folder / name).write_bytes(b"{}")
    return folder


def test_folders_and_globs_stand_for_their_shards(corpus):
    def names(*entries):
        return [
            (str(Path(path).relative_to(corpus)), share)
            for path, share in find_shards(list(entries))
        ]

    whole = [("a.jsonl", 1.0), ("b.jsonl.xz", 1.0), ("c.jsonl.gz", 1.0)]
    assert names(corpus) == names(f"{corpus}/") == names(f"{corpus}/?.json*[lz]") == whole
    assert names(f"{corpus}/[bc]*@0.4") == [("b.jsonl.xz", 0.4), ("c.jsonl.gz", 0.4)]
    assert names(f"{corpus}@0.5", corpus / "sub") == [
        *((name, 0.5) for name, _ in whole),
        ("sub/d.jsonl", 1.0),
    ]
    assert [name for name, _ in names(f"{corpus}/**/*.jsonl")] == ["a.jsonl", "sub/d.jsonl"]
    assert (
        find_shards(corpus / "a.jsonl")
        == find_shards(str(corpus / "a.jsonl"))
        == [(str(corpus / "a.jsonl"), 1.0)]
    )


def test_a_file_with_the_characters_of_a_glob_in_its_name_is_itself(tmp_path):
    path = tmp_path / "part[1].jsonl"
    path.write_text("{}")
    assert find_shards(f"{path}@0.3") == [(str(path), 0.3)]


def test_paths_without_data_are_named(corpus):
    (corpus / "empty").mkdir()
    for entry, message in (
        (corpus / "empty", r"empty: a folder without .* glob such as '.*empty/\*/\*\.jsonl'"),
        (f"{corpus}/*.json", r"\*\.json: no file matches\. Check the pattern"),
        (f"{corpus}/*.md", r"README\.md: unknown file type\. Give a file that ends in \.jsonl"),
        (corpus / "z.jsonl", r"z\.jsonl: no such file"),
        ([], "data_path is empty"),
        (f"{corpus}/none", "none: no such file"),
        (f"{corpus}@2", "2 is no fraction"),
    ):
        with pytest.raises(ValueError, match=message):
            find_shards(entry)


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.4, 0.5])
def test_a_fraction_is_even_and_keeps_step_with_no_other_rule(fraction):
    kept = [line_no for line_no in range(1, 10_001) if in_fraction(line_no, fraction)]
    assert abs(len(kept) - fraction * 10_000) <= 3
    assert abs(sum(line_no <= 5_000 for line_no in kept) - fraction * 5_000) <= 3
    assert abs(sum(line_no % 50 == 0 for line_no in kept) - fraction * 200) <= 4
    assert all(in_fraction(line_no, 1.0) for line_no in range(1, 100))
