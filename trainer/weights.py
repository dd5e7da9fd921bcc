"""Which network a stage starts from: a preset from nothing, a run by its name, a checkpoint folder, or a .pth file."""

import difflib
import re
from pathlib import Path

from transformers import AutoTokenizer

from dataset.outputs import why_unwritable
from model.adapter_format import read_adapter_config
from model.model_minimind import PRESETS, MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "qk_norm",
         "num_experts", "num_experts_per_tok")
SHAPE_FLAGS = {"preset", "hidden_size", "num_hidden_layers", "use_moe"}


def load_model(args, device, chat=True):
    """(model in float32 on `device`, tokenizer) as --from_weight, --preset and the shape flags say.

    chat=False: the tokenizer is without its chat template, which is how a checkpoint says that it only continues text.
    Raises ValueError if the checkpoint is missing or damaged, has another shape than the flags say, or a tokenizer
    with another vocabulary.
    """
    if args.from_weight == "none":
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
        model = MiniMindForCausalLM(config_from_args(args, device, len(tokenizer)))
    else:
        model, tokenizer = read_weight(args.from_weight, args, device)
    model.config.dropout = args.dropout  # of the training, not of the network: no checkpoint holds it
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    tokenizer.chat_template = (ROOT / "model" / "chat_template.jinja").read_text(encoding="utf-8") if chat else None
    return model.to(device).train(), tokenizer


def read_weight(name, args, device):
    """(model, tokenizer) of an existing checkpoint: a run's name in args.save_dir, a folder, or a .pth file."""
    source = find_weight(name, args, device)
    folder = source if (source / "tokenizer.json").is_file() else ROOT / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if source.suffix == ".pth":
        model = MiniMindForCausalLM.from_pth(source, legacy_config(args, device, len(tokenizer)))
    else:
        model = MiniMindForCausalLM.from_pretrained(source)
        if SHAPE_FLAGS & args.given:
            asked = config_from_args(args, device, len(tokenizer))
            if shape_name(asked) != shape_name(model.config):
                flags = " ".join(f"--{name}" for name in sorted(SHAPE_FLAGS & args.given))
                raise ValueError(f"{source} is a {shape_name(model.config)}, but {flags} "
                                 f"ask for a {shape_name(asked)}: the checkpoint decides the shape, leave them out")
    check_vocabulary(model, tokenizer, folder)
    return model, tokenizer


def check_vocabulary(model, tokenizer, folder):
    """ValueError unless every token id of `tokenizer` has a row of the embedding matrix and the other way round."""
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} entries, the network {model.config.vocab_size}; "
                         "use the tokenizer that the network was trained with")


def config_from_args(args, device, vocab_size):
    """MiniMindConfig of --preset with --hidden_size, --num_hidden_layers and --use_moe in place of the preset's."""
    preset = args.preset or ("minimind-3" if device.type == "cuda" else "tiny")
    changes = {"vocab_size": vocab_size}
    if args.num_hidden_layers:
        changes["num_hidden_layers"] = args.num_hidden_layers
    if args.hidden_size and args.hidden_size != PRESETS[preset]["hidden_size"]:
        feed_forward = -(-args.hidden_size * 8 // (3 * 64)) * 64  # 8/3 of the width, in whole 64s, as Llama has it
        changes |= {"hidden_size": args.hidden_size, "intermediate_size": feed_forward}
    if args.use_moe:
        twin = PRESETS["minimind-3-moe" if PRESETS[preset].get("qk_norm") else "minimind2-moe"]
        changes |= {name: twin[name] for name in ("num_experts", "num_experts_per_tok", "norm_topk_prob") if name in twin}
        if "shared_expert_intermediate_size" in twin:
            changes["shared_expert_intermediate_size"] = changes.get("intermediate_size", PRESETS[preset]["intermediate_size"])
    return MiniMindConfig.from_preset(preset, **changes)


def shape_name(config):
    """The preset that a configuration is, or its width x layers: the last part of a run's folder name."""
    for name in PRESETS:
        preset = MiniMindConfig.from_preset(name)
        if all(getattr(preset, field) == getattr(config, field) for field in SHAPE):
            return name
    return f"{config.hidden_size}x{config.num_hidden_layers}" + ("_moe" if config.num_experts else "")


def run_folder(args, config, ranks=None):
    """Where this run saves: SAVE_DIR/SAVE_WEIGHT_<preset or size>.

    ValueError if it cannot be written, or if it holds another run and neither --from_resume nor --overwrite says what to
    do with it. Ranks that torchrun has started again, after one of them died, resume what they themselves had begun.
    """
    folder = Path(args.save_dir) / f"{args.save_weight}_{shape_name(config)}"
    if ranks and ranks.has_begun(folder):
        args.from_resume, args.overwrite = True, False
    if problem := "" if args.inspect else why_unwritable(folder):
        raise ValueError(f"{problem}: choose another --save_dir than {args.save_dir}, or give back the right to write there")
    step = newest_step(folder)
    if step is not None and not (args.from_resume or args.overwrite or args.inspect):
        raise ValueError(f"{folder} holds a run, {step} updates long: go on with it (--from_resume), "
                         "choose another name (--save_weight), or replace it (--overwrite)")
    return folder


def newest_step(folder):
    """Updates done in the newest checkpoint of a run's folder; None if it has none."""
    return max((int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*")), default=None)


def related_runs(folder, save_weight):
    """Runs with checkpoints beside `folder`: those of the same --save_weight and another shape, and those of a close name.

    Two lists of (folder's name, updates done).
    """
    steps = {path.name: newest_step(path) for path in sorted(folder.parent.glob("*")) if path != folder}
    steps = {name: step for name, step in steps.items() if step is not None}
    shape = "|".join([r"\d+x\d+(_moe)?", *map(re.escape, PRESETS)])
    same = [name for name in steps if re.fullmatch(f"{re.escape(Path(save_weight).name)}_({shape})", name)]
    close = difflib.get_close_matches(folder.name, steps, cutoff=0.8)
    return [(name, steps[name]) for name in same], [(name, steps[name]) for name in close]


def legacy_config(args, device, vocab_size):
    """The shape of a .pth file; what older files of this family had otherwise than our presets has no trace in them."""
    config = config_from_args(args, device, vocab_size)
    if config.qk_norm:
        config.norm_topk_prob = True  # their top-1 weight is the constant 1
    else:
        config.rms_norm_eps = 1e-5
    return config


def find_weight(name, args, device):
    """The folder or .pth file that a name stands for: a path, or a run in args.save_dir. ValueError if there is none."""
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
    found = [run for run in runs if (run / "config.json").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name!r} fits {', '.join(run.name for run in found)} in {save_dir}: say which with --preset, "
                         "or give the folder")
    for run in runs:
        refuse_adapter(run)
    there = sorted(str(path.parent) for pattern in ("*", "*/*") for path in save_dir.glob(f"{pattern}/config.json"))
    raise ValueError(f"no weights are found as {name!r}: {save_dir} has no {wanted}, {'only ' if there else 'and no run at all'}"
                     f"{', '.join(there)}. Train that stage first, or give a checkpoint folder or .pth file")


def refuse_adapter(folder):
    """ValueError, with the way out, if a folder holds an adapter where a network is asked for."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_adapter_config(folder).get("base_model_name_or_path") or "BASE"
        raise ValueError(f"{folder} is an adapter, a small change to a network, and not a network: give {base}, and the adapter "
                         "as --adapter where there is that flag; or make one network of the two with "
                         f"python scripts/merge_lora.py --from_weight {base} --adapter {folder}")


def take_template(tokenizer, adapters):
    """Give a tokenizer that has no chat template that of an adapter's folder: an adapter may have taught a network to chat."""
    for path in (Path(folder) / "chat_template.jinja" for folder in adapters):
        if not tokenizer.chat_template and path.is_file():
            tokenizer.chat_template = path.read_text(encoding="utf-8")
