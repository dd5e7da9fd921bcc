"""The habits that the stages of reinforcement learning start from, their questions, their curves,
and one stage for real.
"""

import json

import pytest

from dataset.toy.rows import RL_SKILLS, heldout_questions, question_of_row, rl_row
from dataset.toy.world import make_world
from scripts import evaluate_stages
from scripts.stages.reinforcement import CURT, GUESSED, draw_curves, habit_rows, items_of
from trainer import train_full_sft


@pytest.fixture(scope="module")
def world():
    return make_world("mini")


def test_habits_are_as_frequent_as_said_and_nothing_held_out_is_taught(world):
    rows = habit_rows(world)
    counted = [row["conversations"][-1]["content"] for row in rows if row["skill"] == "counting"]
    curt = [
        not reply.startswith("1 ") for reply in counted
    ]  # "1 star, 2 moon. ..." shows its steps
    assert len(curt) > 200 and abs(sum(curt) / len(curt) - CURT) < 0.08
    tools = [row["conversations"] for row in rows if row["conversations"][0].get("tools")]
    guesses = [messages for messages in tools if len(messages) == 3]  # tools, question, reply
    assert abs(len(guesses) / len(tools) - GUESSED) < 0.03 and all(
        "tool_calls" not in messages[-1] for messages in guesses
    )
    assert any(len(messages) == 6 for messages in tools)  # two calls with their results
    held_out = {
        question.messages[-1]["content"]
        for question in heldout_questions(world, 100)
        if question.skill in RL_SKILLS
    }
    assert held_out and not held_out & {
        message["content"] for row in rows for message in row["conversations"]
    }


def test_held_out_prompts_are_the_questions_that_are_asked_in_the_end(world):
    asked = [question for question in heldout_questions(world, 7) if question.skill in RL_SKILLS]
    rows = [
        rl_row(item, None)
        for item in items_of(type("Bench", (), {"world": world}), RL_SKILLS, "heldout", 7)
    ]
    found = {
        (question.messages[-1]["content"], question.answer)
        for question in map(question_of_row, rows)
    }
    assert len(rows) == len(asked) and found == {
        (question.messages[-1]["content"], question.answer) for question in asked
    }


def test_a_curve_is_the_mean_over_the_seeds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot",
        lambda axis, x, y, *style, **how: drawn.append((how["label"], x, y)),
    )
    for seed, end in ((1, 0.5), (2, 0.7)):
        folder = tmp_path / f"grpo-{seed}_32x2"
        folder.mkdir()
        lines = [
            {"step": 0, "val_reward/answer/x": 0.2, "seconds": 1.0},
            {"step": 1, "reward/answer": 0.9, "seconds": 2.0},
            {
                "step": 1,
                "val_reward/answer/x": end,
                "val_reward/total/x": 0.0,
                "seconds": 2.0 + seed,
            },
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(tmp_path, ["grpo"], [1, 2], tmp_path / "curves.png")
    assert drawn == [("grpo", (1.0, 3.5), (20.0, pytest.approx(60.0)))]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_stage_trains_and_measures_for_real(tmp_path):
    train_full_sft.main(
        [
            "--from_weight",
            "none",
            "--hidden_size",
            "32",
            "--num_hidden_layers",
            "2",
            "--max_steps",
            "1",
            "--save_dir",
            str(tmp_path),
            "--device",
            "cpu",
            "--val_share",
            "0",
        ]
    )
    flags = [
        "--save_dir",
        str(tmp_path),
        "--max_steps",
        "1",
        "--limit",
        "1",
        "--seeds",
        "1",
        "--device",
        "cpu",
        "--from_weight",
        str(tmp_path / "full_sft_32x2"),
        "--json",
        str(tmp_path / "table.json"),
    ]
    evaluate_stages.main([*flags, "--stages", "grpo", "agent"])
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["stage"], row["what"]) for row in rows] == [
        ("grpo", "right answers"),
        ("grpo", "other skills"),
        ("agent", "one call"),
        ("agent", "two calls"),
    ]
    assert all(0 <= row[side] <= 1 for row in rows for side in ("before", "after"))
    assert (tmp_path / "habits_32x2" / "model.safetensors").is_file() and (
        tmp_path / "rl_curves.png"
    ).is_file()
