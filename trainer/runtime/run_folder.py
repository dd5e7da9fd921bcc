"""The folder of a run: its name, who may write there, and the checkpoint that it resumes from."""

import difflib
import json
import re
from pathlib import Path

from dataset.files.outputs import why_unwritable
from model.files import file_sha256
from model.model_minimind import PRESETS, MiniMindConfig
from trainer.runtime.run import Run

SHAPE = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "qk_norm", "num_experts", "num_experts_per_tok"),
)


def shape_name(config: MiniMindConfig) -> str:
    """The preset that a configuration is, or its width x layers: the end of a run folder's name."""
    for name in PRESETS:
        preset = MiniMindConfig.from_preset(name)
        if all(getattr(preset, field) == getattr(config, field) for field in SHAPE):
            return name
    kind = "_moe" if config.num_experts else ""
    return f"{config.hidden_size}x{config.num_hidden_layers}{kind}"


def open_run_folder(run: Run, config: MiniMindConfig) -> None:
    """Set run.folder, SAVE_DIR/SAVE_WEIGHT_<preset or size>, and, to resume, run.resume_from.

    ValueError if it cannot be written, if it holds another run and neither --from_resume nor
    --overwrite is given, or if there is nothing whole to resume from. Ranks that torchrun restarts
    after one of them died resume the run that they had begun.
    """
    args, ranks = run.args, run.ranks
    run.folder = folder = Path(args.save_dir) / f"{args.save_weight}_{shape_name(config)}"
    if args.inspect:
        return
    is_restarted = ranks.has_begun(folder)
    if is_restarted:
        args.from_resume, args.overwrite = True, False
    if problem := why_unwritable(folder):
        raise ValueError(
            f"{problem}: choose another --save_dir than {args.save_dir}, or give back the right to "
            "write there"
        )
    steps = [step for step, _ in checkpoints_in(folder)]
    if steps and not (args.from_resume or args.overwrite):
        raise ValueError(
            f"{folder} holds a run, {steps[0]} updates long: resume it (--from_resume), choose "
            "another name (--save_weight), or replace it (--overwrite)"
        )
    if args.from_resume:
        run.resume_from = ranks.from_main(lambda: find_to_resume(folder, args, is_restarted))
    if run.resume_from:
        run.saved_step = run.resume_from[1]["step"]
        run.rows_per_step = run.resume_from[1]["rows_per_step"]


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """[(updates done, folder)] of a run's checkpoints, newest first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted(((int(path.name.split("-")[1]), path) for path in found), reverse=True)


def newest_whole(folder: Path) -> tuple[Path, dict] | None:
    """(folder, its progress.json) of the newest whole checkpoint; None if there is none at all.

    Damaged ones are passed over with a warning; ValueError if all are damaged.
    """
    problems, found = [], checkpoints_in(folder)
    for _, path in found:
        problem = damage(path)
        if problem is None:
            return path, json.loads((path / "progress.json").read_text("utf-8"))
        problems.append(problem)
        if path != found[-1][1]:
            print(f"warning: {problem}; falling back on the checkpoint before it")
    if problems:
        raise ValueError(
            f"nothing to resume from in {folder / 'checkpoints'}: {'; '.join(problems)}. Delete "
            "that folder and start again without --from_resume; the weights published in "
            f"{folder} can still serve --from_weight, if they are intact"
        )
    return None


def find_to_resume(folder: Path, args: object, is_restarted: bool) -> tuple[Path, dict] | None:
    """`newest_whole`; if there is none, a warning, or ValueError if shape flags seem missing."""
    if found := newest_whole(folder):
        return found
    same, close = related_runs(folder, args.save_weight)
    nothing = f"--from_resume finds no checkpoint in {folder / 'checkpoints'}"
    if same and not is_restarted:
        raise ValueError(
            f"{nothing}, but {_listed(same)}: to resume it, its shape flags (--preset, "
            "--hidden_size, ...) must be given again. Leave --from_resume out to begin a new run"
        )
    hint = f" (but {_listed(close)}: was that meant?)" if close else ""
    print(f"warning: {nothing}: starting from the beginning{hint}")
    return None


def related_runs(
    folder: Path, save_weight: str
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Runs with checkpoints next to `folder`: same --save_weight and another shape; a close name.

    Two lists of (folder's name, updates done).
    """
    others = [path for path in sorted(folder.parent.glob("*")) if path != folder]
    steps = {path.name: found[0][0] for path in others if (found := checkpoints_in(path))}
    shape = "|".join([r"\d+x\d+(_moe)?", *map(re.escape, PRESETS)])
    pattern = f"{re.escape(Path(save_weight).name)}_({shape})"
    same = [name for name in steps if re.fullmatch(pattern, name)]
    close = difflib.get_close_matches(folder.name, steps, cutoff=0.8)
    return [(name, steps[name]) for name in same], [(name, steps[name]) for name in close]


def _listed(runs: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} has step {step}" for name, step in runs)


def damage(path: Path) -> str | None:
    """None if every file of a checkpoint is as its manifest says, else the fault in words."""
    if not (path / "manifest.json").is_file():
        return f"{path} was never finished (it has no manifest.json)"
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    except ValueError:
        return f"{path / 'manifest.json'} is damaged"
    for name, digest in {"progress.json": "", **manifest}.items():
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if file_sha256(path / name) != digest:
            return f"{path / name} is damaged"
    return None
