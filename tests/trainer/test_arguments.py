"""Command lines: types, switches, and contradictions that must end the program before any work is done."""

import json
import sys
from dataclasses import dataclass

import pytest

from trainer.arguments import ROOT, TrainArgs, arg, command, parse_args
from trainer.train_full_sft import SFTArgs
from trainer.train_pretrain import PretrainArgs


@dataclass
class Example:
    number: int = arg(3, "a number")
    maybe: float | None = arg(None, "perhaps a number")
    flag: bool = arg(False, "a switch")
    names: list[str] = arg(["a"], "names", nargs="+")


def test_types_defaults_and_what_was_given():
    args = parse_args(Example, ["--maybe", "2", "--names", "x", "y"])
    assert (args.number, args.maybe, args.flag, args.names) == (3, 2.0, False, ["x", "y"])
    assert args.given == {"maybe", "names"}
    parse_args(Example, []).names.append("b")
    assert parse_args(Example, []).names == ["a"]


@pytest.mark.parametrize("written, expected", [
    (["--flag"], True), (["--flag", "1"], True), (["--flag", "0"], False), (["--flag", "no"], False), ([], False)])
def test_switches_take_nothing_or_a_word(written, expected):
    assert parse_args(Example, written).flag is expected


@pytest.mark.parametrize("cls, written, message", [
    (Example, ["--flag", "perhaps"], "neither yes nor no"), (Example, ["--nmber", "1"], "--nmber"),
    (PretrainArgs, ["--batch_size", "0"], "--batch_size 0: give more than 0"),
    (PretrainArgs, ["--grad_clip", "-1"], "--grad_clip -1.0: give 0 or more"),
    (PretrainArgs, ["--overwrite", "--from_resume"], "choose one"),
    (PretrainArgs, ["--val_max_rows", "5", "--val_share", "0"], "leave it out"),
    (PretrainArgs, ["--max_seq_len", "1"], "--max_seq_len 1: a row needs"),
    (PretrainArgs, ["--warmup_share", "1.5"], "--warmup_share 1.5: give a share"),
    (PretrainArgs, ["--schedule", "wsd", "--warmup_share", "0.9"], "add up to more than 1"),
    (PretrainArgs, ["--decay_share", "0.1"], "--schedule wsd only"),
    (PretrainArgs, ["--use_moe", "--preset", "minimind-3-moe"], "which is one already"),
    (PretrainArgs, ["--val_path", "a", "--val_share", "0.1"], "two ways"),
    (PretrainArgs, ["--preset", "huge"], "invalid choice: 'huge'"),
    (PretrainArgs, ["--dtype", "int8"], "invalid choice"),
    (PretrainArgs, ["--tracker", "tensorboard", "--wandb_project", "X", "--wandb_run_name", "Y"],
     "--wandb_project and --wandb_run_name with --tracker tensorboard: only wandb and swanlab use that"),
    (PretrainArgs, ["--wandb_run_name", "Y"], "--wandb_run_name with --tracker none: only wandb and swanlab use that"),
    (PretrainArgs, ["--deepspeed", "nowhere.json"], "nowhere.json: no such file; trainer/ds_zero2.json is one"),
    (PretrainArgs, ["--deepspeed", str(ROOT / "trainer" / "ds_zero3.json"), "--use_compile"], "--use_compile with ZeRO stage 3"),
    (PretrainArgs, ["--deepspeed", str(ROOT / "trainer" / "ds_zero2.json"), "--optimizer", "muon"], "not --optimizer muon's"),
    (SFTArgs, ["--system_prompt_share", "2"], "--system_prompt_share 2.0: give a share")])
def test_mistakes_end_the_program_and_name_the_flag(cls, written, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(cls, written)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ('{"zero_optimization": {"stage": 2}, "train_batch_size": 8}', "leave train_batch_size out, --batch_size says that"),
    ('{"zero_optimization": {"stage": 7}}', "stage is 7; give 1, 2 or 3"), ("{", "ds.json:1: not JSON")])
def test_a_deepspeed_file_is_read_with_the_flags(text, message, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(SystemExit):
        parse_args(PretrainArgs, ["--deepspeed", str(tmp_path / "ds.json")])
    assert message in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_the_flags(monkeypatch, capsys):
    zero = str(ROOT / "trainer" / "ds_zero2.json")
    for written, flag, package in ((["--tracker", "swanlab"], "--tracker swanlab", "swanlab"),
                                   (["--tracker", "tensorboard"], "--tracker tensorboard", "tensorboard"),
                                   (["--use_wandb"], "--tracker wandb", "wandb"),
                                   (["--deepspeed", zero], "--deepspeed", "deepspeed==0.19.8")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setitem(sys.modules, package.split("==")[0], None)
            parse_args(PretrainArgs, written)
        message = f"{flag} needs a package that is not installed: python -m pip install {package}\n"
        assert capsys.readouterr().err.endswith(message)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(sys.modules, "wandb", None)
    parse_args(PretrainArgs, ["--use_wandb"])  # it does not report


def test_help_shows_defaults_but_no_path_of_this_machine(capsys):
    with pytest.raises(SystemExit):
        parse_args(PretrainArgs, ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: out)" in out and "python trainer/train_pretrain.py --max_steps 30" in out
    assert all(f"--{name}" in out for name in TrainArgs.__dataclass_fields__)


def test_errors_of_ours_are_one_line_and_others_keep_their_traceback():
    from model.model_minimind import MiniMindConfig

    with pytest.raises(SystemExit, match="error: no preset is named 'x'"):
        command(lambda: MiniMindConfig.from_preset("x"))
    with pytest.raises(ValueError, match="Expecting property name"):
        command(lambda: json.loads("{"))
