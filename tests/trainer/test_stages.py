"""The training stages from end to end: accumulation, resumption, what is left on disk, and every
way to get it wrong.
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.other_tokenizer import write_other_tokenizer
from tests.helpers.runs import assert_same, interrupt, losses, metrics, weights
from trainer import train_full_sft, train_pretrain
from trainer.runtime import checkpoint as checkpoint_module
from trainer.runtime import tracker
from trainer.runtime.metrics import read_metrics

STAGES = {"pretrain": train_pretrain, "sft": train_full_sft}
NAMES = {"pretrain": "pretrain_32x2", "sft": "full_sft_32x2"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_learns_and_leaves_a_standard_folder(stage, flags, tmp_path):
    STAGES[stage].main(
        flags(stage, max_steps=30, epochs=4, learning_rate=1e-2, json=tmp_path / "metrics.json")
    )
    folder = tmp_path / "out" / NAMES[stage]
    assert losses(folder)[-1] < 0.7 * losses(folder)[0]
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[-1]["step"] == 30 and rows[-1]["val_bpb/held_out"] < 6
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads((tmp_path / "metrics.json").read_text())["val_bpb/held_out"]
        == rows[-1]["val_bpb/held_out"]
    )
    assert json.loads((folder / "arguments.json").read_text())["learning_rate"] == 1e-2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert bool(tokenizer.chat_template) == (stage == "sft")
    assert model.generation_config.eos_token_id == [2, 0]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_the_update_does_not_depend_on_how_the_batch_is_cut(stage, moe, flags, tmp_path):
    results = []
    for batch_size, accumulation_steps in ((12, 1), (4, 3), (3, 4)):
        save_dir = tmp_path / f"{batch_size}"
        STAGES[stage].main(
            flags(
                stage,
                save_dir=save_dir,
                max_steps=1,
                val_ratio=0,
                max_seq_len=48,
                use_moe=int(moe),
                batch_size=batch_size,
                accumulation_steps=accumulation_steps,
            )
        )
        folder = save_dir / (NAMES[stage] + ("_moe" if moe else ""))
        results.append(
            (
                losses(folder),
                weights(folder),
                read_metrics(folder / "metrics.jsonl")[0]["grad_norm"],
            )
        )
    for loss, weight, grad_norm in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert grad_norm == pytest.approx(results[0][2], rel=1e-4)
        assert_same(weight, results[0][1], exactly=False)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_really_hold_different_numbers_of_targets(
    stage, flags, tmp_path, monkeypatch
):
    seen = []

    def spy(run, micro_batches):
        seen.append([int((micro["labels"] != -100).sum()) for micro in micro_batches])
        return sum(seen[-1])

    monkeypatch.setattr(STAGES[stage].Run, "count_targets", spy)
    STAGES[stage].main(
        flags(stage, max_steps=1, val_ratio=0, max_seq_len=48, batch_size=3, accumulation_steps=4)
    )
    assert len(seen[0]) == 4 and len(set(seen[0])) > 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_moe": 1},
        {"schedule": "wsd", "accumulation_steps": 2, "optimizer": "muon"},
        {"dropout": 0.2, "gradient_checkpointing": 1, "num_workers": 2},
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_resumes_bit_for_bit(stage, options, flags, tmp_path, monkeypatch):
    options = {**options, "max_steps": 10, "epochs": 3}
    STAGES[stage].main(flags(stage, save_dir=tmp_path / "whole", **options))
    name = NAMES[stage] + ("_moe" if "use_moe" in options else "")
    whole = tmp_path / "whole" / name

    interrupt(STAGES[stage], flags(stage, **options))
    again, rate_at = [], STAGES[stage].learning_rate_at
    monkeypatch.setattr(
        STAGES[stage], "learning_rate_at", lambda step, *x: again.append(step) or rate_at(step, *x)
    )
    STAGES[stage].main([*flags(stage, **options), "--from_resume"])
    assert again == list(range(4, 10))  # from the checkpoint after four updates
    resumed = tmp_path / "out" / name
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed), weights(whole))
    assert metrics(resumed) == metrics(whole)


def test_a_compiled_run_resumes_bit_for_bit(flags, rows, tmp_path):
    """All steps have as many targets, so that each process compiles once; the second finds the
    first one's kernels.
    """
    rows["pretrain"].write_text(
        "".join(
            json.dumps({"text": f"{i} and {90 - i} make 90. " * 3}) + "\n" for i in range(10, 50)
        )
    )
    options = dict(
        num_hidden_layers=1, use_compile=1, dropout=0.1, max_steps=4, save_interval=2, val_ratio=0
    )
    train_pretrain.main(flags(**options))
    folder = tmp_path / "out" / "pretrain_32x1"
    assert (
        len({row["targets"] / row["step"] for row in read_metrics(folder / "metrics.jsonl")}) == 1
    )
    expected = weights(folder)
    shutil.rmtree(folder / "checkpoints" / "step-4")
    torch.compiler.reset()
    train_pretrain.main([*flags(**options), "--from_resume"])
    assert_same(weights(folder), expected)


def test_gradient_checkpointing_changes_no_number_and_dropout_does(flags, tmp_path):
    ends = []
    for name, options in (
        ("plain", {}),
        ("again", {"gradient_checkpointing": 1}),
        ("dropped", {"dropout": 0.2}),
    ):
        train_pretrain.main(flags(save_dir=tmp_path / name, max_steps=3, **options))
        ends.append(weights(tmp_path / name / NAMES["pretrain"]))
    assert_same(ends[0], ends[1])
    assert any((ends[0][name] != ends[2][name]).any() for name in ends[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_learns_keeps_float32_weights_and_resumes(dtype, flags, tmp_path):
    train_pretrain.main(flags(dtype=dtype, max_steps=8, epochs=2, learning_rate=1e-2))
    folder = tmp_path / "out" / NAMES["pretrain"]
    assert losses(folder)[-1] < 0.9 * losses(folder)[0]
    assert all(x.dtype == torch.float32 for x in weights(folder).values())
    expected = weights(folder)
    shutil.rmtree(folder / "checkpoints" / "step-8")
    train_pretrain.main(
        [*flags(dtype=dtype, max_steps=8, epochs=2, learning_rate=1e-2), "--from_resume"]
    )
    assert_same(weights(folder), expected)
    with pytest.raises(ValueError, match=f"{dtype} on cpu -> float32 on cpu"):
        train_pretrain.main(
            [*flags(dtype="float32", max_steps=8, epochs=2, learning_rate=1e-2), "--from_resume"]
        )


def test_a_finished_run_is_not_trained_again(flags, tmp_path, monkeypatch):
    train_pretrain.main(flags())
    monkeypatch.delattr(train_pretrain, "learning_rate_at")
    before = weights(tmp_path / "out" / NAMES["pretrain"])
    train_pretrain.main([*flags(), "--from_resume"])
    assert_same(weights(tmp_path / "out" / NAMES["pretrain"]), before)


def test_sft_starts_from_the_pretrained_run_by_name_and_by_folder(flags, tmp_path):
    train_pretrain.main(flags())
    folder = tmp_path / "out" / NAMES["pretrain"]
    results = []
    for weight in ("pretrain", folder):
        train_full_sft.main(
            [
                *flags("sft", from_weight=weight, max_steps=1, learning_rate=1e-9, weight_decay=0),
                "--overwrite",
            ]
        )
        results.append(weights(tmp_path / "out" / NAMES["sft"]))
        assert_same(results[-1], weights(folder), exactly=False)
    assert_same(*results)


def test_a_run_is_replaced_only_on_demand_and_then_wholly(flags, tmp_path):
    folder = tmp_path / "out" / NAMES["pretrain"]
    train_pretrain.main(flags(max_steps=8))
    before = weights(folder)
    with pytest.raises(
        ValueError, match=r"holds a run, 8 updates long.*--from_resume.*--save_weight.*--overwrite"
    ):
        train_pretrain.main(flags(max_steps=2, seed=1))
    assert_same(weights(folder), before)
    train_pretrain.main([*flags(max_steps=2, seed=1), "--overwrite"])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    assert {row["step"] for row in read_metrics(folder / "metrics.jsonl")} == {1, 2}


def test_inspect_prints_rows_and_trains_nothing(flags, tmp_path, capsys):
    train_full_sft.main(flags("sft", inspect=2))
    out = capsys.readouterr().out
    assert "⟦1<|im_end|>⟧" in out and "sequence 1" in out and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_falls_back_on_the_one_before(flags, tmp_path, capsys):
    train_pretrain.main(flags(max_steps=8))
    folder = tmp_path / "out" / NAMES["pretrain"]
    expected = weights(folder)
    state = folder / "checkpoints" / "step-8" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    train_pretrain.main([*flags(max_steps=8), "--from_resume"])
    assert "training_state.pt is damaged; falling back" in capsys.readouterr().out
    assert_same(weights(folder), expected)


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(flags, tmp_path, capsys):
    train_pretrain.main([*flags(max_steps=4), "--from_resume"])
    assert "finds no checkpoint" in capsys.readouterr().out
    (tmp_path / "out" / NAMES["pretrain"] / "checkpoints" / "step-4" / "manifest.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"nothing to resume from .*step-4 was never finished.*Delete that folder"
        r".*can still serve --from_weight",
    ):
        train_pretrain.main([*flags(max_steps=4), "--from_resume"])
    assert "falling back" not in capsys.readouterr().out  # on what?


def test_a_run_that_is_resumed_without_its_shape_is_named(flags, tmp_path, monkeypatch, capsys):
    for name in ("own_64x1", "own_big_tiny", "own2_32x2"):
        (tmp_path / "out" / name / "checkpoints" / "step-31").mkdir(parents=True)
    command = [*flags(save_weight="own", max_steps=1), "--from_resume"]
    with pytest.raises(
        ValueError, match=r"but own_64x1 has step 31: to resume it, its shape flags"
    ):
        train_pretrain.main(command)
    with monkeypatch.context() as patch:  # a rank that died before the first save
        patch.setattr("trainer.runtime.ranks.Ranks.has_begun", lambda *_: True)
        train_pretrain.main(command)
    assert (
        "starting from the beginning (but own2_32x2 has step 31: was that meant?)"
        in capsys.readouterr().out
    )


def test_the_replacement_of_a_run_does_not_pass_for_it(flags, tmp_path):
    """Killed before the first save, also where it started from the weights that it replaces."""
    train_pretrain.main(flags(max_steps=1))
    folder = tmp_path / "out" / NAMES["pretrain"]
    (folder / "tensorboard" / "0").mkdir(parents=True)

    interrupt(train_pretrain, [*flags(from_weight=folder, max_steps=1), "--overwrite"], step=0)
    assert sorted(path.name for path in folder.iterdir()) == ["arguments.json", "metrics.jsonl"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(learning_rate=0.5), r"--learning_rate 0.002 -> 0.5"),
        (dict(batch_size=4), r"--batch_size 2 -> 4"),
        (dict(val_ratio=0.3), "the data"),
    ],
)
def test_a_changed_run_cannot_be_resumed(changes, message, flags):
    train_pretrain.main(flags())
    with pytest.raises(ValueError, match=message):
        train_pretrain.main([*flags(**changes), "--from_resume"])


def test_a_full_disk_while_saving_loses_nothing(flags, tmp_path, monkeypatch):
    train_pretrain.main(flags(max_steps=8, save_interval=4))
    folder = tmp_path / "out" / NAMES["pretrain"]
    before, at_4 = weights(folder), weights(folder / "checkpoints" / "step-4")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", no_space)
    shutil.rmtree(folder / "checkpoints" / "step-8")
    with pytest.raises(OSError, match=r"could not save step 8 .*No space left.*--from_resume"):
        train_pretrain.main([*flags(max_steps=8, save_interval=4), "--from_resume"])
    assert_same(weights(folder), at_4)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-4"]
    monkeypatch.undo()
    train_pretrain.main([*flags(max_steps=8, save_interval=4), "--from_resume"])
    assert_same(weights(folder), before)


@pytest.mark.parametrize(
    "stage, lines, message",
    [
        ("pretrain", None, r"no such file"),
        ("pretrain", "", r"empty"),
        ("pretrain", "{nope", r"rows.jsonl:1: "),
        ("pretrain", '{"txt": "a"}', r'rows.jsonl:1: no "text"'),
        ("pretrain", '{"text": null}', r'rows.jsonl:1: "text" is'),
        ("pretrain", '{"text": 3}', r'rows.jsonl:1: "text" is of type int'),
        ("pretrain", '{"text": "a"}\n[1]', r"rows.jsonl:2: "),
        ("sft", '{"text": "a"}', r'rows.jsonl:1: no "conversations"'),
        ("sft", '{"conversations": []}', r"rows.jsonl:1: .*at least one message"),
        ("sft", '{"conversations": [{"role": "robot", "content": "a"}]}', r"rows.jsonl:1: .*robot"),
        ("sft", '{"conversations": [{"role": "user", "content": null}]}', r"rows.jsonl:1: "),
        (
            "sft",
            '{"conversations": [{"role": "user", "content": "a"}]}',
            r"no sequence to train on",
        ),
    ],
)
def test_bad_data_is_named_by_file_and_line(stage, lines, message, flags, tmp_path):
    path = tmp_path / "rows.jsonl"
    if lines is not None:
        path.write_text(lines + "\n" if lines else "")
    with pytest.raises(ValueError, match=message):
        STAGES[stage].main(flags(stage, data_path=path))


def test_bad_rows_can_be_skipped(flags, rows, capsys):
    rows["pretrain"].write_text(rows["pretrain"].read_text() + "{nope\n")
    train_pretrain.main(flags(bad_rows="skip", max_steps=1))
    assert "1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pretrain", "/nowhere/at/all.pth", "/nowhere/at/all"])
def test_weights_that_are_not_there_or_of_another_shape_are_refused(name, flags, tmp_path):
    train_pretrain.main(flags(max_steps=1))
    with pytest.raises(
        ValueError, match=r"no weights are found as 'pretrain'|does not exist|is missing"
    ):
        train_full_sft.main([*flags("sft", from_weight=name), "--preset", "minimind-3"])
    with pytest.raises(ValueError, match=r"is a 32x2, but --hidden_size 64 asks for another"):
        train_full_sft.main(
            [*flags("sft", from_weight=tmp_path / "out" / NAMES["pretrain"]), "--hidden_size", "64"]
        )


def test_a_missing_weight_is_named_with_what_is_there(flags, tmp_path):
    train_pretrain.main(flags(max_steps=1))
    with pytest.raises(
        ValueError, match=r"no weights are found as 'dpo': .*only .*pretrain_32x2\."
    ):
        train_full_sft.main(flags("sft", from_weight="dpo"))


def test_a_tokenizer_that_does_not_fit_is_refused(flags, tmp_path):
    train_pretrain.main(flags(max_steps=1))
    folder = Path(tmp_path / "out" / NAMES["pretrain"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"the tokenizer has 6401 entries, the network 6400"):
        train_full_sft.main(flags("sft", from_weight=folder))


def test_stages_train_with_a_tokenizer_of_ones_own(flags, tmp_path):
    own = write_other_tokenizer(tmp_path / "own")
    vocabulary = AutoTokenizer.from_pretrained(own).get_vocab()
    train_pretrain.main(flags("pretrain", max_steps=2, tokenizer_path=own))
    train_full_sft.main(flags("sft", max_steps=2, from_weight="pretrain"))
    for stage in STAGES:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / NAMES[stage])
        assert tokenizer.get_vocab() == vocabulary
        assert bool(tokenizer.chat_template) == (stage == "sft")


def test_a_tokenizer_without_our_special_tokens_is_refused(flags, tmp_path):
    own = write_other_tokenizer(tmp_path / "own")
    text = (own / "tokenizer.json").read_text("utf-8")
    (own / "tokenizer.json").write_text(text.replace("<|im_start|>", "<s>"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"own: the tokenizer has no special token <\|im_start\|>"):
        train_full_sft.main(flags("sft", max_steps=2, from_weight="none", tokenizer_path=own))


def test_validation_files_are_scored_each_by_itself(flags, rows, tmp_path):
    text = str(rows["pretrain"])
    options = dict(max_steps=1, val_ratio=None)
    train_pretrain.main([*flags(**options), "--val_path", text])
    with pytest.raises(ValueError, match="two files are called 'text'"):
        train_pretrain.main([*flags(save_weight="other", **options), "--val_path", text, text])
    last = read_metrics(tmp_path / "out" / NAMES["pretrain"] / "metrics.jsonl")[-1]
    assert "val_bpb/text" in last


@pytest.mark.parametrize(
    "stage",
    [
        *("pretrain", "full_sft", "lora", "dpo", "reward", "reason", "distillation"),
        *("ppo", "grpo", "spo", "agent"),
    ],
)
def test_every_stage_starts_as_a_program(stage, tmp_path, monkeypatch):
    """Its flags are checked before the heavy imports: nothing above may need what comes below."""
    script = str(Path(train_pretrain.__file__).with_name(f"train_{stage}.py"))
    flags = ["--from_weight", "/nowhere/at/all", "--save_dir", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        runpy.run_path(script, run_name="__main__")


def test_a_tracker_that_cannot_start_leaves_the_run_that_was_to_be_replaced(
    flags, tmp_path, monkeypatch
):
    train_pretrain.main(flags())
    folder = tmp_path / "out" / NAMES["pretrain"]
    before = (folder / "model.safetensors").read_bytes()

    def refuse(*given):
        raise OSError("no key")

    monkeypatch.setitem(tracker.BACKENDS, "tensorboard", refuse)
    with pytest.raises(ValueError, match="--tracker tensorboard could not start: no key"):
        train_pretrain.main([*flags(tracker="tensorboard"), "--overwrite"])
    assert (folder / "model.safetensors").read_bytes() == before
    assert list((folder / "checkpoints").iterdir()) and read_metrics(folder / "metrics.jsonl")
    monkeypatch.undo()
    train_pretrain.main([*flags(tracker="tensorboard"), "--overwrite"])
    train_pretrain.main([*flags(tracker="tensorboard"), "--overwrite"])
    (events,) = (folder / "tensorboard").iterdir()  # of the last run alone
    assert list(events.iterdir())
