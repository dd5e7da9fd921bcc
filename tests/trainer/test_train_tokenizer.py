"""Training the tokenizer: the same bytes each time, a working folder, mistakes."""

import json
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dataset.files.jsonl import read_rows
from dataset.tokenizer_texts import cut_long_words, is_held_out, num_bytes
from tests.helpers.bilingual import EN, ZH, write_corpus, write_texts
from trainer import train_tokenizer
from trainer.train_tokenizer import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path)


def run(corpus, save_dir, *flags):
    main(["--data_path", *corpus, "--save_dir", str(save_dir), "--vocab_size", "380", *flags])
    return (save_dir / "tokenizer.json").read_bytes()


def test_same_text_and_seed_give_the_same_file(corpus, tmp_path):
    first = run(corpus, tmp_path / "a", "--sample_mb", "0.05")
    assert run(corpus, tmp_path / "b", "--sample_mb", "0.05") == first
    assert run(corpus, tmp_path / "c", "--sample_mb", "0.05", "--seed", "1") != first


def test_same_file_from_another_process_with_other_hashes_and_threads(corpus, tmp_path):
    flags = ["--data_path", *corpus, "--save_dir", str(tmp_path / "b"), "--vocab_size", "380"]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": "5",
    }
    command = [sys.executable, str(ROOT / "trainer" / "train_tokenizer.py"), *flags]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == run(corpus, tmp_path / "a")


def test_result_is_a_working_folder(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "a", "--json", str(tmp_path / "metrics.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(tokenizer) == 380
    assert tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>", "</think>", "<|reserved_22|>"]
    ) == [0, 2, 8, 31]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 0, None)
    text = ZH.format(12) + EN.format(34) + "😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(ZH)) < 40 < num_bytes(ZH)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    ).startswith("<|im_start|>user")

    shipped = json.loads((ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    trained = json.loads((tmp_path / "a" / "tokenizer.json").read_text(encoding="utf-8"))
    assert {key: trained[key] for key in trained if key != "model"} == {
        key: shipped[key] for key in shipped if key != "model"
    }
    settings = (tmp_path / "a" / "tokenizer_config.json").read_bytes()
    assert settings == (ROOT / "model" / "tokenizer_config.json").read_bytes()

    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    held_out = [EN.format(i) * 8 for i in range(250) if (i + 1) % 50 == 0]
    assert metrics["vocab_size"] == 380
    assert metrics["held_out"]["en"] == {
        "rows": 5,
        "characters": sum(map(len, held_out)),
        "bytes": sum(map(num_bytes, held_out)),
        "tokens": sum(len(tokenizer.encode(text)) for text in held_out),
    }
    assert "held out, en: 5 rows, " in capsys.readouterr().out


def test_small_text_gives_fewer_entries_and_says_so(tmp_path, capsys):
    path = write_texts(tmp_path / "a.jsonl", ["aa bb"])
    main(["--data_path", path, "--save_dir", str(tmp_path / "t")])
    assert (
        "warning: --vocab_size 6400 not reached: the text has no pairs left to join after 29"
        in capsys.readouterr().out
    )
    assert 288 < Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json")).get_vocab_size() < 300


def test_errors_name_the_row_and_the_fix(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r'b\.jsonl:2: neither "text" nor "conversations"\. Give one of the two'
    ):
        main(["--data_path", str(tmp_path / "b.jsonl"), "--save_dir", str(tmp_path)])
    path = write_texts(tmp_path / "c.jsonl", ["a" * 1000])
    with pytest.raises(
        ValueError,
        match=r"no text to train on in .*c\.jsonl\. Give more data or a larger --sample_mb",
    ):
        main(["--data_path", path, "--save_dir", str(tmp_path), "--sample_mb", "1e-9"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--vocab_size", "287"],
            "--vocab_size 287: give room for 32 added tokens and 256 bytes, 288",
        ),
        (["--sample_mb", "0"], "--sample_mb 0.0: give more than 0"),
    ],
)
def test_flags_out_of_range_are_refused_before_any_file_is_read(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--data_path", "none.jsonl", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_shipped_tokenizer_on_real_held_out_text():
    """Characters per token of the shipped file, with room for another corpus alone: zh over 1.4, en
    over 2.7.
    """
    corpora = ROOT.parent / "shared" / "data" / "pretrain"
    if not corpora.is_dir():
        pytest.skip("the real corpora are not here")
    tokenizer = Tokenizer.from_file(str(ROOT / "model" / "tokenizer.json"))
    for name, floor in (("pt_zh_lctt_tech", 1.4), ("pt_en_wiki", 2.7)):
        lines = islice(read_rows(corpora / f"{name}.jsonl.xz"), 1000)
        rows = [row["text"] for line_no, row in lines if is_held_out(line_no)]
        assert all(
            tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
            for text in rows
        )
        assert sum(map(len, rows)) / sum(len(tokenizer.encode(text).ids) for text in rows) > floor


# --- words without end ---


def test_words_of_200_000_letters_are_learned_from_in_pieces(tmp_path, monkeypatch):
    """As one word, a row of one letter took 45 seconds: each join moves the rest of the word."""
    rng, longest = random.Random(0), []

    def spy(texts):
        pieces = list(cut_long_words(texts))
        longest.append(max(map(len, pieces)))
        return pieces

    monkeypatch.setattr(train_tokenizer, "cut_long_words", spy)
    words = [
        "a" * 200_000,
        "你" * 200_000,
        "".join(rng.choices("abcdefgh", k=200_000)),
        "=" * 10**5,
    ]
    write_texts(tmp_path / "long.jsonl", words)
    content = json.loads(run([str(tmp_path / "long.jsonl")], tmp_path / "a"))
    assert longest == [512] and "aaaaaaaa" in content["model"]["vocab"]


def test_ordinary_text_is_not_cut(corpus, tmp_path, monkeypatch):
    """The same bytes as from the texts themselves."""
    first = run(corpus, tmp_path / "a")
    monkeypatch.setattr(train_tokenizer, "cut_long_words", iter)
    assert run(corpus, tmp_path / "b") == first
