"""The rows that adapters are trained with: held-out phrasings, keywords that tell right answers,
advice that names a doctor.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dataset.files.jsonl import in_fraction
from dataset.lm_dataset import SFTDataset
from dataset.lora_examples import TOPICS, keyword_questions, main
from dataset.toy.scorer import score

ROOT = Path(__file__).resolve().parents[2]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row):
    return row["conversations"][0]["content"]


def reply(row):
    return row["conversations"][-1]["content"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    main(["--out_dir", str(folder), "--json", str(folder / "counts.json")])
    return folder


def test_the_files_are_complete_and_the_same_each_time(folder, tmp_path, capsys):
    counts = json.loads((folder / "counts.json").read_text())
    assert (
        {name: len(rows(folder / name)) for name in counts}
        == counts
        == {
            "identity_train.jsonl": 296,
            "identity_heldout.jsonl": 54,
            "medical_train.jsonl": 560,
            "medical_heldout.jsonl": 84,
        }
    )
    main(["--out_dir", str(tmp_path)])
    assert "medical_train.jsonl: 560 rows" in capsys.readouterr().out
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in counts)


@pytest.mark.parametrize("example", ["identity", "medical"])
def test_held_out_are_phrasings_of_what_is_trained(example, folder):
    train, heldout = (rows(folder / f"{example}_{split}.jsonl") for split in ("train", "heldout"))
    assert len({question(row) for row in train + heldout}) == len(train + heldout)
    trained, held = (
        Counter((row["topic"], row["language"], reply(row)) for row in part)
        for part in (train, heldout)
    )
    assert held.keys() <= trained.keys() and min(trained.values()) >= 5
    assert (
        {row["language"] for row in train} == {row["language"] for row in heldout} == {"en", "zh"}
    )
    if example == "medical":
        assert (
            len(rows(TOPICS)) == 42 and set(held.values()) == {1} and held.keys() == trained.keys()
        )


@pytest.mark.parametrize("example", ["identity", "medical"])
def test_the_keyword_tells_right_answers_from_those_to_other_questions(example, folder):
    train = rows(folder / f"{example}_train.jsonl")
    questions = keyword_questions(folder / f"{example}_train.jsonl")
    assert [one.messages for one in questions] == [row["conversations"][:1] for row in train]
    answers = {(row["topic"], row["language"]): reply(row) for row in train}
    for row, one in zip(train, questions):
        assert score(one, reply(row)) and not score(one, "")
        others = [
            text
            for (topic, language), text in answers.items()
            if language == row["language"] and topic != row["topic"]
        ]
        if example == "medical":
            assert not any(score(one, text) for text in others), (row["keyword"], row["topic"])
        else:
            # the name and the maker are in several answers, but not in those that the network gave
            # before
            assert not score(
                one, "I am MiniMind, a small language model. 我是 MiniMind，一个小小的语言模型。"
            )


def test_advice_always_says_when_to_see_a_doctor():
    for topic in rows(TOPICS):
        english, chinese = topic["answer"]
        assert (
            "See a doctor" in english and "医" in chinese.rpartition("。")[0].rpartition("。")[2]
        ), topic
        assert len(english) < 180 and len(chinese) < 70


def test_the_name_and_the_maker_are_those_that_were_asked_for(tmp_path, folder):
    main(["--out_dir", str(tmp_path), "--name", "Luna", "--maker", "the Moonlight Lab"])
    for split in ("train", "heldout"):
        ours, usual = (rows(one / f"identity_{split}.jsonl") for one in (tmp_path, folder))
        assert [question(row) for row in ours] == [
            question(row) for row in usual
        ]  # the split does not depend on the names
        assert all("Luna" in reply(row) or "the Moonlight Lab" in reply(row) for row in ours)
        assert not any("Nova" in json.dumps(row) or "Harbor" in json.dumps(row) for row in ours)


def test_the_stage_reads_them_whole(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    for example in ("identity", "medical"):
        dataset = SFTDataset(
            folder / f"{example}_train.jsonl", tokenizer, 256, cache_dir=tmp_path, num_proc=1
        )
        assert len(dataset) == len(rows(folder / f"{example}_train.jsonl")) and "0 cut" in str(
            dataset.report
        )


def test_a_share_of_a_file_has_the_questions_of_that_share(folder):
    path = folder / "medical_train.jsonl"
    chosen = [one for line, one in enumerate(keyword_questions(path), 1) if in_fraction(line, 0.1)]
    assert keyword_questions(f"{path}@0.1") == chosen and len(chosen) == 56


def test_rows_without_a_keyword_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(
        "".join(
            json.dumps({"conversations": turns, **more}) + "\n" for more in ({"keyword": "b"}, {})
        )
    )
    with pytest.raises(ValueError, match=r'rows\.jsonl:2: no "conversations" with a "keyword"'):
        keyword_questions(path)
