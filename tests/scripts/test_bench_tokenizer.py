"""The tokenizer benchmark: counts of held-out rows, and the files that it reads."""

import base64
import json

import pytest
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from scripts import bench
from scripts.benchmarks.tokenizer import load_tokenizer
from tests.helpers.bench import read_table, run_bench
from trainer.runtime.arguments import ROOT

MODEL = ROOT / "model"
TEXTS = ["中文和 English 12 words, it's fine.\n\n  x", "plain old text", "😀 e\u0301"]


@pytest.fixture
def rows(tmp_path):
    texts = [f"{i} 这是第{i}行。" for i in range(99)] + ["A held-out English row: 3,000 bytes? No."]
    texts[49] = "留下来测量的一行。"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def gpt2_folder(tmp_path, vocab_name, merges_name):
    vocab = {letter: byte for byte, letter in bytes_to_unicode().items()} | {"pl": 256, "pla": 257}
    (tmp_path / vocab_name).write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / merges_name).write_text("#version: 0.2\np l\npl a\n", encoding="utf-8")
    return tmp_path


def test_held_out_rows(rows, tmp_path, capsys):
    folder = gpt2_folder(tmp_path, "encoder.json", "vocab.bpe")
    words = f"tokenizer --data_path {rows} --tokenizer bytes={folder}"
    found = {(row["tokenizer"], row["language"]): row for row in run_bench(tmp_path, words)["rows"]}
    assert set(found) == {(name, lang) for name in ("minimind", "bytes") for lang in ("zh", "en")}
    counts = {"rows": 1, "characters": 9, "bytes": 27, "tokens": 27}
    ratios = {"characters_per_token": 1 / 3, "bytes_per_token": 1.0}
    names = {"tokenizer": "bytes", "entries": 258, "language": "zh"}
    assert found["bytes", "zh"] == names | counts | ratios
    ours = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokens = len(ours.encode("A held-out English row: 3,000 bytes? No.").ids)
    assert found["minimind", "en"]["tokens"] == tokens
    first = {row["tokenizer"]: row for row in read_table(capsys.readouterr().out)}["minimind"]
    assert first["entries"] == "6,400" and first["characters per token"] == f"{40 / tokens:#.3g}"


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files(tmp_path, names):
    tokenizer = load_tokenizer(str(gpt2_folder(tmp_path, *names)))
    assert tokenizer.encode("plan").ids == [257, 110]
    assert tokenizer.encode(" 中").ids == [32, *"中".encode()]


def test_ranks_give_the_ids_of_the_tokenizer_that_they_were_taken_from(tmp_path):
    """Our own vocabulary, written as a .tiktoken file and read back, encodes every text alike."""
    ours = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    lines = []
    for word, token in sorted(
        ours.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]
    ):
        if token >= 32:
            lines.append(
                f"{base64.b64encode(bytes(byte_of[letter] for letter in word)).decode()} {token}\n"
            )
    (tmp_path / "a.tiktoken").write_text("".join(lines), encoding="ascii")
    again = load_tokenizer(str(tmp_path / "a.tiktoken"))
    for text in [
        *TEXTS,
        (MODEL / "chat_template.jinja").read_text(encoding="utf-8").replace("<", "["),
    ]:
        assert again.encode(text).ids == ours.encode(text).ids


def test_tokenizer_json_and_its_folder():
    for path in (MODEL, MODEL / "tokenizer.json"):
        assert load_tokenizer(str(path)).get_vocab_size() == 6400


def test_errors(rows, tmp_path, capsys):
    with pytest.raises(
        ValueError,
        match=r"none: no tokenizer\. Give a tokenizer\.json, a \.tiktoken file, or a folder",
    ):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(SystemExit):
        bench.main(["tokenizer", "--data_path", rows, "--tokenizer", "a.json"])
    assert (
        "--tokenizer a.json has no name: give NAME=PATH, such as gpt2=a.json"
        in capsys.readouterr().err
    )
