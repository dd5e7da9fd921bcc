import json
import random
import unicodedata

import numpy as np
import pytest

from dataset.prepare import contamination
from dataset.prepare import near_duplicates as near
from dataset.prepare.cleaning import (
    Limits,
    judge,
    normalize_row,
    normalize_text,
    repeated_lines,
    repeated_ngrams,
    row_answers,
    row_text,
    text_key,
    top_ngram,
)
from dataset.prepare.contamination import build_index
from dataset.prepare.text_tokens import tokenize

CHINESE = (
    "昨天傍晚我们沿着河边散步，看见几只白鹭停在浅滩上，"
    "远处的山慢慢变成了蓝色，孩子们还在桥上追着风筝跑。"
)
ENGLISH = (
    "Yesterday evening we walked along the river and saw some egrets on the shallow bank "
    "while the hills turned blue."
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a\r\nb\rc\u2028d\x85e", "a\nb\nc\nd\ne"),
        ("a\x00b\u200bc\ufeffd\xade\x9f", "abcde"),
        ("e\u0301", "é"),
        ("（全角）！，１²ﬁ", "（全角）！，１²ﬁ"),  # NFKC would change all of these
        (
            "👩\u200d👩\u200d👧 می\u200cخواهم",
            "👩\u200d👩\u200d👧 می\u200cخواهم",
        ),  # joiners are spelling
        ("tab\tand\nline　全角空格", "tab\tand\nline　全角空格"),
    ],
)
def test_normal_form(raw, clean):
    assert normalize_text(raw) == clean
    assert normalize_text(clean) == clean


def test_every_character_is_normalised_as_the_rules_say():
    for code in (*range(0x3000), *range(0xFE00, 0x10000), 0x1F600, 0x2F800):
        char = chr(code)
        if 0xD800 <= code < 0xE000:
            continue
        out = normalize_text(char)
        if unicodedata.category(char) == "Cc" and char not in "\t\n":
            assert out in ("", "\n"), hex(code)
        elif char not in "\u200b\u2060\ufeff\xad\u2028\u2029":
            assert out == unicodedata.normalize("NFC", char), hex(code)


def test_all_strings_of_a_row_are_normalised():
    row = {
        "conversations": [{"role": "user", "content": "a\r\n", "n": 3}],
        "gt": ["x\x00"],
        "k\r": None,
    }
    assert normalize_row(row) == {
        "conversations": [{"role": "user", "content": "a\n", "n": 3}],
        "gt": ["x"],
        "k\r": None,
    }


def test_text_of_rows():
    chat = [
        {"role": "system", "content": "S", "tools": [{"name": "t"}]},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
    ]
    assert row_text({"text": "one", "id": "row 17"}) == "one"
    assert row_text({"conversations": chat}) == 'S\n{"name": "t"}\nQ\nA\nR'.replace(
        '{"name": "t"}', '[{"name": "t"}]'
    )
    assert (
        row_text(
            {
                "chosen": [chat[1], {"role": "assistant", "content": "good"}],
                "rejected": [chat[1], {"role": "assistant", "content": "bad"}],
            }
        )
        == "Q\ngood\nbad"
    )
    assert (
        row_text({"question": "Q", "answer": "4"}) == "Q\n4"
    )  # of another form: all strings, not the answer alone
    assert row_answers({"conversations": chat, "answer": "4"}) == ("A\nR\n4", "")
    assert row_answers({"chosen": chat, "rejected": [chat[1], {"content": "no"}]}) == ("A\nR", "no")
    assert row_answers({"text": "one"}) == ("", "")


def test_exact_duplicates_but_for_case_and_spaces():
    assert text_key("One  two\n") == text_key("one two") != text_key("one, two")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CHINESE, ""),
        (ENGLISH, ""),
        ("太短了", "too_short"),
        (CHINESE * 100, "too_long"),
        (CHINESE + "\ufffd", "replacement_characters"),
        ("1 + 2 = 3; " * 20, "few_letters"),
        ("\n".join([ENGLISH, *["Click here to read more"] * 9]), "repeated_lines"),
        ("".join(f"{word}买卖手机" for word in CHINESE) * 2, "top_ngram"),
        (" ".join(f"{i} {ENGLISH}" for i in range(1, 9)), "repeated_ngrams"),
    ],
)
def test_filters_on_running_text(text, reason):
    limits = Limits(max_chars=3000)
    assert judge(
        [CHINESE, text, ENGLISH], np.array([True] * 3), tokenize([CHINESE, text, ENGLISH]), limits
    ) == ["", reason, ""]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 10) for b in range(1, 10)),
        "列出\n" + "| 名 | 值 |\n|---|---|\n" * 12,
        "是的",
        f"{CHINESE}{ENGLISH}\n" * 3,
    ],
)
def test_conversations_may_list_and_repeat(text):
    assert judge([text], np.array([False]), tokenize([text]), Limits()) == [""]


def test_a_loop_is_dropped_from_conversations_too():
    text = "好的，我知道了，" * 200
    assert judge([text], np.array([False]), tokenize([text]), Limits()) == ["repeated_ngrams"]


def tokens_of(text):
    """The tokens of a text, one character at a time."""
    out, word = [], ""
    for char in [*text.lower(), " "]:
        if "\u4e00" <= char <= "\u9fff":
            out, word = [*out, *([word] if word else []), char], ""
        elif char.isalnum():
            word += char
        else:
            out, word = [*out, *([word] if word else [])], ""
    return out


def some_texts(count=40, seed=0):
    draw = random.Random(seed)
    pool = [*CHINESE, *ENGLISH.split(" "), "a", "a", "b", "17", ",", "。", " "]
    return [
        "".join(draw.choice(["", " "]) + draw.choice(pool) for _ in range(draw.randrange(0, 200)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_ngrams_equal_those_counted_one_by_one(n):
    texts = some_texts()
    tokens = tokenize(texts)
    hashes, first = tokens.ngrams(n, whole=True)
    names = {}
    for i, text in enumerate(texts):
        words = tokens_of(text)
        grams = [
            tuple(words[j : j + n]) for j in range(max(len(words) - n + 1, min(len(words), 1)))
        ]
        assert (tokens.text[first] == i).sum() == len(grams)
        for name, value in zip(grams, hashes[tokens.text[first] == i].tolist(), strict=True):
            assert names.setdefault(name, value) == value
    assert len(set(names.values())) == len(names)


def test_repetition_equals_what_is_counted_one_by_one():
    texts = [*some_texts(20), "a b c d " * 9, "", "x"]
    tokens = tokenize(texts)
    tops, repeats = top_ngram(tokens, 4), repeated_ngrams(tokens, 3, np.zeros(len(texts)))
    for text, top, repeated in zip(texts, tops, repeats, strict=True):
        words = tokens_of(text)
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        assert top == max(map(grams.count, grams), default=0)
        covered = {
            i + k
            for i in range(len(words) - 2)
            for k in range(3)
            if any(words[i : i + 3] == words[j : j + 3] for j in range(i))
        }
        assert repeated == len(covered)
    assert repeated_lines("same\n" * 20) > 0.9 and repeated_lines("a\na") == 0


def test_a_batch_gives_what_each_text_gives_alone():
    texts = [*some_texts(10), ""]
    together = near.signatures(tokenize(texts))
    for text, signature in zip(texts, together, strict=True):
        assert (near.signatures(tokenize([text]))[0] == signature).all()


def test_signatures_estimate_the_jaccard_similarity():
    draw = random.Random(1)
    words = [f"w{i}" for i in range(3000)]
    errors = []
    for _ in range(60):
        left = draw.choices(words, k=300)
        right = [draw.choice(words) if draw.random() < 0.03 else word for word in left]
        grams = [
            {tuple(side[i : i + near.SHINGLE]) for i in range(len(side) - near.SHINGLE + 1)}
            for side in (left, right)
        ]
        exact = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
        a, b = near.signatures(tokenize([" ".join(left), " ".join(right)]))
        errors.append(((a == b).mean() - exact) / np.sqrt(exact * (1 - exact) / near.NUM_HASHES))
    assert (
        abs(np.mean(errors)) < 4 / np.sqrt(60) and 0.6 < np.std(errors) < 1.4
    )  # unbiased, with the binomial's spread


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands, rows = near.bands_for(threshold)
    assert bands * rows <= near.NUM_HASHES
    assert 1 - (1 - threshold**rows) ** bands >= near.RECALL
    assert (
        rows == near.NUM_HASHES
        or 1 - (1 - threshold ** (rows + 1)) ** (near.NUM_HASHES // (rows + 1)) < near.RECALL
    )


def test_clusters_are_found_through_others_and_stand_for_their_first():
    parents = near.Parents(8)
    parents.link(np.array([6, 5, 2]), np.array([5, 2, 7]))
    parents.link(np.array([4]), np.array([3]))
    assert parents.roots().tolist() == [0, 1, 2, 3, 3, 2, 2, 2]


def test_only_those_of_a_bucket_that_are_alike_are_linked():
    wide, answers = near.NUM_HASHES, near.ANSWER_HASHES
    signature = np.zeros((6, wide + 2 * answers), np.uint32)
    signature[1, : wide // 4] = 1  # 75% like row 0
    signature[2, : wide // 8] = 1  # 87.5% like rows 0 and 1
    signature[4, wide : wide + answers // 2] = 1  # one answer differs
    signature[5, wide + answers :] = 1  # the other one
    parents = near.Parents(6)
    near.link_buckets(np.array([0, 1, 3, 4, 5]), np.array([0]), signature, 0.8, parents)
    assert parents.roots().tolist() == [0, 1, 2, 0, 4, 5]
    near.link_buckets(
        np.array([1, 2, 0, 5]), np.array([0, 2]), signature, 0.8, parents
    )  # two buckets at once
    assert parents.roots().tolist() == [0, 1, 1, 0, 4, 5]
    members, starts = near.buckets(np.array([7, 3, 7, 9, 3, 7, 1], np.uint64))
    assert members.tolist() == [1, 4, 0, 2, 5] and starts.tolist() == [0, 2]


def test_a_bucket_of_many_kinds_takes_no_comparison_of_all_pairs(monkeypatch):
    draw, rows = np.random.default_rng(0), 1000
    signature = np.zeros(
        (rows + 100, near.NUM_HASHES + 2 * near.ANSWER_HASHES), np.uint32
    )  # all share a long prompt
    signature[:rows, near.NUM_HASHES :] = draw.integers(
        1 << 32, size=(rows, 2 * near.ANSWER_HASHES)
    )
    signature[rows:] = signature[:100]
    signature[rows:, near.NUM_HASHES + 2 : near.NUM_HASHES + 9] = (
        1  # the first answer is changed a little
    )
    compared, alike, parents = [], near.alike, near.Parents(rows + 100)
    monkeypatch.setattr(near, "alike", lambda *args: compared.append(len(args[1])) or alike(*args))
    near.link_buckets(np.arange(rows + 100), np.array([0]), signature, 0.8, parents)
    assert parents.roots().tolist() == [*range(rows), *range(100)]
    assert sum(compared) < 2 * near.ROUNDS * rows


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_a_bucket_is_split_until_nothing_is_left(threshold, monkeypatch):
    monkeypatch.setattr(near, "ROUNDS", 1)
    signature = np.zeros((near.NUM_HASHES, near.NUM_HASHES + 2 * near.ANSWER_HASHES), np.uint32)
    np.fill_diagonal(signature, 1)  # every text differs from every other in two minima
    parents = near.Parents(len(signature))
    near.link_buckets(np.arange(len(signature)), np.array([0]), signature, threshold, parents)
    assert parents.roots().tolist() == (
        [0] * len(signature) if threshold < 1 else [*range(len(signature))]
    )


def test_no_text_makes_no_bucket():
    members, starts = near.buckets(np.zeros(0, np.uint64))
    assert len(members) == len(starts) == 0


def test_different_numbers_keep_rows_apart_where_they_matter():
    tokens = tokenize(["卖掉3个，又买5个", "卖掉5个，又买3个。", "卖掉4个，又买5个", "没有"])
    numbers = near.number_hashes(tokens)
    assert numbers[0] == numbers[1] and len(set(numbers.tolist())) == 3


@pytest.mark.parametrize("rows_at_a_time", [10_000, 2])
def test_evaluation_files_are_found_in_rows(tmp_path, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(contamination, "ROWS_AT_A_TIME", rows_at_a_time)
    question = (
        "How many of the forty seven grey herons that nest beside the old mill return every "
        "year in spring?"
    )
    rows = [
        f'{{"question": "{question}", "subject": "{ENGLISH}"}}',
        f'{{"问": "{CHINESE}"}}',
        '{"q": "Too short."}',
        '{"q": "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53"}',
    ]
    phrase = (
        "Which one of the following four statements about the long and rich history of {} is true?"
    )
    rows += [f'{{"q": "{phrase.format(x)}"}}' for x in ("Rome", "Oslo", "Lima")]
    (tmp_path / "test.jsonl").write_text("\n".join(rows), encoding="utf-8")
    index = build_index([str(tmp_path / "test.jsonl")])
    texts = [
        "",
        "He asked: how many of the FORTY-seven grey herons that nest beside the old mill return?",
        ENGLISH,
        "他写道：" + CHINESE[5:40],
        CHINESE[:15],
        "2 3 5 7 11 13 17 19 23 29 31 37 41 43 47 53",
        phrase.format("my town"),
    ]
    found = index.find(tokenize(texts))
    assert [index.places[i] if i >= 0 else "" for i in found] == [
        "",
        "test.jsonl:1",
        "",
        "test.jsonl:2",
        "",
        "",
        "",
    ]
    assert index.short == 2


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("file_form", ["NFC", "NFD"])
def test_evaluation_files_are_brought_into_the_form_of_the_rows(tmp_path, form, file_form):
    question = (
        "Où est-ce que l'élève âgé a déposé la clé dorée du château près de la forêt "
        "enchantée hier?"
    )
    row = {"question": unicodedata.normalize(file_form, question.replace(" clé", "\u200b clé"))}
    (tmp_path / "test.jsonl").write_text(json.dumps(row), encoding="utf-8")
    index = build_index([str(tmp_path / "test.jsonl")], form)
    assert index.find(tokenize([normalize_text(question, form), ENGLISH])).tolist() == [0, -1]


def test_evaluation_files_do_not_hide_each_other(tmp_path):
    rows = {
        "a": [{"q": ENGLISH}],
        "copy": [{"q": ENGLISH}],
        "steps": [{"q": ENGLISH, "a": "Let us think."}],
        "same": [
            {"q": CHINESE},
            {"q": f" {CHINESE}", "subject": "birds"},
            {"q": CHINESE},
            {"q": CHINESE},
        ],
    }
    for name, items in rows.items():
        text = "\n".join(json.dumps(row) for row in items)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    index = build_index([str(tmp_path / f"{name}.jsonl") for name in rows])
    assert [index.places[i] for i in index.find(tokenize([ENGLISH, CHINESE]))] == [
        "a.jsonl:1",
        "same.jsonl:1",
    ]
    assert len(index.places) == 4 and index.short == 0


def test_phrasing_is_that_of_each_evaluation_file_alone(tmp_path):
    phrase = (
        "Which one of the following four statements about the long and rich history of {} is true?"
    )
    files = {"few": ["Rome", "Oslo"], "many": ["Lima", "Cairo", "Delhi"]}
    for name, places in files.items():
        text = "\n".join(json.dumps({"q": phrase.format(place)}) for place in places)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    few, many = (str(tmp_path / f"{name}.jsonl") for name in files)
    text = tokenize([phrase.format("my town")])
    for paths, found in (([few], 0), ([many], -1), ([many, few], 3), ([few, many], 0)):
        assert build_index(paths).find(text).tolist() == [found]


def test_evaluation_files_of_short_items_find_nothing(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"q": "2 + 2"}\n{"q": "2 + 3"}\n', encoding="utf-8")
    index = build_index([str(tmp_path / "test.jsonl")])
    assert index.short == 2 and index.find(tokenize([ENGLISH, "2 + 2"])).tolist() == [-1, -1]
