"""The toy world: nothing held out leaks, every solution is right, and the scorer tells right from
wrong.
"""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dataset import toy_world
from dataset.toy.core import LEVELS, apply, is_heldout, op_key, split_of
from dataset.toy.facts import NAMES
from dataset.toy.measures import WEEKDAYS
from dataset.toy.numbers import work_out
from dataset.toy.rows import heldout_questions, question_of_item
from dataset.toy.scorer import ask, score
from dataset.toy.tools import SCHEMAS
from dataset.toy.world import make_world
from dataset.toy_world import write_world

EQUATION = re.compile(r"(?<![\d.])(\d+) ([-+×*]) (\d+) = (-?\d+)")


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "mini"
    assert write_world("mini", folder, 0)
    return folder


@pytest.fixture
def small(monkeypatch):
    """A level "mini" with a twentieth of the rows, for tests that write several worlds."""
    level = LEVELS["mini"]
    rows = {skill: n // 20 for skill, n in level.sft_rows.items()}
    extra = {stage: n // 20 for stage, n in level.extra_rows.items()}
    small = replace(level, pretrain_rows=level.pretrain_rows // 20, sft_rows=rows, extra_rows=extra)
    monkeypatch.setitem(LEVELS, "mini", small)


def rows_of(folder, stage, split):
    with open(folder / f"{stage}_{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train_text(folder):
    return "\n".join(
        path.read_text(encoding="utf-8") for path in sorted(folder.glob("*_train.jsonl"))
    )


def perfect(item):
    """A generate() that knows an item's replies and calls its tools."""
    script = []
    for turn in item.turns:
        if turn.calls:
            blocks = (
                json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False)
                for c in turn.calls
            )
            script.append("\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks))
        script.append(turn.reply)
    return lambda messages, tools: script.pop(0)


def some_items(level, split, count=30):
    world = make_world(level, 0)
    skills = [*world.level.sft_rows, "lora_identity", "lora_facts"]
    return [item for skill in skills for item in world.items("test", skill, split, count)]


# --- the files ---


def test_same_seed_same_bytes_other_seed_other_bytes(small, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        assert write_world("mini", tmp_path / name, seed)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        if path.name.endswith("_train.jsonl"):
            assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


def test_bytes_do_not_depend_on_the_hash_seed_of_the_process(small, tmp_path):
    world = make_world("mini", 0)
    code = (
        "from dataset.toy.rows import heldout_questions; "
        "from dataset.toy.world import make_world; "
        "print([q.answer for q in heldout_questions(make_world('mini', 0), 4)])"
    )
    root = Path(toy_world.__file__).parents[1]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == str([question.answer for question in heldout_questions(world, 4)])


def test_rerun_does_nothing_and_damage_is_repaired(small, tmp_path, capsys):
    folder = tmp_path / "w"
    toy_world.main(
        [
            "--level",
            "mini",
            "--out_dir",
            str(folder),
            "--json",
            str(tmp_path / "new" / "figures.json"),
        ]
    )
    assert "written" in capsys.readouterr().out
    assert (tmp_path / "new" / "figures.json").read_bytes() == (folder / "meta.json").read_bytes()
    before = (folder / "sft_train.jsonl").stat().st_mtime_ns
    toy_world.main(["--level", "mini", "--out_dir", str(folder)])
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "sft_train.jsonl").stat().st_mtime_ns == before
    (folder / "sft_train.jsonl").write_text("cut off")
    assert write_world("mini", folder, 0)
    assert (folder / "sft_train.jsonl").stat().st_size > 10_000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_world_of_other_generators_is_written_again(small, tmp_path, monkeypatch):
    assert write_world("mini", tmp_path / "w", 0) and not write_world("mini", tmp_path / "w", 0)
    monkeypatch.setattr(toy_world, "SOURCES", "of tomorrow")
    assert write_world("mini", tmp_path / "w", 0) and not write_world("mini", tmp_path / "w", 0)


def test_refuses_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="Choose another --out_dir"):
        write_world("mini", tmp_path, 0)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(world, folder):
        (folder / "half.jsonl").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(toy_world, "write_files", fail)
    with pytest.raises(OSError):
        write_world("mini", tmp_path / "w", 0)
    assert list(tmp_path.iterdir()) == []


def test_unknown_level_names_the_known_ones():
    with pytest.raises(ValueError, match="mini, full"):
        make_world("huge", 0)


def test_formats_of_all_rows(mini):
    meta = json.loads((mini / "meta.json").read_text())
    for stage in toy_world.STAGES:
        for split in toy_world.SPLITS:
            rows = rows_of(mini, stage, split)
            assert len(rows) == meta["files"][f"{stage}_{split}.jsonl"]["rows"] > 10
            for row in rows:
                check_row(stage, row)


@pytest.mark.parametrize("level", LEVELS)
def test_every_item_is_told_as_running_text_too(level):
    assert all(item.prose.strip() for item in some_items(level, "train", 60))


def check_row(stage, row):
    if stage == "pretrain":
        assert set(row) == {"text"} and row["text"].strip()
        return
    assert row["skill"] and row["language"] in ("zh", "en")
    for key in ("chosen", "rejected") if stage == "dpo" else ("conversations",):
        check_messages(row[key], ends_with="user" if stage in ("rl", "agent") else "assistant")
    if stage == "dpo":
        assert (
            row["chosen"][:-1] == row["rejected"][:-1] and row["chosen"][-1] != row["rejected"][-1]
        )
    if stage == "reason":
        assert row["conversations"][-1]["reasoning_content"].strip()
    if stage in ("rl", "agent"):
        assert isinstance(row["answer"], str) and row["answer"]
    if stage == "agent":
        assert row["gt"] and all(isinstance(value, str) for value in row["gt"]) and row["calls"]
        assert json.loads(row["conversations"][0]["tools"])


def check_messages(messages, ends_with):
    roles = [message["role"] for message in messages]
    assert (
        roles[-1] == ends_with
        and "user" in roles
        and set(roles) <= {"system", "user", "assistant", "tool"}
    )
    for before, message in pairwise(messages):
        assert not (before["role"] == "user" and message["role"] == "user")
        assert isinstance(message["content"], str) and (
            message["content"] or message.get("tool_calls")
        )
        if message["role"] == "tool":
            assert "error" not in json.loads(message["content"])
        for call in json.loads(message.get("tool_calls", "[]")):
            assert set(call) == {"name", "arguments"} and call["name"] in SCHEMAS


def test_both_languages_and_all_skills_in_every_split(mini):
    for split in toy_world.SPLITS:
        seen = {(row["skill"], row["language"]) for row in rows_of(mini, "sft", split)}
        joined = ["chat"] if split == "train" else []
        assert seen == {
            (skill, language)
            for skill in [*LEVELS["mini"].sft_rows, *joined]
            for language in ("zh", "en")
        }


# --- nothing leaks ---


def test_chats_join_whole_conversations(mini):
    chats = [
        row["conversations"] for row in rows_of(mini, "sft", "train") if row["skill"] == "chat"
    ]
    assert len(chats) > 100 and {len(messages) // 2 for messages in chats} >= {2, 3, 4}
    for messages in chats:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (
            len(messages) // 2
        )


@pytest.mark.parametrize("level", ["mini", "full"])
def test_no_key_is_shared_and_no_question_either(level):
    train, held = some_items(level, "train"), some_items(level, "heldout")
    assert {item.skill for item in held} == {item.skill for item in train}
    train_keys = {key for item in train for key in item.keys}
    for item in held:
        assert is_heldout(item.keys[0]) and item.keys[0] not in train_keys
    assert not any(is_heldout(key) for key in train_keys)
    questions = {tuple(turn.question for turn in item.turns) for item in train}
    assert not questions & {tuple(turn.question for turn in item.turns) for item in held}


def test_no_heldout_question_stands_in_any_training_file(mini):
    text = train_text(mini)
    questions = heldout_questions(make_world("mini", 0), 60) + heldout_questions(
        make_world("mini", 0), 60, part="lora"
    )
    for question in questions:
        last = question.follow_ups[-1] if question.follow_ups else question.messages[-1]["content"]
        if question.skill != "multi_turn":  # "And 4 more?" is a question only after another one
            asked = json.dumps(last, ensure_ascii=False)[:-1]
            assert not any(asked + end in text for end in ('"', " ", "\\")), question


def test_no_heldout_operands_in_any_equation_of_the_training_files(mini):
    found = EQUATION.findall(train_text(mini))
    assert len(found) > 5000
    for a, op, b, _ in found:
        assert not any(map(is_heldout, op_key(int(a), op.replace("*", "×"), int(b)))), (a, op, b)


def test_no_heldout_operands_in_any_arithmetic_question(mini):
    asked = [row for row in rows_of(mini, "sft", "heldout") if row["skill"] == "arithmetic"]
    pairs = {tuple(sorted(re.findall(r"\d+", row["conversations"][0]["content"]))) for row in asked}
    trained = [
        row
        for row in rows_of(mini, "sft", "train") + rows_of(mini, "rl", "train")
        if row["skill"] == "arithmetic"
    ]
    sums = [
        row for row in trained if re.search(r"\+|加|plus|add", row["conversations"][0]["content"])
    ]
    held_sums = [
        row for row in asked if re.search(r"\+|加|plus|add", row["conversations"][0]["content"])
    ]
    numbers = [frozenset(re.findall(r"\d+", row["conversations"][0]["content"])) for row in sums]
    assert pairs and not {
        frozenset(re.findall(r"\d+", row["conversations"][0]["content"])) for row in held_sums
    } & set(numbers)


def test_no_heldout_city_is_named_in_training(mini):
    text = train_text(mini)
    for row in rows_of(mini, "agent", "heldout"):
        for call in row["calls"]:
            if "city" in call["arguments"]:
                assert call["arguments"]["city"] not in text


def test_no_heldout_pair_stands_in_a_training_table(mini):
    text = train_text(mini)
    assert re.search(r"- \S+ = \d+\\n", text)
    for row in rows_of(mini, "sft", "heldout"):
        if row["skill"] == "lookup":
            pair = re.search(r"\S+ = \d+", row["conversations"][-1]["content"])[0]
            assert (
                pair + "." not in text and pair + "。" not in text and f"- {pair}\\n" not in text
            ), pair


def test_every_fact_stands_in_the_training_text(mini):
    people = make_world("mini", 0).people
    texts = "\n".join(row["text"] for row in rows_of(mini, "pretrain", "train"))
    for (en, zh), values in zip(people.names, people.facts):
        for attribute, index in zip(people.attributes, values):
            for language, name in (("en", en), ("zh", zh)):
                value = attribute.values[index][language == "zh"]
                said = [form.format(e=name, v=value) for form in attribute.statements[language]]
                assert any(sentence in texts for sentence in said), (name, attribute.name)


# --- everything is right ---


@pytest.mark.parametrize("level", ["mini", "full"])
def test_every_equation_of_every_reply_holds(level):
    for split in ("train", "heldout"):
        for item in some_items(level, split, 40):
            text = " ".join(
                [turn.reply for turn in item.turns] + [item.reasoning, item.prose, item.short]
            )
            for a, op, b, c in EQUATION.findall(text):
                assert apply(int(a), op.replace("*", "×"), int(b)) == int(c), text


@pytest.mark.parametrize(
    ("a", "op", "b"),
    [
        (7, "+", 8),
        (27, "+", 15),
        (600, "+", 45),
        (503, "-", 7),
        (523, "-", 187),
        (27, "-", 25),
        (999, "-", 998),
        (12, "×", 7),
        (7, "×", 8),
        (12, "×", 12),
    ],
)
def test_work_out_ends_in_the_result(a, op, b):
    steps = work_out(a, op, b)
    assert apply(a, op, b) in [apply(*step) for step in steps]
    assert (
        all(len(op_key(*step)) <= (op == "×") for step in steps) or len(steps) == 1
    )  # made of what is known by heart


@pytest.mark.parametrize("level", ["mini", "full"])
def test_the_scorer_takes_every_right_reply_and_no_wrong_one(level):
    for split in ("train", "heldout"):
        for item in some_items(level, split):
            question = question_of_item(item)
            correct, messages = ask(question, perfect(item))
            assert correct, messages
            assert score(question, f"<think>\n{item.wrong}\n</think>\n\n{item.turns[-1].reply}")
            assert not score(question, item.wrong), (item.answer, item.wrong)
            assert score(question, item.short) != bool(item.manners), (item.answer, item.short)
            assert not score(question, "") and not score(question, f"<think>{item.turns[-1].reply}")


def test_answers_recomputed_from_the_questions():
    for item in some_items("full", "train", 60):
        question, numbers = (
            item.turns[0].question,
            [int(n) for n in re.findall(r"\d+", item.turns[0].question)],
        )
        if item.skill == "comparison":
            larger = "larger" in question or "更大" in question
            assert int(item.answer) == (max if larger else min)(numbers)
        if item.skill == "sorting":
            down = (
                "large to small" in question
                or "largest first" in question
                or "从大到小" in question
            )
            assert item.answer == ", ".join(map(str, sorted(numbers, reverse=down)))
        if item.skill == "counting":
            word = re.search(r'["“](.+?)["”]', question)[1]
            listed = re.split(r", |、", re.split(r": |：", question)[-1])
            assert int(item.answer) == listed.count(word)
        if item.skill == "lookup":
            table = dict(line[2:].split(" = ") for line in question.splitlines()[:-1])
            (name,) = (name for name in table if f" {name} = " in item.turns[0].reply)
            assert name in question.splitlines()[-1] and table[name] == item.answer
        if item.skill == "dates":
            names = WEEKDAYS[item.language]
            start = next(i for i, name in enumerate(names) if name in question)
            sign = -1 if re.search("ago|earlier|before|back|前", question) else 1
            assert item.answer == names[(start + sign * numbers[0]) % 7]


# --- the levels ---


def test_full_is_as_large_as_promised():
    level, world = LEVELS["full"], make_world("full", 0)
    assert len(world.people.names) == len(set(world.people.names)) >= 200
    assert all(len(facts) == 5 for facts in world.people.facts)
    assert level.max_sum == 999 and level.max_factor == 12 and len(level.tools) >= 6
    steps = {
        len(EQUATION.findall(item.turns[0].reply))
        for item in world.items("t", "word_problems", "train", 200)
    }
    assert {2, 3, 4, 5} <= steps
    tokenizer = Tokenizer.from_file(str(toy_world.ROOT / "model" / "tokenizer.json"))
    longest = max(
        (item.turns[0].question for item in world.items("t", "lookup", "train", 60)), key=len
    )
    assert len(tokenizer.encode(longest).ids) > 1000
    rng = random.Random(0)
    sums = [world.makers["arithmetic"](rng, "en") for _ in range(2000)]
    operands = [tuple(map(int, re.findall(r"\d+", item.turns[0].question))) for item in sums]
    assert max(max(pair) for pair in operands) > 900
    assert max(a * b for (a, b), item in zip(operands, sums) if "×" in item.short) == 144


def test_mini_is_short(mini):
    texts = sorted(len(row["text"]) for row in rows_of(mini, "pretrain", "train"))
    assert texts[len(texts) // 2] < 120 and sum(texts) < 1_000_000


def test_heldout_questions_are_the_first_rows_whatever_the_limit():
    world = make_world("mini", 0)
    few, many = heldout_questions(world, 6), heldout_questions(world, 20)
    assert len(few) == 6 * len(world.level.sft_rows)
    assert {question.key for question in few} <= {question.key for question in many}
    assert {question.skill for question in heldout_questions(world, 4, part="lora")} == {
        "lora_identity",
        "lora_facts",
    }


@pytest.mark.parametrize("level", ["mini", "full"])
def test_chance_levels(level):
    chances = {}
    for question in heldout_questions(make_world(level, 0), 20):
        chances.setdefault(question.skill, set()).add(round(question.chance, 4))
    assert (
        chances["comparison"] == {0.5}
        and chances["dates"] == {0.1429}
        and chances["facts"] == {0.125}
    )
    assert chances["sorting"] <= {round(1 / 6, 4), round(1 / 24, 4), round(1 / 120, 4)}
    assert chances["arithmetic"] == chances["identity"] == chances["tools"] == {0.0}
    assert all(0 <= chance <= 0.5 for values in chances.values() for chance in values)


def test_split_of_an_item_that_mixes_both():
    world = make_world("mini", 0)
    seen = {split_of(world.makers["word_problems"](random.Random(n), "en")) for n in range(300)}
    assert seen == {"train", "heldout", "neither"}
    assert len(NAMES) == len(set(NAMES)) == 256
