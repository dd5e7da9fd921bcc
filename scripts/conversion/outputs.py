"""Where a conversion goes: checked before, replaced when whole, and compared with its source."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dataset.files.outputs import why_unwritable
from model.files import file_sha256

if TYPE_CHECKING:
    import torch

    from model.model_minimind import MiniMindForCausalLM


def check_place(out: Path, overwrite: bool, sources: Sequence[str | Path], record: str) -> None:
    """ValueError if the folder `out` cannot be written or must not be replaced: it holds one of the
    sources, or is no earlier result, with a file of the name `record` in it.
    """
    if problem := why_unwritable(out):
        raise ValueError(
            f"{problem}: choose another --out than {out}, or give back the right to write there"
        )
    if (out / "checkpoints").is_dir():
        raise ValueError(f"{out} is the folder of a training run: choose another --out")
    for source in sources:
        if Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out} holds {source}, which is read here: choose another --out")
    if out.exists() and not (out / record).is_file():
        raise ValueError(
            f"{out} is there already and holds no {record}, so it does not come from here: choose "
            "another --out"
        )
    if out.exists() and not overwrite:
        raise ValueError(
            f"{out} is there already: choose another --out, or replace it (--overwrite)"
        )


def replace_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder of another name, rename it when whole, then delete a former one."""
    out = out.resolve()
    draft, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir(parents=True)
    fill(draft)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    draft.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def weight_hashes(source: Path) -> dict[str, str]:
    """{file: SHA-256} of the weights in a `.pth` file or a checkpoint folder."""
    files = [source] if source.is_file() else [*source.glob("*.safetensors"), *source.glob("*.bin")]
    return {path.name: file_sha256(path) for path in sorted(files)}


def random_ids(vocab_size: int) -> torch.Tensor:
    """Token ids [2, 48] to compare two networks on, always the same."""
    import torch

    return torch.randint(vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))


def largest_difference(model: MiniMindForCausalLM, after: Path | MiniMindForCausalLM) -> float:
    """How far the logits of a network and of another, or of one in a folder, differ at most."""
    import torch

    from model.model_minimind import MiniMindForCausalLM

    other = (
        after if isinstance(after, torch.nn.Module) else MiniMindForCausalLM.from_pretrained(after)
    )
    ids = random_ids(model.config.vocab_size)
    with torch.no_grad():
        return float((model(ids).logits - other(ids).logits).abs().max())
