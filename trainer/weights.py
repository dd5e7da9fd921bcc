"""Which network a stage starts from: a preset from nothing, a run by its name, a checkpoint folder, or a .pth file."""

from pathlib import Path

from transformers import AutoTokenizer

from model.model_minimind import PRESETS, MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "qk_norm",
         "num_experts", "num_experts_per_tok")


def load_model(args, device, chat=True):
    """(model in float32 on `device`, tokenizer) as --from_weight, --preset and the shape flags say.

    chat=False: the tokenizer is without its chat template, which is how a checkpoint says that it only continues text.
    Raises ValueError if the checkpoint is missing or damaged, or if its tokenizer has another vocabulary.
    """
    source = None if args.from_weight == "none" else find_weight(args.from_weight, args.save_dir, args.preset)
    folder = source if source and source.is_dir() and (source / "tokenizer.json").is_file() else ROOT / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if source is None:
        model = MiniMindForCausalLM(config_from_args(args, device, len(tokenizer)))
    elif source.is_dir():
        model = MiniMindForCausalLM.from_pretrained(source)
    else:
        model = MiniMindForCausalLM.from_pth(source, config_from_args(args, device, len(tokenizer)))
    check_vocabulary(model, tokenizer, folder)
    tokenizer.chat_template = (ROOT / "model" / "chat_template.jinja").read_text(encoding="utf-8") if chat else None
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return model.to(device).train(), tokenizer


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
    if args.hidden_size:
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


def run_folder(args, config):
    """Where this run saves: SAVE_DIR/SAVE_WEIGHT_<preset or size>."""
    return Path(args.save_dir) / f"{args.save_weight}_{shape_name(config)}"


def find_weight(name, save_dir, preset=""):
    """The folder or .pth file that --from_weight names: a path, or a run in `save_dir`. ValueError if there is none."""
    if Path(name).exists():
        return Path(name)
    save_dir = Path(save_dir)
    runs = [save_dir / f"{name}_{preset}"] if preset else sorted(save_dir.glob(f"{name}_*")) + [save_dir / name]
    found = [run for run in runs if (run / "config.json").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name!r} fits {', '.join(run.name for run in found)} in {save_dir}: say which with --preset, "
                         "or give the folder")
    there = ", ".join(sorted(path.parent.name for path in save_dir.glob("*/config.json"))) or "no run at all"
    wanted = f"{name}_{preset}" if preset else f"{name}_<preset>"
    raise ValueError(f"no weights are found as {name!r}: {save_dir} has no {wanted}, only {there}. "
                     "Train that stage first, or give a checkpoint folder or .pth file")
