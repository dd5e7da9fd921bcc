"""Command lines: types, switches, other names of flags, and mistakes, which must end the program
before any work is done.
"""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from eval_llm import EvalArgs
from tests.helpers.flags import args_class
from trainer.runtime.arguments import (
    ROOT,
    arg,
    check_flags,
    command,
    flags_of,
    parse_args,
    with_new_names,
)
from trainer.runtime.stage_args import TrainArgs
from trainer.train_agent import AgentArgs
from trainer.train_full_sft import SFTArgs
from trainer.train_pretrain import PretrainArgs


@dataclass
class Example:
    number: int = arg(3, "a number")
    maybe: float | None = arg(None, "perhaps a number")
    flag: bool = arg(False, "a switch")
    names: list[str] = arg(["a"], "names")


def test_types_defaults_and_what_was_given():
    args = parse_args(Example, ["--maybe", "2", "--names", "x", "y"])
    assert (args.number, args.maybe, args.flag, args.names) == (3, 2.0, False, ["x", "y"])
    assert args.given == {"maybe", "names"}
    parse_args(Example, []).names.append("b")
    assert parse_args(Example, []).names == ["a"]


@pytest.mark.parametrize(
    "written, expected",
    [
        (["--flag"], True),
        (["--flag", "1"], True),
        (["--flag", "0"], False),
        (["--flag", "no"], False),
        ([], False),
    ],
)
def test_switches_take_nothing_or_a_word(written, expected):
    assert parse_args(Example, written).flag is expected


@pytest.mark.parametrize(
    "cls, written, message",
    [
        (Example, ["--flag", "perhaps"], "neither yes nor no"),
        (Example, ["--nmber", "1"], "did you mean --number"),
        (Example, ["--num", "1"], "did you mean --number"),
        (PretrainArgs, ["--beta", "0.1"], "did you mean --beta2?"),
        (PretrainArgs, ["--batch-size", "1"], "did you mean --batch_size?"),
        (PretrainArgs, ["--reward_model_path", "x"], "unrecognized arguments: --reward_model_path"),
        (PretrainArgs, ["--warmup-steps", "9"], "--warmup_ratio, a fraction of all steps"),
        (SFTArgs, ["x", "--bf16"], "is not a flag here: --dtype bfloat16"),
        (SFTArgs, ["--fp16", "--ddp"], "--dtype float16; --ddp is not a flag here: torchrun says"),
        (SFTArgs, ["--load_from", "x"], "not a flag here: --from_weight takes a folder as well"),
        (EvalArgs, ["--stream", "1"], "--stream is not a flag here: a completion is shown while"),
        (PretrainArgs, ["--num-iterations=20"], "--num-iterations is not a flag here: --max_steps"),
        (PretrainArgs, ["--device-batch-size=4"], "did you mean --batch_size?"),
        (SFTArgs, ["--learning_rate", "nan"], "give more than 0"),
        (AgentArgs, ["--reward_model_path", "x"], "--rewards model:FOLDER=1"),
        (SFTArgs, ["--keep_thoughts", "--last_turn_only"], "leave one out"),
        (PretrainArgs, ["--batch_size", "0"], "--batch_size 0: give more than 0"),
        (PretrainArgs, ["--grad_clip", "-1"], "--grad_clip -1.0: give 0 or more"),
        (PretrainArgs, ["--overwrite", "--from_resume"], "choose one"),
        (PretrainArgs, ["--val_max_rows", "5", "--val_ratio", "0"], "leave it out"),
        (PretrainArgs, ["--max_seq_len", "1"], "--max_seq_len 1: a sequence needs"),
        (PretrainArgs, ["--warmup_ratio", "1.5"], "--warmup_ratio 1.5: give a ratio"),
        (PretrainArgs, ["--schedule", "wsd", "--warmup_ratio", "0.9"], "add up to more than 1"),
        (PretrainArgs, ["--decay_ratio", "0.1"], "--schedule wsd only"),
        (PretrainArgs, ["--use_moe", "--preset", "minimind-3-moe"], "which is one already"),
        (PretrainArgs, ["--val_path", "a", "--val_ratio", "0.1"], "two ways"),
        (PretrainArgs, ["--preset", "huge"], "invalid choice: 'huge'"),
        (PretrainArgs, ["--dtype", "int8"], "invalid choice"),
        (
            PretrainArgs,
            ["--tracker", "tensorboard", "--wandb_project", "X", "--wandb_run_name", "Y"],
            "--wandb_project and --wandb_run_name with --tracker tensorboard: only wandb and "
            "swanlab use that",
        ),
        (
            PretrainArgs,
            ["--wandb_run_name", "Y"],
            "--wandb_run_name with --tracker none: only wandb and swanlab use that",
        ),
        (
            PretrainArgs,
            ["--deepspeed", "nowhere.json"],
            "nowhere.json: no such file; trainer/ds_zero2.json is one",
        ),
        (
            PretrainArgs,
            ["--deepspeed", str(ROOT / "trainer" / "ds_zero3.json"), "--use_compile"],
            "--use_compile with ZeRO stage 3",
        ),
        (
            PretrainArgs,
            ["--deepspeed", str(ROOT / "trainer" / "ds_zero2.json"), "--optimizer", "muon"],
            "not those of --optimizer muon",
        ),
        (SFTArgs, ["--system_prompt_ratio", "2"], "--system_prompt_ratio 2.0: give a ratio"),
    ],
)
def test_mistakes_end_the_program_and_name_the_flag(cls, written, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(cls, written)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"zero_optimization": {"stage": 2}, "train_batch_size": 8}',
            "leave train_batch_size out, --batch_size says that",
        ),
        ('{"zero_optimization": {"stage": 7}}', "stage is 7; give 1, 2 or 3"),
        ("{", "ds.json:1: not JSON"),
    ],
)
def test_a_deepspeed_file_is_read_with_the_flags(text, message, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(SystemExit):
        parse_args(PretrainArgs, ["--deepspeed", str(tmp_path / "ds.json")])
    assert message in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_the_flags(monkeypatch, capsys):
    zero = str(ROOT / "trainer" / "ds_zero2.json")
    for written, flag, package in (
        (["--tracker", "swanlab"], "--tracker swanlab", "swanlab"),
        (["--tracker", "tensorboard"], "--tracker tensorboard", "tensorboard"),
        (["--use_wandb"], "--tracker wandb", "wandb"),
        (["--deepspeed", zero], "--deepspeed", "deepspeed==0.19.8"),
    ):
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
    assert all(f"--{one.name}" in out for one in dataclasses.fields(TrainArgs))


# --- other names of flags ---


@dataclass
class Base:
    ratio: float = arg(0.5, "a ratio", aliases=("share", "fraction"))
    names: list[str] = arg([], "names", aliases=("words",))
    flag: bool = arg(False, "a switch", aliases=("switch",))


@dataclass
class Child(Base):
    ratio: float = arg(0.1, "its own default and help", aliases=("part",))
    fraction: int = arg(2, "a flag with the name of another one's alias")
    flag: bool = True


def test_a_flag_is_known_by_its_other_names():
    args = parse_args(Base, ["--share", "0.25", "--words", "a", "b", "--switch"])
    assert (args.ratio, args.names, args.flag) == (0.25, ["a", "b"], True)
    assert args.given == {"ratio", "names", "flag"}
    assert parse_args(Base, ["--ratio", "1", "--ratio", "2"]).ratio == 2


def test_a_class_that_overrides_a_flag_inherits_its_other_names():
    assert parse_args(Child, []).ratio == 0.1
    for name in ("ratio", "share", "part"):
        assert parse_args(Child, [f"--{name}", "0.7"]).ratio == 0.7
    args = parse_args(Child, ["--fraction", "7"])
    assert (args.ratio, args.fraction) == (0.1, 7)
    assert {name: flag["aliases"] for name, flag in flags_of(Child).items()} == {
        "ratio": ("share", "part"),
        "names": ("words",),
        "flag": ("switch",),
        "fraction": (),
    }


def test_a_plain_value_overrides_the_default_alone(capsys):
    assert parse_args(Child, []).flag and not parse_args(Child, ["--switch", "0"]).flag
    with pytest.raises(SystemExit):
        parse_args(Child, ["--help"])
    assert "a switch (default: True)" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("ratio", "share"), ("share", "ratio"), ("share", "fraction")])
def test_two_names_of_a_flag_at_once_are_a_mistake(names, capsys):
    with pytest.raises(SystemExit):
        parse_args(Base, [part for name in names for part in (f"--{name}", "0.5")])
    message = f"--{names[0]} and --{names[1]} are the same flag: leave one of them out"
    assert message in capsys.readouterr().err


def test_a_mistake_in_a_value_names_the_flag(capsys):
    """By all of its names, of which the user knows one."""
    with pytest.raises(SystemExit):
        parse_args(Base, ["--share", "half"])
    assert "--share: invalid float value: 'half'" in capsys.readouterr().err


def test_arguments_of_an_older_version_get_their_new_names():
    old = {"share": 0.3, "words": ["a"], "gone": 1}
    assert with_new_names(Base, old) == {"ratio": 0.3, "names": ["a"], "gone": 1}
    assert with_new_names(Child, {"fraction": 3, "ratio": 0.1}) == {"fraction": 3, "ratio": 0.1}


# --- the stages' own ---

OF_RL = {
    "max_new_tokens": ("5", "max_completion_length"),
    "kl_weight": ("0.5", "beta"),
    "kl_kind": ("k2", "kl_estimator"),
}
OLD_NAMES = {
    "pretrain": {},
    "lora": {},
    "dpo": {},
    "reward": {"center_weight": ("0.5", "center_rewards_coefficient")},
    "full_sft": {
        "system_prompt_share": ("0.5", "system_prompt_ratio"),
        "empty_think_share": ("0.5", "empty_think_ratio"),
    },
    "reason": {
        "direct_share": ("0.5", "direct_ratio"),
        "empty_think_share": ("0.5", "empty_think_ratio"),
        "mark_weight": ("2", "think_token_weight"),
    },
    "distillation": {
        "on_policy_share": ("0.5", "on_policy_ratio"),
        "max_new_tokens": ("5", "max_completion_length"),
    },
    "ppo": {
        **OF_RL,
        "clip": ("0.5", "epsilon"),
        "value_clip": ("0.5", "cliprange_value"),
        "value_weight": ("0.5", "vf_coef"),
        "discount": ("0.5", "gamma"),
    },
    "grpo": {
        **OF_RL,
        "clip_low": ("0.5", "epsilon"),
        "clip_high": ("0.5", "epsilon_high"),
        "scale": ("batch", "scale_rewards"),
        "weighting": ("sequence", "loss_normalization"),
    },
    "spo": {
        **OF_RL,
        "clip_low": ("0.5", "epsilon"),
        "clip_high": ("0.5", "epsilon_high"),
        "initial_answers": ("5", "initial_completions"),
    },
    "agent": {**OF_RL, "tool_seconds": ("5", "tool_timeout")},
}
OF_ALL = {
    "warmup_share": ("0.5", "warmup_ratio"),
    "decay_share": ("0.5", "decay_ratio"),
    "min_lr_share": ("0.5", "min_lr_ratio"),
    "val_share": ("0.5", "val_ratio"),
}


@pytest.mark.parametrize("stage", OLD_NAMES)
def test_the_former_names_of_a_stages_flags_still_work(stage):
    cls = args_class(stage)
    names = OF_ALL | OLD_NAMES[stage]
    flags = [part for name, (value, _) in names.items() for part in (f"--{name}", value)]
    args = parse_args(cls, [*flags, "--schedule", "wsd"])
    assert args.given == {"schedule", *(new for _, new in names.values())}
    for value, new in names.values():
        found = getattr(args, new)
        assert found == (value if isinstance(found, str) else float(value))


@pytest.mark.parametrize("stage", (*OLD_NAMES, "tokenizer"))
def test_help_lists_no_other_name_and_no_name_means_two_flags(stage, capsys):
    cls = args_class(stage)
    aliases = [alias for flag in flags_of(cls).values() for alias in flag["aliases"]]
    assert len(set(aliases)) == len(aliases)
    with pytest.raises(SystemExit) as end:
        parse_args(cls, ["--help"])
    listed = re.findall(r"--(\w+)", capsys.readouterr().out.split("options:")[1])
    assert end.value.code == 0 and not set(aliases) & set(listed)
    assert {one.name for one in dataclasses.fields(cls)} <= set(listed)


# --- before the heavy imports ---


def test_flags_are_checked_at_once_only_where_the_module_is_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--nmber", "1"])
    check_flags(Example, "trainer.some_module")
    with pytest.raises(SystemExit):
        check_flags(Example, "__main__")
    assert "--nmber" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, flags",
    [("pretrain", ["--epochs", "0"]), ("dpo", ["--help"]), ("tokenizer", ["--help"])],
)
def test_a_script_answers_before_it_loads_what_it_does_not_need(stage, flags):
    script = str(ROOT / "trainer" / f"train_{stage}.py")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, *flags], capture_output=True, text=True
    )
    assert done.returncode == (0 if "--help" in flags else 2)
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "numpy", "dataset"}


# --- errors ---


def test_ctrl_c_while_libraries_load_is_one_line():
    code = (
        "import sys, trainer.runtime.arguments as a\n"
        "a.check_flags(type('C', (), {'__dataclass_fields__': {}}), '__main__')\n"
        "raise KeyboardInterrupt"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (130, -2), done.stderr
    assert done.stderr.strip() == "interrupted before anything was begun"


def test_errors_of_ours_are_one_line_and_others_keep_their_traceback():
    from model.model_minimind import MiniMindConfig

    with pytest.raises(SystemExit, match="error: no preset is named 'x'"):
        command(lambda: MiniMindConfig.from_preset("x"))
    with pytest.raises(ValueError, match="Expecting property name"):
        command(lambda: json.loads("{"))
