"""The folders of runs in a save folder: the checkpoints to talk to, and the runs with curves."""

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("*", "*/*")  # out/full_sft_tiny, out/quickstart/full_sft_tiny


@dataclass(frozen=True)
class RunFolder:
    """A checkpoint (kind "model") or a PEFT adapter (kind "adapter"); `name` is its path within the
    save folder.

    chats: its tokenizer has a chat template; an adapter uses the template of its `base` (None: not
    found) or, if that has none, its own.
    """

    name: str
    path: Path
    kind: str
    chats: bool
    base: Path | None = None

    @property
    def stamp(self) -> tuple[tuple[str, int], ...]:
        """Changes when the weights are written anew."""
        folders = [folder for folder in (self.path, self.base) if folder]
        files = [file for folder in folders for file in folder.glob("*.safetensors")]
        return tuple((str(file), file.stat().st_mtime_ns) for file in sorted(files))


def find_checkpoints(save_dir: str | Path) -> list[RunFolder]:
    """All RunFolders of a save folder, one or two levels deep: those that chat first, by name."""
    folders = {
        path.parent for level in LEVELS for path in Path(save_dir).glob(f"{level}/*config.json")
    }
    found = [run for folder in sorted(folders) if (run := read_folder(folder, Path(save_dir)))]
    return sorted(found, key=lambda run: (not run.chats, run.name))


def read_folder(folder: Path, save_dir: Path) -> RunFolder | None:
    """A folder's RunFolder; None without weights of ours, or with a reward model's."""
    name = folder.relative_to(save_dir).as_posix()
    if (folder / "adapter_config.json").is_file() and any(folder.glob("adapter_model*")):
        base = find_base(folder, save_dir)
        chats = (
            base is None or has_chat_template(base) or (folder / "chat_template.jinja").is_file()
        )
        return RunFolder(name, folder, "adapter", chats, base)
    architectures = str(read_json(folder / "config.json").get("architectures"))
    has_weights = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    if not has_weights or "ForSequenceClassification" in architectures:
        return None
    return RunFolder(name, folder, "model", has_chat_template(folder))


def find_base(folder: Path, save_dir: Path) -> Path | None:
    """The checkpoint folder that an adapter names as its base, or None if it is not here."""
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        return None
    name = Path(named).name  # folders may have been moved together
    places = [folder / named, ROOT / named, save_dir / named, folder.parent / name, save_dir / name]
    return next((place.resolve() for place in places if (place / "config.json").is_file()), None)


def has_chat_template(folder: Path) -> bool:
    """Whether a checkpoint has a chat template; without one it was only pretrained."""
    return (folder / "chat_template.jinja").is_file() or bool(
        read_json(folder / "tokenizer_config.json").get("chat_template")
    )


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty if there is no readable one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def find_runs(save_dir: str | Path) -> dict[str, Path]:
    """{name: folder} of all runs with a metrics.jsonl, one or two levels deep, the newest first."""
    files = [path for level in LEVELS for path in Path(save_dir).glob(f"{level}/metrics.jsonl")]
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.parent.relative_to(save_dir).as_posix(): path.parent for path in files}
