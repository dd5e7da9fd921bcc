"""Distillation from end to end: a step by hand, accumulation, ranks, resumption, teachers."""

import importlib.util
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.chat.format import encode_conversation
from model.model_minimind import MiniMindForCausalLM
from model.presets import PRESETS
from tests.helpers.checkpoints import ROOT
from tests.helpers.networks import write_network
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import assert_same, interrupt, losses, metrics, weights
from trainer import train_distillation, train_full_sft
from trainer.runtime.metrics import read_metrics

NAME = "distillation_32x2"
SHAPES = {
    "dense": dict(hidden_size=48, num_hidden_layers=1),
    "moe": dict(hidden_size=32, num_hidden_layers=1, num_experts=4),
}
needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"
)


@pytest.fixture
def teacher(tmp_path):
    return write_network(tmp_path / "teacher_48x1", 1, **SHAPES["dense"])


@pytest.fixture
def distil(flags, teacher, tmp_path):
    """distil(**changes): the command line of a short run."""
    return lambda *switches, **changes: [
        *flags("sft", **{"teacher": teacher, **changes}),
        *switches,
    ]


def first_line(folder):
    return read_metrics(folder / "metrics.jsonl")[0]


def test_a_student_comes_closer_to_its_teacher(distil, teacher, tmp_path):
    before = (teacher / "model.safetensors").read_bytes()
    train_distillation.main(distil(max_steps=30, epochs=4, learning_rate=1e-2, alpha=0.8))
    folder = tmp_path / "out" / NAME
    rows = read_metrics(folder / "metrics.jsonl")
    steps, validations = (
        [row for row in rows if "loss" in row],
        [row for row in rows if "val_bpb/held_out" in row],
    )
    assert steps[-1]["kd_loss"] < 0.8 * steps[0]["kd_loss"]
    for row in steps:
        assert row["loss"] == pytest.approx(0.8 * row["kd_loss"] + 0.2 * row["ce_loss"], rel=1e-5)
    assert len({row["val_bpb/held_out_teacher"] for row in validations}) == 1
    assert len({row["val_bpb/held_out"] for row in validations}) == len(validations) > 1
    assert (teacher / "model.safetensors").read_bytes() == before
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(
    "divergence, temperature", [("forward_kl", 2.0), ("reverse_kl", 1.0), ("jsd", 1.0)]
)
def test_the_first_step_is_that_of_transformers_networks_row_by_row(
    divergence, temperature, distil, teacher, rows, tmp_path
):
    """Losses and the gradient's norm in float64, without packing, chunks or a head of their own."""
    student = write_network(tmp_path / "student_32x2", 2, hidden_size=32, num_hidden_layers=2)
    train_distillation.main(
        distil(
            from_weight=student,
            val_ratio=0,
            batch_size=100,
            max_steps=1,
            alpha=0.7,
            chunk_size=50,
            divergence=divergence,
            temperature=temperature,
        )
    )
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder).double() for folder in (student, teacher)
    )
    tokenizer, divergences, nlls, count = AutoTokenizer.from_pretrained(ROOT / "model"), 0, 0, 0
    for line in rows["sft"].read_text().splitlines():
        ids, is_target = (
            torch.tensor(x)
            for x in encode_conversation(tokenizer, json.loads(line)["conversations"])
        )
        kept = is_target[1:]
        logits = student(ids[None]).logits[0, :-1][kept]
        log_q = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            log_p = (teacher(ids[None]).logits[0, :-1][kept] / temperature).log_softmax(-1)
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        pairs = {
            "forward_kl": [(log_q, log_p)],
            "reverse_kl": [(log_p, log_q)],
            "jsd": [(log_m, log_p), (log_m, log_q)],
        }[divergence]
        for log_b, log_a in pairs:
            divergences = divergences + temperature**2 * F.kl_div(
                log_b, log_a, log_target=True, reduction="sum"
            ) / len(pairs)
        nlls = nlls + F.cross_entropy(logits, ids[1:][kept], reduction="sum")
        count += int(kept.sum())
    loss = (0.7 * divergences + 0.3 * nlls) / count
    loss.backward()
    row = first_line(tmp_path / "out" / NAME)
    norm = torch.stack([x.grad.norm() for x in student.parameters()]).norm().item()
    expected = dict(
        loss=loss.item(),
        kd_loss=(divergences / count).item(),
        ce_loss=(nlls / count).item(),
        targets=count,
    )
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_without_weight_for_the_teacher_it_is_fine_tuning(distil, flags, tmp_path):
    options = dict(max_steps=4, use_moe=1)
    train_distillation.main(distil(alpha=0, learning_rate=1e-3, **options))
    train_full_sft.main(flags("sft", learning_rate=1e-3, **options))
    assert_same(
        *(weights(tmp_path / "out" / name) for name in (f"{NAME}_moe", "full_sft_32x2_moe")),
        exactly=False,
    )


@pytest.mark.parametrize(
    "options",
    [{"use_moe": 1}, {"on_policy_ratio": 0.5, "max_completion_length": 8, "divergence": "jsd"}],
)
def test_the_update_does_not_depend_on_how_the_batch_is_cut(options, distil, tmp_path):
    results = []
    for batch_size, accumulation_steps in ((12, 1), (4, 3), (3, 4)):
        save_dir = tmp_path / f"{batch_size}"
        train_distillation.main(
            distil(
                save_dir=save_dir,
                max_steps=1,
                val_ratio=0,
                max_seq_len=48,
                batch_size=batch_size,
                accumulation_steps=accumulation_steps,
                **options,
            )
        )
        folder = save_dir / (NAME + ("_moe" if "use_moe" in options else ""))
        results.append(
            (
                weights(folder),
                [first_line(folder)[name] for name in ("loss", "kd_loss", "ce_loss", "grad_norm")],
                first_line(folder)["targets"],
            )
        )
    for weight, numbers, targets in results[1:]:
        assert numbers == pytest.approx(results[0][1], rel=1e-4) and targets == results[0][2]
        assert_same(weight, results[0][0], exactly=False)


@pytest.mark.parametrize(
    "options",
    [
        {"use_moe": 1, "accumulation_steps": 2},
        {"dropout": 0.2, "gradient_checkpointing": 1, "dtype": "bfloat16"},
        {
            "on_policy_ratio": 0.5,
            "max_completion_length": 8,
            "alpha": 1,
            "divergence": "reverse_kl",
            "num_workers": 2,
        },
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(options, distil, tmp_path):
    options = {**options, "max_steps": 10, "epochs": 3}
    train_distillation.main(distil(save_dir=tmp_path / "whole", **options))
    name = NAME + ("_moe" if "use_moe" in options else "")
    interrupt(train_distillation, distil(**options))
    train_distillation.main(distil("--from_resume", **options))
    whole, resumed = tmp_path / "whole" / name, tmp_path / "out" / name
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 10
    assert_same(weights(resumed), weights(whole))
    assert metrics(resumed) == metrics(whole)


def test_a_run_cannot_be_resumed_with_other_weights_of_the_teacher(distil, teacher):
    train_distillation.main(distil(max_steps=1))
    write_network(teacher, 2, **SHAPES["dense"])  # another one of the same name
    with pytest.raises(ValueError, match=r"something changed: the data .*or teacher"):
        train_distillation.main(distil("--from_resume", max_steps=1))
    write_network(teacher, 1, **SHAPES["dense"])
    train_distillation.main(distil("--from_resume", max_steps=1))


@pytest.mark.parametrize(
    "options",
    [
        {"use_moe": 1},
        {"on_policy_ratio": 0.5, "max_completion_length": 8},
        pytest.param(
            {
                "on_policy_ratio": 0.5,
                "max_completion_length": 8,
                "deepspeed": "trainer/ds_zero2.json",
            },
            marks=needs_deepspeed,
        ),
    ],
)
def test_two_ranks_learn_what_one_learns(options, distil, tmp_path):
    """The gradient of the head, which runs outside of the wrapped network, is averaged once as all
    others are.
    """
    common = dict(max_steps=8, epochs=20, max_seq_len=48, save_interval=50, val_interval=4)
    alone = {name: x for name, x in options.items() if name != "deepspeed"}
    train_distillation.main(
        distil(save_dir=tmp_path / "one", batch_size=6, accumulation_steps=2, **common, **alone)
    )
    run_ranks(
        2,
        "distillation",
        distil(save_dir=tmp_path / "two", batch_size=3, accumulation_steps=2, **common, **options),
    )
    one, two = (
        tmp_path / name / (NAME + ("_moe" if "use_moe" in options else ""))
        for name in ("one", "two")
    )
    for name, x in weights(one).items():
        difference = (x - weights(two)[name]).abs()
        assert difference.max() < 1e-4 and difference.mean() < 2e-7
    for ours, theirs in zip(
        *(read_metrics(folder / "metrics.jsonl") for folder in (one, two)), strict=True
    ):
        for name in {
            "loss",
            "kd_loss",
            "ce_loss",
            "val_bpb/held_out",
            "val_bpb/held_out_teacher",
            "targets",
        } & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_teacher_may_be_a_run_by_its_name_for_a_student_of_another_shape(
    kind, distil, flags, tmp_path
):
    shape = SHAPES[kind]
    write_network(tmp_path / "out" / "big_48x1", 1, **shape)
    write_network(tmp_path / "out" / "big_32x3", 2, hidden_size=32, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"'big' fits big_32x3, big_48x1"):
        train_distillation.main(flags("sft", teacher="big"))
    train_distillation.main(
        flags(
            "sft", teacher="big", teacher_hidden_size=48, teacher_num_hidden_layers=1, max_steps=1
        )
        if kind == "dense"
        else flags("sft", teacher=tmp_path / "out" / "big_48x1", max_steps=1)
    )
    assert (tmp_path / "out" / NAME / "model.safetensors").is_file()


def test_a_teacher_in_an_older_file_has_its_own_shape_flags(distil, teacher, tmp_path):
    shape = {**PRESETS["tiny"], "num_hidden_layers": 1}
    folder = write_network(tmp_path / "folder", 1, **shape)
    torch.save(MiniMindForCausalLM.from_pretrained(folder).state_dict(), tmp_path / "old.pth")
    old = dict(teacher=tmp_path / "old.pth", teacher_preset="tiny", teacher_num_hidden_layers=1)
    shutil.copytree(folder, tmp_path / "old_tokenizer")
    for name, given in (("a", dict(teacher=folder)), ("b", old)):
        train_distillation.main(distil(save_dir=tmp_path / name, max_steps=1, val_ratio=0, **given))
    assert losses(tmp_path / "a" / NAME) == pytest.approx(losses(tmp_path / "b" / NAME), rel=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(jsd_beta=0.3), "--jsd_beta has no effect without --divergence jsd"),
        (dict(alpha=1.5), "--alpha 1.5"),
        (dict(temperature=0), "--temperature 0"),
        (dict(on_policy_ratio=0.5, alpha=0), "--on_policy_ratio with --alpha 0"),
        (dict(max_completion_length=5), "--max_completion_length: give --on_policy_ratio too"),
        (dict(deepspeed=ROOT / "trainer" / "ds_zero3.json"), "ZeRO stage 3.*ds_zero2.json"),
    ],
)
def test_flags_that_make_no_sense_are_refused(changes, message, distil, capsys):
    with pytest.raises(SystemExit):
        train_distillation.main(distil(**changes))
    assert message.split(".*")[0] in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_named(distil):
    with pytest.raises(ValueError, match="no weights are found as 'nobody'"):
        train_distillation.main(distil(teacher="nobody"))
