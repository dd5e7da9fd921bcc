"""The network that a stage starts from: a preset, a run's name, a checkpoint folder, a .pth."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from model.adapter_format import read_adapter_config
from model.model_minimind import PRESETS, MiniMindConfig, MiniMindForCausalLM
from trainer.runtime.arguments import ROOT
from trainer.runtime.run import Run
from trainer.runtime.run_folder import open_run_folder, shape_name
from trainer.runtime.tokenizer import OURS, check_for_training, load_tokenizer, tokenizer_of

SHAPE_FLAGS = {"preset", "hidden_size", "num_hidden_layers", "use_moe"}


def load_model(run: Run, chat: bool = True) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """`load_network` for a training run, whose folder is opened; its name has the shape in it."""
    model, tokenizer = load_network(run.args, run.device, chat)
    open_run_folder(run, model.config)
    return model, tokenizer


def load_network(
    args: Any, device: torch.device, chat: bool = True
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """(model in float32 on `device`, tokenizer) by --from_weight, --preset and the shape flags.

    chat=False: without a chat template, the sign of a checkpoint that only continues text.
    ValueError if the checkpoint is missing or damaged, has another shape than the flags say, or a
    tokenizer with another vocabulary.
    """
    if args.from_weight == "none":
        tokenizer = load_tokenizer(args.tokenizer_path or OURS)
        model = MiniMindForCausalLM(config_from_args(args, device, len(tokenizer)))
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        model.config.update(ends)
    else:
        model, tokenizer = read_weight(args.from_weight, args, device)
    check_for_training(tokenizer, args.tokenizer_path or args.from_weight)
    model.config.dropout = args.dropout  # of the training: no checkpoint holds it
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    template = (OURS / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template if chat else None
    tokenizer.bos_token = None  # documents end with <|endoftext|>, and begin with nothing
    return model.to(device).train(), tokenizer


def read_weight(
    name: str, args: Any, device: torch.device
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a checkpoint: a run's name in args.save_dir, a folder, a .pth file."""
    source = find_weight(name, args, device)
    if source.suffix == ".pth":
        model = MiniMindForCausalLM.from_pth(source)
    else:
        model = MiniMindForCausalLM.from_pretrained(source)
    if asked := wrong_shape_flags(model.config, args):
        raise ValueError(
            f"{source} is a {shape_name(model.config)}, but {' '.join(asked)} "
            f"{'ask' if len(asked) > 1 else 'asks'} for another shape: the checkpoint decides the "
            "shape, leave them out"
        )
    tokenizer = tokenizer_of(model, source, args.tokenizer_path)
    if source.suffix == ".pth" and "pretrain" in source.stem:
        tokenizer.chat_template = None  # it came with the tokenizer, and was never learned
    return model, tokenizer


def wrong_shape_flags(config: MiniMindConfig, args: Any) -> list[str]:
    """The shape flags that were given and say something else than a checkpoint's configuration."""
    has = {
        "preset": shape_name(config),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "use_moe": bool(config.num_experts),
    }
    given = sorted(SHAPE_FLAGS & args.given)
    if "preset" in given and len(given) > 1:  # a preset that the others change
        has["preset"] = args.preset
    return [f"--{name} {getattr(args, name)}" for name in given if getattr(args, name) != has[name]]


def config_from_args(args: Any, device: torch.device, vocab_size: int) -> MiniMindConfig:
    """MiniMindConfig of --preset, changed by --hidden_size, --num_hidden_layers and --use_moe."""
    preset = args.preset or ("minimind-3" if device.type == "cuda" else "tiny")
    changes = {"vocab_size": vocab_size}
    if args.num_hidden_layers:
        changes["num_hidden_layers"] = args.num_hidden_layers
    if args.hidden_size and args.hidden_size != PRESETS[preset]["hidden_size"]:
        # 8/3 of the width, in whole 64s, as Llama has it
        feed_forward = -(-args.hidden_size * 8 // (3 * 64)) * 64
        changes |= {"hidden_size": args.hidden_size, "intermediate_size": feed_forward}
    if args.use_moe:
        twin = PRESETS["minimind-3-moe" if PRESETS[preset].get("qk_norm") else "minimind2-moe"]
        changes |= {
            name: twin[name]
            for name in ("num_experts", "num_experts_per_tok", "norm_topk_prob")
            if name in twin
        }
        if "shared_expert_intermediate_size" in twin:
            changes["shared_expert_intermediate_size"] = changes.get(
                "intermediate_size", PRESETS[preset]["intermediate_size"]
            )
    return MiniMindConfig.from_preset(preset, **changes)


def find_weight(name: str, args: Any, device: torch.device) -> Path:
    """The folder or .pth file of a name: a path or a run in args.save_dir. ValueError if none."""
    path, save_dir = Path(name), Path(args.save_dir)
    refuse_adapter(path)
    if path.suffix == ".pth" or path.is_absolute() or (path / "config.json").is_file():
        return path  # the reader says what is wrong with it
    if SHAPE_FLAGS & args.given:
        wanted = f"{name}_{shape_name(config_from_args(args, device, 6400))}"
        runs = [save_dir / wanted]
    else:
        wanted = f"{name}_<preset>"
        runs = [*sorted(save_dir.glob(f"{name}_*")), save_dir / name]
    found = of_name(name, [run for run in runs if (run / "config.json").is_file()], args)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{name!r} fits {', '.join(run.name for run in found)} in {save_dir}: say which with "
            "--preset (.pth files: --hidden_size, --use_moe 0), or give the path"
        )
    for run in runs:
        refuse_adapter(run)
    there = sorted(
        str(path.parent)
        for pattern in ("*", "*/*")
        for path in save_dir.glob(f"{pattern}/config.json")
    )
    raise ValueError(
        f"no weights are found as {name!r}: {save_dir} has no {wanted}, "
        f"{'only ' if there else 'and no run at all'}{', '.join(there)}. Train that stage first, "
        "or give a checkpoint folder or .pth file"
    )


def of_name(name: str, runs: list[Path], args: Any) -> list[Path]:
    """What a name stands for, given the folders that begin with it: NAME_<preset or size> and NAME
    itself, else .pth files, else a run with a longer name.
    """
    shapes = "|".join([*PRESETS, r"\d+x\d+(_moe)?"])
    pattern = rf"{re.escape(Path(name).name)}(_({shapes}))?"
    return [run for run in runs if re.fullmatch(pattern, run.name)] or pth_files(name, args) or runs


def pth_files(name: str, args: Any) -> list[Path]:
    """NAME_<width>.pth and NAME_<width>_moe.pth in args.save_dir, as other repositories of this
    family save them, that --hidden_size and --use_moe allow (the dense ones, if there are any and
    only a width is given); or NAME.pth.
    """
    found = {}
    for path in sorted(Path(args.save_dir).glob(f"{name}_*.pth")):
        match = re.fullmatch(rf"{re.escape(Path(name).name)}_(\d+)(_moe)?", path.stem)
        if match and args.hidden_size in (None, int(match[1])):
            found.setdefault(bool(match[2]), []).append(path)
    if "use_moe" in args.given:
        return found.get(args.use_moe, [])
    if args.hidden_size and found:
        return found.get(False) or found[True]
    whole = Path(args.save_dir) / f"{name}.pth"
    return [one for some in found.values() for one in some] or ([whole] if whole.is_file() else [])


def find_adapter(name: str, args: Any) -> Path:
    """The folder or .pth file of an adapter: a path, or a run in args.save_dir. ValueError if
    several fit, or none; a folder or .pth file that is no adapter is left to its reader.
    """
    path, save_dir = Path(name), Path(args.save_dir)
    is_path = path.suffix == ".pth" or path.is_absolute()
    if is_path or (path / "adapter_config.json").is_file():
        return path
    runs = [*sorted(save_dir.glob(f"{name}_*")), save_dir / name]
    found = [run for run in runs if (run / "adapter_config.json").is_file()]
    found = of_name(name, found, args)
    if len(found) > 1:
        raise ValueError(
            f"the adapter {name!r} fits {', '.join(one.name for one in found)} in {save_dir}: give "
            "the path of one"
        )
    if not found and not path.is_dir():
        folders = (one.parent for one in save_dir.glob("*/adapter_config.json"))
        there = sorted(one.name for one in (*folders, *save_dir.glob("lora*.pth")))
        only = f"only {', '.join(there)}" if there else "none at all"
        raise ValueError(
            f"no adapter is found as {name!r}: {save_dir} has {only}. Give such a name, or the "
            "path of a PEFT folder or .pth file"
        )
    return found[0] if found else path


def find_base(args: Any, device: torch.device) -> Path:
    """The network of --from_weight, as an adapter names it: relative to the repository if in it."""
    base = find_weight(args.from_weight, args, device).resolve()
    return base.relative_to(ROOT) if base.is_relative_to(ROOT) else base


def refuse_adapter(folder: Path) -> None:
    """ValueError, with what to do, if a folder holds an adapter where a network is asked for."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_adapter_config(folder).get("base_model_name_or_path") or "BASE"
        raise ValueError(
            f"{folder} is an adapter, a small change to a network, and not a network: give {base}, "
            "and the adapter as --adapter where there is that flag; or make one network of the two "
            f"with python scripts/convert_model.py merge --from_weight {base} --adapter {folder}"
        )


def take_template(tokenizer: PreTrainedTokenizerBase, adapters: list[str]) -> None:
    """Give a tokenizer without chat template an adapter's: it may have taught a network to chat."""
    for path in (Path(folder) / "chat_template.jinja" for folder in adapters):
        if not tokenizer.chat_template and path.is_file():
            tokenizer.chat_template = path.read_text(encoding="utf-8")
