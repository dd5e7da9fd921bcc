import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.files import processes
from dataset.files.jsonl import read_rows
from dataset.prepare import clean_corpus, clean_ray, near_duplicates, verdicts
from dataset.prepare.clean_corpus import clean
from dataset.prepare.verdicts import CleanOptions
from dataset.prepare_data import ROOT, main
from tests.helpers import fake_ray

WORDS = (
    "river stone morning letter garden window yellow quiet summer bridge market forest candle "
    "silver harbor mirror"
).split()


def sentence(draw, count=60):
    return " ".join(draw.choice(WORDS) + str(draw.randrange(100)) for _ in range(count))


def chat(question, answer):
    return {
        "conversations": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def corpus(tmp_path):
    """Two files with 30 good rows and one row or more of every kind that must go; (paths, line ->
    reason).
    """
    draw = random.Random(0)
    good = [{"text": sentence(draw)} for _ in range(30)]
    question, passage = sentence(draw, 20), sentence(draw, 200)
    words = good[3]["text"].split()
    words[30] = "altogether"
    first = [
        *good,
        {"text": "short"},
        {"text": good[5]["text"].upper() + "\r\n"},
        chat(question, "yes"),
        chat(question, "yes"),
    ]
    second = [
        {"text": " ".join(words)},
        {"text": f"It says: {draw.choice(WORDS)} " + WORDS_EVAL + " and more of that kind."},
        chat(f"{passage}\nWho?", "The baker did it."),
        chat(f"{passage}\nWhen?", "In the year of the comet."),
        chat("1 + 2 = ?" + question, "3"),
        chat("1 + 3 = ?" + question, "3"),
    ]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    paths[0].write_text(
        "".join(json.dumps(row) + "\n\n" for row in first) + "{bad\n", encoding="utf-8"
    )
    with gzip.open(paths[1], "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in second)
    (tmp_path / "eval.jsonl").write_text(
        json.dumps({"question": WORDS_EVAL, "subject": "x"}) + "\n", encoding="utf-8"
    )
    reasons = {
        "a.jsonl:61": "too_short",
        "a.jsonl:63": "exact_duplicate",
        "a.jsonl:67": "exact_duplicate",
        "a.jsonl:69": "bad_row",
        "b.jsonl.gz:1": "near_duplicate",
        "b.jsonl.gz:2": "contaminated",
    }
    return [str(path) for path in paths], reasons


WORDS_EVAL = (
    "Which bridge over the northern river did the silver merchant cross before the summer "
    "market opened?"
)


def run(*argv):
    main([str(arg) for arg in argv])


def test_clean_says_what_went_and_why(corpus, tmp_path, capsys):
    paths, reasons = corpus
    out, rejected, figures = (
        tmp_path / "out.jsonl",
        tmp_path / "rejected.jsonl",
        tmp_path / "figures.json",
    )
    run(
        "clean",
        *paths,
        "--out",
        out,
        "--rejected",
        rejected,
        "--eval",
        tmp_path / "eval.jsonl",
        "--json",
        figures,
    )
    entries = [row for _, row in read_rows(rejected)]
    assert {entry["where"].split()[0]: entry["reason"] for entry in entries} == reasons
    places = {entry["where"].split()[0]: entry["where"] for entry in entries}
    assert places["b.jsonl.gz:1"].endswith("repeats a.jsonl:7") and places["a.jsonl:63"].endswith(
        "repeats a.jsonl:11"
    )
    assert (
        "shares text with eval.jsonl:1" in places["b.jsonl.gz:2"]
        and "not JSON" in places["a.jsonl:69"]
    )
    kept = [row for _, row in read_rows(out)]
    originals = [
        json.loads(line)
        for path in paths
        for line in (gzip.open(path, "rt") if path.endswith("gz") else open(path))
        .read()
        .split("\n")
        if line and line != "{bad"
    ]
    dropped = [entry["row"] for entry in entries if entry["reason"] != "bad_row"]
    assert kept == [row for i, row in enumerate(originals) if i == 32 or row not in dropped]
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert report["rows_read"] == 41 and report["rows_kept"] == 35 == len(kept)
    assert (
        sum(reason["bytes"] for reason in report["dropped"].values()) + report["bytes_kept"]
        == report["bytes_read"]
    )
    assert report["evaluation_items"] == 1
    shown = capsys.readouterr().out
    assert "| near_duplicate | 1 |" in shown and "b.jsonl.gz:1 repeats a.jsonl:7" in shown


def test_evaluation_items_are_found_in_the_form_that_is_asked_for(tmp_path):
    text = (
        "Où est-ce que l'élève âgé a déposé la clé dorée du château près de la forêt enchantée "
        "hier?"
    )
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": text}) + "\n" + json.dumps({"text": WORDS_EVAL}), encoding="utf-8"
    )
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": text}), encoding="utf-8")
    run(
        "clean",
        tmp_path / "a.jsonl",
        "--out",
        tmp_path / "out.jsonl",
        "--eval",
        tmp_path / "eval.jsonl",
        "--form",
        "NFD",
    )
    assert [row for _, row in read_rows(tmp_path / "out.jsonl")] == [{"text": WORDS_EVAL}]


def test_near_copies_are_found_under_one_long_system_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "ROUNDS", 2)  # so that few rows are many
    draw = random.Random(0)
    system = {"role": "system", "content": sentence(draw, 600)}
    rows = [chat(sentence(draw, 15), sentence(draw, 15)) for _ in range(100)]
    copies = [
        chat(row["conversations"][0]["content"] + " please", row["conversations"][1]["content"])
        for row in rows[:25]
    ]
    lines = [
        json.dumps({"conversations": [system, *row["conversations"]]}) + "\n"
        for row in rows + copies
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    report = clean(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "out.jsonl"), CleanOptions(), num_proc=1
    )
    assert report.dropped["near_duplicate"]["rows"] == 25
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "".join(lines[:100])


def test_a_file_of_which_nothing_stays(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n', encoding="utf-8")
    run("clean", tmp_path / "a.jsonl", "--out", tmp_path / "out.jsonl")
    assert (
        tmp_path / "out.jsonl"
    ).read_bytes() == b"" and "| kept | 0 |" in capsys.readouterr().out


def test_the_number_of_processes_changes_nothing(corpus, tmp_path, monkeypatch):
    paths, _ = corpus
    monkeypatch.setattr(verdicts, "BLOCK_CHARS", 2000)
    monkeypatch.setattr(processes, "SERIAL_ITEMS", 1)
    outputs = []
    for count in (1, 2):
        clean(
            paths,
            str(tmp_path / "out.jsonl"),
            CleanOptions(),
            rejected=str(tmp_path / "rejected.jsonl"),
            num_proc=count,
        )
        outputs.append([(tmp_path / name).read_bytes() for name in ("out.jsonl", "rejected.jsonl")])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--exact", "no", "--threshold", "0"], {"exact_duplicate", "near_duplicate"}),
        (["--threshold", "0"], {"near_duplicate"}),
        (["--threshold", "1"], {"near_duplicate"}),
        (["--min_chars", "0"], {"too_short"}),
    ],
)
def test_what_is_switched_off_stays(corpus, tmp_path, options, kept):
    paths, reasons = corpus
    run(
        "clean",
        *paths,
        "--out",
        tmp_path / "out.jsonl",
        "--rejected",
        tmp_path / "rejected.jsonl",
        *options,
    )
    found = {row["reason"] for _, row in read_rows(tmp_path / "rejected.jsonl")}
    assert found == set(reasons.values()) - kept - {"contaminated"}


def test_clean_rows_stay_letter_for_letter_and_others_are_normalised(tmp_path):
    clean_line = '{ "text" : "\\u4e2d\\u6587 spacing and escapes stay as they are", "n": 1.50 }'
    other_line = '{"text": "carriage\\r\\nreturn and e\\u0301 go, 留下中文"}'
    (tmp_path / "a.jsonl").write_text(f"{clean_line}\n{other_line}\n", encoding="utf-8")
    run("clean", tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl.xz")
    import lzma

    lines = lzma.open(tmp_path / "b.jsonl.xz", "rt", encoding="utf-8").read().split("\n")
    assert lines == [clean_line, '{"text": "carriage\\nreturn and é go, 留下中文"}', ""]


def test_nothing_is_left_behind_after_an_error(corpus, tmp_path, monkeypatch):
    paths, _ = corpus
    monkeypatch.setattr(
        clean_corpus, "write_kept", lambda *args: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError):
        clean(paths, str(tmp_path / "out" / "out.jsonl"), CleanOptions())
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["clean", "none.jsonl", "--out", "o.jsonl"], "none.jsonl: no such file"),
        (["clean", "{a}", "--out", "o.txt"], "o.txt: unknown file type"),
        (["clean", "{a}", "--out", "{a}"], "a.jsonl is one of the files to read"),
        (
            ["clean", "{a}", "--out", "o.jsonl", "--rejected", "{a}"],
            "--rejected {a} is one of the files to read",
        ),
        (
            ["clean", "{a}", "--out", "o.jsonl", "--rejected", "./o.jsonl"],
            "./o.jsonl is the file of --out",
        ),
        (["clean", "{a}", "--out", "{a}/o.jsonl"], "File exists: '{a}'"),
        (["convert", "{a}", "--out", "{a}"], "--out {a} is one of the files to read"),
        (
            ["clean", "{a}", "--out", "o.jsonl", "--threshold", "0.1"],
            "--threshold 0.1: give a similarity",
        ),
        (
            ["clean", "{a}", "--out", "o.jsonl", "--threshold", "0", "--numbers", "yes"],
            "--numbers yes: it is for near-duplicates",
        ),
        (
            ["convert", "{a}", "--out", "o.jsonl", "--split", "lines"],
            "--split lines: it is for .txt files, and none is given",
        ),
        (
            ["clean", "{a}", "--out", "o.jsonl", "--min_letters", "2"],
            "--min_letters 2.0: give a ratio",
        ),
        (["clean", "{a}", "--out", "o.jsonl", "--num_proc", "-1"], "--num_proc -1"),
        (["clean", "alpaca.json", "--out", "o.jsonl"], "convert alpaca.json --out alpaca.jsonl"),
        (["clean", "{a}@0.5", "--out", "o.jsonl"], "clean the whole file"),
        (["convert", "{a}", "--out", "o.jsonl"], "a.jsonl:69: not JSON"),
        (["download", "a", "b", "--sha256", "0"], "--sha256 is for one file, 2 are named"),
    ],
)
def test_mistakes_end_with_one_line(corpus, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*(arg.replace("{a}", corpus[0][0]) for arg in argv))
    said = str(caught.value)
    assert (
        said.startswith("error: ")
        and message.replace("{a}", corpus[0][0]) in said
        and "\n" not in said
    )
    assert not (tmp_path / "o.jsonl").exists()


def test_rows_that_no_stage_reads_go(tmp_path, capsys):
    good = [
        {"text": "A sentence that is long enough to stay."},
        chat("Who was it?", "The baker."),
        {
            "chosen": chat("Q", "good")["conversations"],
            "rejected": chat("Q", "bad")["conversations"],
        },
    ]
    bad = [
        {"foo": "A sentence that is long enough, but where?"},
        {"text": ["A list of sentences, long enough."]},
        {"chosen": good[2]["chosen"]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, *bad]))
    run("clean", tmp_path / "a.jsonl", "--out", tmp_path / "o.jsonl")
    assert [row for _, row in read_rows(tmp_path / "o.jsonl")] == good
    shown = capsys.readouterr().out
    assert (
        "| bad_row | 3 |" in shown
        and "a.jsonl:4 no stage reads a row with the keys ['foo']" in shown
    )


def test_convert_then_clean_as_a_user(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([{"instruction": "Say hi", "output": "hi"}] * 2), encoding="utf-8"
    )
    command = [sys.executable, str(ROOT / "dataset" / "prepare_data.py")]
    for argv in (
        ["convert", "a.json", "--out", "b.jsonl", "--json", "f.json"],
        ["clean", "b.jsonl", "--out", "c.jsonl"],
    ):
        subprocess.run([*command, *argv], cwd=tmp_path, check=True, capture_output=True)
    assert [row for _, row in read_rows(tmp_path / "c.jsonl")] == [chat("Say hi", "hi")]
    assert json.loads((tmp_path / "f.json").read_text())["formats"] == {"alpaca": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json",
        "b.jsonl",
        "c.jsonl",
        "f.json",
    ]


ROWS = ['{"text": "one two three four five six"}\n', '{"text": "seven eight nine ten eleven"}\n']


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        (ROWS[:1], "a.jsonl: the file has lost rows"),
        (ROWS * 2, "a.jsonl:3: the file has changed"),
        ([ROWS[0], ROWS[1].replace("ten", "10")], "a.jsonl:2: the file has changed"),
    ],
)
def test_a_file_that_changes_meanwhile_is_named(tmp_path, monkeypatch, changed, where):
    def judge_and_change(*args):
        verdicts = judge(*args)
        path.write_text("".join(changed), encoding="utf-8")
        return verdicts

    path, judge = tmp_path / "a.jsonl", clean_corpus.judge_locally
    path.write_text("".join(ROWS), encoding="utf-8")
    monkeypatch.setattr(clean_corpus, "judge_locally", judge_and_change)
    with pytest.raises(ValueError, match=where):
        clean([str(path)], str(tmp_path / "out.jsonl"), CleanOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_without_ray_the_message_says_what_to_install(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"pip install 'ray\[data\]'"):
        run("clean", corpus[0][0], "--out", tmp_path / "o.jsonl", "--engine", "ray")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "o"))] == []


@pytest.mark.parametrize(
    "options", [[], ["--exact", "no"], ["--threshold", "0"], ["--min_chars", "10000"]]
)
def test_what_meets_on_a_cluster_is_judged_as_on_one_machine(
    corpus, tmp_path, monkeypatch, options
):
    fake_ray.install(monkeypatch)
    monkeypatch.setattr(clean_ray, "ROWS_PER_SHARD", 10)
    monkeypatch.setattr(verdicts, "BLOCK_CHARS", 2000)
    argv = ["clean", *corpus[0], "--eval", tmp_path / "eval.jsonl", "--num_proc", "1", *options]
    for engine in ("local", "ray"):
        run(
            *argv,
            "--engine",
            engine,
            "--out",
            tmp_path / f"{engine}.jsonl",
            "--rejected",
            tmp_path / f"{engine}_rejected.jsonl",
        )
    for name in ("", "_rejected"):
        assert (
            Path(tmp_path, f"ray{name}.jsonl").read_bytes()
            == Path(tmp_path, f"local{name}.jsonl").read_bytes()
        )


def test_a_cluster_keeps_the_same_rows(corpus, tmp_path):
    pytest.importorskip("ray.data", reason="Ray is optional: pip install 'ray[data]'")
    argv = ["clean", *corpus[0], "--eval", tmp_path / "eval.jsonl"]
    run(*argv, "--out", tmp_path / "local.jsonl", "--rejected", tmp_path / "local_rejected.jsonl")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from dataset.prepare_data import main; "
        "main(sys.argv[1:])"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            *map(str, argv),
            "--engine",
            "ray",
            "--out",
            str(tmp_path / "ray.jsonl"),
            "--rejected",
            str(tmp_path / "ray_rejected.jsonl"),
        ],
        check=True,
        capture_output=True,
    )
    for name in ("", "_rejected"):
        assert (
            Path(tmp_path, f"ray{name}.jsonl").read_bytes()
            == Path(tmp_path, f"local{name}.jsonl").read_bytes()
        )


def test_clean_drops_a_row_with_a_byte_that_is_not_utf8_and_names_it(tmp_path):
    path, out, rejected = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    good = json.dumps(
        {"text": "A text that is long enough to be kept by the rules of cleaning. " * 5}
    )
    path.write_bytes(good.encode() + b'\n{"text": "\xff"}\n')
    main(["clean", str(path), "--out", str(out), "--rejected", str(rejected), "--num_proc", "1"])
    assert out.read_text("utf-8") == good + "\n"
    (row,) = map(json.loads, rejected.read_text("utf-8").splitlines())
    assert row["reason"] == "bad_row" and "not UTF-8 (byte 0xff" in json.dumps(row)
