"""The tokenizer that the repository ships: exact round trips, ids that never move, and how it
loads.
"""

import json
import random
import unicodedata

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.helpers.checkpoints import ROOT

MODEL = ROOT / "model"
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|>".split()
NORMAL = "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>".split()
ADDED = [*SPECIAL, *NORMAL, *(f"<|reserved_{i}|>" for i in range(23))]
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PRE_TOKENIZERS = [
    dict(type="Split", pattern={"Regex": QWEN2_PATTERN}, behavior="Isolated", invert=False),
    dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False),
]


@pytest.fixture(scope="module")
def raw():
    return json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))


def assert_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text, ascii(text[:80])


def test_added_tokens_keep_their_ids(tokenizer, raw):
    assert tokenizer.convert_tokens_to_ids(ADDED) == list(range(32))
    assert [token["content"] for token in raw["added_tokens"]] == ADDED
    assert [token["content"] for token in raw["added_tokens"] if not token["special"]] == NORMAL
    for token in raw["added_tokens"]:
        assert not any(token[name] for name in ("normalized", "lstrip", "rstrip", "single_word"))
        assert tokenizer.encode(f"a{token['content']}b").count(token["id"]) == 1
    text = "a<think>b</think><tool_call>c</tool_call><tool_response>d</tool_response>"
    ids = tokenizer.encode(f"<|im_start|>{text}<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_vocabulary(tokenizer, raw):
    assert len(tokenizer) == tokenizer.vocab_size == len(raw["model"]["vocab"]) == 6400
    assert sorted(raw["model"]["vocab"].values()) == list(range(6400))
    assert len(raw["model"]["merges"]) == 6400 - 32 - 256
    assert not set(ADDED) & {"".join(merge) for merge in raw["model"]["merges"]}


def test_settings(tokenizer, raw):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.bos_token is None
    assert tokenizer.unk_token is None
    assert tokenizer.model_max_length == 32768
    assert tokenizer.clean_up_tokenization_spaces is False
    assert raw["normalizer"] is None
    assert raw["model"]["byte_fallback"] is False


def test_text_is_cut_exactly_as_qwen2_cuts_it(raw):
    """llama.cpp knows this pre-tokenizer by the name "qwen2"; any other pattern would need code of
    its own there.
    """
    assert raw["pre_tokenizer"] == dict(type="Sequence", pretokenizers=QWEN2_PRE_TOKENIZERS)
    assert raw["decoder"]["type"] == raw["post_processor"]["type"] == "ByteLevel"


def test_nothing_is_added_around_text(tokenizer):
    assert tokenizer.encode("") == []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer("a")["input_ids"] == plain == tokenizer.encode("a")


def test_every_byte_is_an_entry(tokenizer):
    single = [tokenizer.decode([token]) for token in range(32, 288)]
    assert sum(len(text) == 1 and text < "\x80" for text in single) == 128
    assert single.count("\ufffd") == 128  # the upper half of the bytes is no text by itself


@pytest.mark.parametrize("plane", range(17))
def test_round_trip_of_every_plane_of_unicode(tokenizer, plane):
    """Every character of the plane, alone among neighbours: assigned, private use, unassigned and
    noncharacters.
    """
    codes = [code for code in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(codes), 4096):
        assert_round_trip(tokenizer, "".join(map(chr, codes[start : start + 4096])))
    random.Random(plane).shuffle(codes)
    for start in range(0, 8192, 4096):
        assert_round_trip(tokenizer, "".join(map(chr, codes[start : start + 4096])))


def test_round_trip_of_assigned_characters_one_by_one(tokenizer):
    chars = map(chr, range(0x110000))
    assigned = [char for char in chars if unicodedata.category(char) not in ("Cn", "Cs", "Co")]
    for char in assigned[::37]:
        assert_round_trip(tokenizer, char)


def test_round_trip_of_random_strings(tokenizer):
    rng = random.Random(0)
    kinds = [(0, 0x80), (0x80, 0x800), (0x2000, 0x2070), (0x4E00, 0xA000)]
    kinds += [(0x1F300, 0x1FB00), (0x20000, 0x20400)]
    for _ in range(500):
        spans = [rng.choice(kinds) for _ in range(rng.randint(1, 40))]
        assert_round_trip(tokenizer, "".join(chr(rng.randrange(*span)) for span in spans))


SPACES = ["", " ", "  ", "\n", "\r\n", "\t\t x", " \n \n ", "\u2028\u2029\x85\x0b\x0c"]
TRICKY = ["e\u0301 \u00e9", "\u212b \u00c5 \ufb01"]
TRICKY += ["한글 한", "👩‍👩‍👧‍👦🏽🇨🇳", "‮abc‬", "Z̷̢a̸l̶g̵o̶"]
TRICKY += ["it's I'LL ſ K", "a  b   c    d", "１２３ ⅷ ²³ ௧௨", "don 't . ,"]
TRICKY += ["\x00", "\ufeffa", "\ufffd", "\ud7ff\ue000\uffff\U0010ffff"]


@pytest.mark.parametrize("text", SPACES + TRICKY)
def test_round_trip_of_tricky_strings(tokenizer, text):
    assert_round_trip(tokenizer, text)
    assert_round_trip(tokenizer, f"前{text}后")
    assert_round_trip(tokenizer, text * 3)


def test_digits_stand_alone(tokenizer, raw):
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2026")] == ["2", "0", "2", "6"]
    for text in ("x=1234567890;", "第12章 3.14%", "0x1F 007"):
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert all(len(piece) == 1 for piece in pieces if any(map(str.isdigit, piece)))
    longer = [word for word in raw["model"]["vocab"] if len(word) > 1 and word not in ADDED]
    assert not [word for word in longer if set(word) & set("0123456789")]


def test_chinese_and_english_are_both_served(tokenizer):
    """Well under one token per byte, the floor that a wrong or empty merge table would fall to."""
    chinese = "中国的历史非常悠久，人们在这里生活了几千年。"
    english = "The history of the country is very long, and people have lived here for ages."
    assert len(tokenizer.encode(chinese)) < 22 and len(tokenizer.encode(english)) < 26


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "qwen3_moe", "qwen2_moe"])
def test_it_loads_the_same_with_any_architecture_and_after_saving(tokenizer, tmp_path, model_type):
    """AutoTokenizer may prefer a class named for the architecture; that class would bring its own
    rules.
    """
    text = "e\u0301 12 中文 <think>\n it's   \n\n"
    tokenizer.save_pretrained(tmp_path)
    template = (MODEL / "chat_template.jinja").read_text(encoding="utf-8")
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == template
    if model_type:
        config = {"model_type": model_type, "vocab_size": 6400}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert again.chat_template == tokenizer.chat_template == template
    assert (again.eos_token_id, again.pad_token_id, again.bos_token_id) == (2, 0, None)
    special = [token.special for _, token in sorted(again.added_tokens_decoder.items())]
    assert special == [not 3 <= token <= 8 for token in range(32)]


def test_the_raw_file_gives_the_same_ids_without_transformers(tokenizer):
    alone = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = "<|im_start|>user\n你好, world 2026<|im_end|>\n"
    assert alone.encode(text).ids == tokenizer.encode(text)
    assert alone.decode(alone.encode(text).ids, skip_special_tokens=False) == text
