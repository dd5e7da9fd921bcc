import json
import subprocess
import sys

import pytest

from dataset import inspect_rows
from tests.helpers.rows import chat, write


def test_rows_are_shown_with_what_is_trained(sft, tokenizer, capsys):
    inspect_rows.show_rows(sft([chat("你好吗？", "很好🙂。"), chat()]), tokenizer, 1)
    shown = capsys.readouterr().out
    assert (
        "<|im_start|>user\n你好吗？<|im_end|>\n<|im_start|>assistant\n⟦很好🙂。<|im_end|>⟧\n"
        in shown
    )
    assert "sequence 1" not in shown and "2 read, 2 used" in shown and "% padding" in shown


def test_colour_is_for_terminals(sft, tokenizer, capsys, monkeypatch):
    dataset = sft([chat()])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    inspect_rows.show_rows(dataset, tokenizer, 1)
    assert "\033[32m4.<|im_end|>\033[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    inspect_rows.show_rows(dataset, tokenizer, 1)
    assert "\033" not in capsys.readouterr().out


def test_the_command_inspects_a_file(tmp_path, capsys):
    for rows, mark in (
        ([chat()], "⟦4.<|im_end|>⟧"),
        ([{"text": "hi"}], "<|endoftext|>⟦hi<|endoftext|>⟧"),
    ):
        path = write(tmp_path / "rows.jsonl", rows)
        inspect_rows.main(
            [
                "--inspect",
                str(path),
                "--cache_dir",
                str(tmp_path / "cache"),
                "--json",
                str(tmp_path / "new" / "figures.json"),
            ]
        )
        assert mark in capsys.readouterr().out
        assert json.loads((tmp_path / "new" / "figures.json").read_text())["rows_read"] == 1
    write(path, [{"text": "hi"}, {"text": None}])
    with pytest.raises(SystemExit, match=r'^error: .*rows\.jsonl:2: "text" is of type'):
        inspect_rows.main(["--inspect", str(path), "--cache_dir", str(tmp_path / "cache")])


def test_the_stage_is_guessed_from_the_first_row(tmp_path, capsys):
    def shown(rows, *flags):
        path = write(tmp_path / "rows.jsonl", rows)
        inspect_rows.main(["--inspect", str(path), "--cache_dir", str(tmp_path / "c"), *flags])
        return capsys.readouterr().out

    pair = {"chosen": chat("q", "a")["conversations"], "rejected": chat("q", "b")["conversations"]}
    assert "⟦a<|im_end|>⟧" in shown([pair])
    prompts = shown([{"question": "2 + 2?", "answer": "4"}])
    assert prompts.startswith("--- prompt") and '{"question": "2 + 2?", "answer": "4"}' in prompts
    with pytest.raises(SystemExit, match=r"rows.jsonl:1: no stage reads .*prepare_data.py convert"):
        shown([{"messages": chat()["conversations"]}])
    (tmp_path / "bytes.jsonl").write_bytes(b'\xff\n{"text": "hi"}\n')
    inspect_rows.main(["--inspect", str(tmp_path / "bytes.jsonl"), "--bad_rows", "skip"])
    out = capsys.readouterr().out
    assert "⟦hi<|endoftext|>⟧" in out and "bytes.jsonl:1 (not UTF-8 (byte 0xff, column 1))" in out


def test_special_tokens_in_texts_are_named(tmp_path, capsys):
    for rows in ([{"text": "a <s> b"}], [chat("q", "<|im_start|>a")]):
        path = write(tmp_path / "rows.jsonl", rows)
        inspect_rows.main(["--inspect", str(path), "--cache_dir", str(tmp_path / "cache")])
        assert "special tokens spelled in a text, learned as text: " in capsys.readouterr().out


def test_no_script_of_the_data_waits_for_heavy_libraries():
    code = (
        "import sys\n"
        "from dataset import inspect_rows, lora_examples, prepare_data, prompt_dataset, toy_world\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'pandas', 'jinja2'}\n"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=inspect_rows.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
