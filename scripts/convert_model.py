"""Convert checkpoints: those of jingyaogong/minimind, of any age, into folders that transformers
reads, ours into its `.pth` files, adapters into the network that they were trained on.

    python scripts/convert_model.py native full_sft_512.pth --out out/old_chat
    python scripts/convert_model.py native lora_identity_512.pth --from_weight full_sft_512.pth \\
        --out out/lora_identity
    python scripts/convert_model.py pth full_sft --out full_sft_768.pth
    python scripts/convert_model.py merge --from_weight full_sft --adapter out/lora_tiny

Every conversion computes the logits before and after, and says in its last line how far they are
apart. `COMMAND --help` lists the flags of each.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.conversion.merge import MergeArgs, merge
from scripts.conversion.native import NativeArgs, to_native
from scripts.conversion.pth import PthArgs, to_pth
from trainer.runtime.arguments import command, parse_command

COMMANDS = {
    "native": (NativeArgs, to_native),
    "pth": (PthArgs, to_pth),
    "merge": (MergeArgs, merge),
}


def main(argv: list[str] | None = None) -> None:
    commands = {name: args for name, (args, _) in COMMANDS.items()}
    name, args = parse_command(commands, __doc__, argv)
    COMMANDS[name][1](args)


if __name__ == "__main__":
    command(main)
