"""The texts for a tokenizer: rows, languages, held-out lines, a balanced sample."""

import pytest
from tokenizers import Regex, pre_tokenizers

from dataset.tokenizer_texts import (
    cut_long_words,
    is_held_out,
    iter_texts,
    language,
    num_bytes,
    row_text,
    sample_texts,
)
from tests.helpers.bilingual import ZH, write_corpus
from trainer.train_tokenizer import QWEN2_PATTERN


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path)


def test_sample_is_balanced_by_bytes_and_never_holds_held_out_rows(corpus):
    texts, used = sample_texts(corpus, 100.0)
    assert used["zh"] == sum(num_bytes(ZH.format(i) * 3) for i in range(200) if (i + 1) % 50), (
        "the scarce one is used whole"
    )
    assert abs(used["en"] / used["zh"] - 1) < 0.25
    held_out = {text for _, _, text in iter_texts(corpus, held_out=True)}
    assert len(held_out) == 4 + 5
    assert not held_out & set(texts)

    texts, used = sample_texts(corpus, 100.0, "none")
    assert len(texts) == 450 - 9
    _, half = sample_texts(corpus, used.total() / 2e6, "none")
    assert abs(half.total() / used.total() - 0.5) < 0.1


def test_a_fraction_of_a_file(corpus):
    texts = [text for _, _, text in iter_texts([corpus[1] + "@0.4"])]
    assert abs(len(texts) - 0.4 * 245) <= 3


def test_one_language_alone_is_used_whole(corpus):
    texts, used = sample_texts(corpus[:1], 100.0)
    assert len(texts) == 196 and set(used) == {"zh"}


def test_row_text():
    assert row_text({"text": "a\nb"}) == "a\nb"
    messages = [
        {"role": "system", "content": "s", "tools": "[1]"},
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "r",
            "tool_calls": [{"name": "查"}],
        },
    ]
    assert row_text({"conversations": messages}) == '[1]\ns\nu\nr\n[{"name": "查"}]'
    for bad in ({}, {"text": None}, {"conversations": "a"}, {"conversations": ["a"]}):
        with pytest.raises(ValueError, match="neither"):
            row_text(bad)


def test_language():
    assert language("用 Linux 的 grep 命令搜索") == "zh"
    assert language("The character 中 means middle.") == "en"
    assert language("𠀀𠀁") == "zh"
    assert language("") == "en"


def test_held_out_rows():
    assert [line_no for line_no in range(1, 151) if is_held_out(line_no)] == [50, 100, 150]


def test_only_words_of_more_than_512_characters_are_cut():
    pattern = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    for letter in ("a", "你", "-", "_", "é", "ก", "\u0301", " ", "\n", "😀"):
        for count in (511, 512):
            text = f"so 2{letter * count}1 end"
            assert list(cut_long_words([text])) == [text]
        text = f"one two 2{letter * 1500}3 end."
        parts = list(cut_long_words(["before", text, ""]))
        assert len(parts) == 2 + 3 and "".join(parts) == f"before{text}"
        words = [word for part in parts for word, _ in pattern.pre_tokenize_str(part)]
        assert max(map(len, words)) <= 513  # a space may begin a word
    digits = "7" * 2000  # each is a word
    assert list(cut_long_words([digits])) == [digits]
    mixed = "ab " * 3000 + "你好，" * 3000 + "x1" * 3000
    assert list(cut_long_words([mixed])) == [mixed]
