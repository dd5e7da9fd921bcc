"""The tables of docs/compatibility.md and its Chinese twin against the flags of all programs."""

import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest

from eval_llm import EvalArgs
from scripts.conversion.merge import MergeArgs
from scripts.conversion.pth import PthArgs
from scripts.eval_toolcall import ToolEvalArgs
from scripts.evaluate_stages import StageArgs
from scripts.make_teacher_rows import TeacherArgs
from scripts.serve_openai_api import ServeArgs
from tests.helpers.flags import STAGES, args_class
from tests.helpers.tutorial_flags import FLAGS
from trainer.runtime.arguments import ROOT, flags_of, parse_args
from trainer.runtime.foreign_flags import EXPLAINED, explanation

OF_RL = ("grpo", "ppo", "spo", "agent")
PLACES = {  # the first column of a row -> dataclasses of flags
    **{stage: [args_class(stage)] for stage in STAGES},
    "every stage": [args_class(stage) for stage in STAGES],
    "all": [args_class(stage) for stage in OF_RL],
    "eval_llm.py": [EvalArgs],
    "eval_toolcall.py": [ToolEvalArgs],
    "serve_openai_api.py": [ServeArgs],
    "make_teacher_rows.py": [TeacherArgs],
    "convert_model.py": [MergeArgs, PthArgs],
    "evaluate_stages.py": [StageArgs],
}
WORDS = {
    "fine-tuning": "full_sft",
    "微调": "full_sft",
    "reasoning": "reason",
    "推理": "reason",
    "LoRA": "lora",
    "preferences": "dpo",
    "偏好": "dpo",
    "reward model": "reward",
    "奖励模型": "reward",
    "蒸馏": "distillation",
    "agents": "agent",
    "智能体": "agent",
    "PPO": "ppo",
    "GRPO": "grpo",
    "SPO": "spo",
    "全部": "all",
}
# explained on scripts that do not have them
OF_SOME_SCRIPTS = ("load_from", "lora_weight", "inference_rope_scaling", "stream")
DOCUMENTS = ("compatibility.md", "compatibility_zh.md")
HEADINGS = (
    ("Every training", "Single", "Reinforcement", "Scripts"),
    (*("所有训练阶段", "各个阶段", "强化学习", "其他脚本"),),
)
EXPLAINED_HEADING = {
    "compatibility.md": "Names that are explained",
    "compatibility_zh.md": "这里没有",
}
FILES_HEADING = {"compatibility.md": "Names of the scripts", "compatibility_zh.md": "脚本与文件"}


def table(document: str, heading: str) -> list[list[str]]:
    """The rows of the table below a heading, each a list of cells, without the head."""
    text = (ROOT / "docs" / document).read_text("utf-8")
    (section,) = re.findall(rf"^##+ {heading}.*?(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows[2:]]


def flags_in(*cells: str) -> list[str]:
    """The names of the flags in some cells, without dashes."""
    return re.findall(r"--(\w+)", " ".join(cells))


def rows_of(document: str) -> list[tuple[list[type], list[str], list[str]]]:
    """[(dataclasses, our names, their names)] of all tables of flags."""
    found = []
    for i, heading in enumerate(HEADINGS[DOCUMENTS.index(document)]):
        for cells in table(document, heading):
            places = ["every stage"] if i == 0 else re.split("[,、] ?", cells.pop(0))
            names = [WORDS.get(place.strip("`"), place.strip("`")) for place in places]
            classes = [cls for name in names for cls in PLACES[name]]
            found.append((classes, flags_in(cells[0]), flags_in(*cells[1:])))
    return found


def with_aliases() -> list[type]:
    """The dataclasses of flags of all programs that know a flag by two names."""
    found = {cls for classes in PLACES.values() for cls in classes}
    for path in (*sorted((ROOT / "scripts").rglob("*.py")), ROOT / "eval_llm.py"):
        if re.search(r"class \w*Args", path.read_text("utf-8")):
            module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            found |= {
                cls
                for cls in vars(module).values()
                if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
            }
    bases = {base for cls in found for base in cls.__mro__[1:]}
    programs = sorted(found - bases, key=lambda cls: cls.__module__)
    return [cls for cls in programs if any(x["aliases"] for x in flags_of(cls).values())]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_in_the_tables_is_accepted_where_it_is_said_to_be(document):
    for classes, ours, theirs in rows_of(document):
        assert ours, theirs
        for cls in classes:
            flags = flags_of(cls)
            fields = [name for name in ours if name in flags]
            assert fields, (cls, ours)
            aliases = {alias for name in fields for alias in flags[name]["aliases"]}
            wrong = {name for name in (*ours, *theirs) if name not in flags} - aliases
            assert not wrong, (cls.__name__, fields, wrong)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_alias_is_in_the_tables(document):
    rows, missing = rows_of(document), []
    for cls in with_aliases():
        for name, flag in flags_of(cls).items():
            documented = {
                other
                for classes, ours, theirs in rows
                if cls in classes and name in ours
                for other in (*ours, *theirs)
            }
            missing += [(cls.__name__, name, x) for x in flag["aliases"] if x not in documented]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_names_that_are_explained_are_those_of_the_table(document):
    names = flags_in(*(row[0] for row in table(document, EXPLAINED_HEADING[document])))
    assert len(names) == len(set(names)) and set(names) == set(EXPLAINED)


@pytest.mark.parametrize("name", EXPLAINED)
def test_an_explained_name_is_no_flag_and_the_programs_say_what_to_type(name, capsys):
    classes = {cls for found in PLACES.values() for cls in found}
    accepting = {
        cls
        for cls in classes
        for flag, about in flags_of(cls).items()
        if name in (flag, *about["aliases"]) and not about.get("positional")
    }
    if name == "num_iterations":  # nanochat's: TRL's is another thing
        assert accepting == set(PLACES["all"])
    else:
        assert not accepting & set(PLACES["every stage"])
        assert not accepting or name in OF_SOME_SCRIPTS
    texts = set()
    for cls in classes - accepting:
        with pytest.raises(SystemExit):
            parse_args(cls, [f"--{name}", "1"])
        error = capsys.readouterr().err
        texts |= {error.split("not a flag here: ")[1]} if "not a flag here: " in error else set()
    assert len(texts) == (2 if name == "load_from" else 1), texts


@pytest.mark.parametrize("program", FLAGS)
def test_every_flag_of_the_tutorials_is_accepted_or_explained(program):
    for cls in PLACES[program]:
        flags = flags_of(cls)
        accepted = {x for name, flag in flags.items() for x in (name, *flag["aliases"])}
        known = {f"--{name}" for name in flags}
        unknown = [name for name in FLAGS[program] if name not in accepted]
        assert all(explanation(name, known) for name in unknown), unknown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_our_files_in_the_table_of_files_are_there(document):
    rows = table(document, FILES_HEADING[document])
    ours = {path for _, here in rows for path in re.findall(r"`([\w/]+\.py)\b", here)}
    assert len(ours) > 8 and all((ROOT / path).is_file() for path in ours)
    assert all(Path(ROOT / name).is_file() for name in ("eval_model.py", "eval_llm.py"))
