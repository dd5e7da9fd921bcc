"""Let a teacher answer prompts, and write its completions as rows to train a student on (black-box
distillation).

A teacher's probabilities may be out of reach, because it has another tokenizer or is behind a
server; its completions still teach (sequence-level distillation: Kim & Rush 2016, section 3.2).
This script writes them, and train_full_sft.py learns from them:

    python scripts/make_teacher_rows.py --weight out/quickstart/full_sft_tiny \\
        --out dataset/teacher.jsonl --keep_right
    OPENAI_API_KEY=... python scripts/make_teacher_rows.py --base_url https://api.example.com/v1 \\
        --model big --data_path my_prompts.jsonl --temperature 0.7 --num_samples 4 \\
        --out dataset/teacher.jsonl
    python trainer/train_full_sft.py --data_path dataset/teacher.jsonl --from_weight pretrain

A row to read is {"prompt": "..."} or {"conversations": [...]}; if its last message is the
assistant's, the teacher writes that message anew; earlier turns and tools stay. A row that is
written has the teacher's content, reasoning and tool calls, and the other fields of its row.
Completions that --max_new_tokens cut off, that are empty, or that are wrong by the row's "answer"
(--keep_right: rejection sampling, Yuan et al. 2023) go to OUT.dropped.jsonl with the reason. Rows
in these two files are not asked again: the same command resumes an interrupted run. Completions of
another teacher, or with other settings, go to another file (--data_path takes several). Where the
teacher's probabilities can be had, trainer/train_distillation.py learns more from each completion.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.files import write_json
from scripts.checkpoint import ComputeArgs, ShapeArgs
from trainer.runtime.arguments import arg, check_not_negative, check_positive, command, parse_args

if TYPE_CHECKING:
    from scripts.teacher.rows import TeacherRows

TOY = ROOT / "dataset" / "toy_mini"
# of all completions in a file, and written in its rows
SETTINGS = ("temperature", "max_new_tokens", "seed", "keep_right")
# the flags that only one kind of teacher has
FLAGS_OF = {
    "weight": (*(x.name for x in (*fields(ShapeArgs), *fields(ComputeArgs))), "max_len"),
    "base_url": ("model", "api_key", "retries"),
}


@dataclass
class TeacherArgs(ComputeArgs, ShapeArgs):
    data_path: list[str] = arg(
        [],
        "rows with prompts; FILE@0.4 takes that fraction of its rows (default: the toy world's RL "
        "rows)",
        nargs="+",
    )
    out: str = arg("", "the .jsonl file to write; the prompts that it holds are not asked again")
    weight: str = arg("", "the teacher: a run in SAVE_DIR, a checkpoint folder, or a .pth file")
    base_url: str = arg("", "the teacher: a server with OpenAI's API, as http://127.0.0.1:8000/v1")
    model: str = arg("", "base_url: the teacher's name there (default: the first that it serves)")
    api_key: str = arg("", "base_url: its key (default: the environment's OPENAI_API_KEY, or none)")
    temperature: float = arg(1.0, "0: greedy decoding")
    num_samples: int = arg(1, "completions of each prompt")
    max_new_tokens: int = arg(512, "longest completion, in tokens; longer ones are dropped")
    keep_right: bool = arg(
        False,
        'drop completions that are wrong by the "answer" of their row, as the toy world scores '
        "them; completions of rows without one are kept",
    )
    concurrency: int = arg(16, "requests that run, or completions that are decoded, at once")
    retries: int = arg(
        6,
        "base_url: tries after the first, with growing pauses, while the server is busy or cannot "
        "be reached",
    )
    seed: int = arg(42, "of the sampling")
    max_len: int | None = arg(
        None,
        "weight: tokens of prompt and completion together (default: 2048, or the model's "
        "positions)",
    )
    json: str = arg("", "write the counts to this file too")

    def check(self) -> None:
        check_positive(self, "num_samples", "max_new_tokens", "concurrency", "max_len")
        check_positive(self, "hidden_size", "num_hidden_layers")
        check_not_negative(self, "temperature", "retries", "seed")
        if bool(self.weight) == bool(self.base_url):
            raise ValueError(
                "the teacher is either --weight (a checkpoint) or --base_url (a server): give one "
                "of them"
            )
        if not self.out.endswith(".jsonl"):
            raise ValueError(f"--out {self.out!r}: give a name that ends in .jsonl")
        other = "base_url" if self.weight else "weight"
        if useless := sorted({*FLAGS_OF[other]} & self.given):
            raise ValueError(
                f"--{' and --'.join(useless)} has an effect with --{other} only: leave it out"
            )
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                "--num_samples with --temperature 0 gives the same completion each time: give a "
                "temperature above 0"
            )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(TeacherArgs, argv)
    import openai
    from tqdm import tqdm

    from dataset.toy_world import write_world
    from scripts.teacher.jobs import read_jobs
    from scripts.teacher.rows import TeacherRows
    from scripts.teacher.teachers import ask_checkpoint, ask_server, first_model, load_engine

    args.api_key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    if not args.data_path:
        write_world("mini", TOY)
        args.data_path = [str(TOY / "rl_train.jsonl")]
    jobs, repeated = read_jobs(args.data_path, args.num_samples)
    if args.keep_right and not any("answer" in job.row for job in jobs):
        raise ValueError(
            f'--keep_right: no row of {" ".join(args.data_path)} has an "answer" to compare with; '
            "leave it out"
        )
    try:
        if args.base_url:
            args.model = args.model or first_model(args)
        settings = {name: getattr(args, name) for name in SETTINGS}
        rows = TeacherRows(args.out, args.weight or args.model, settings)
        missing = [job for job in jobs if job.key not in rows.done]
        with tqdm(total=len(missing), unit="completion", disable=not sys.stderr.isatty()) as bar:

            def take(job, completion):
                rows.take(job, completion)
                bar.update()

            if args.base_url:
                asyncio.run(ask_server(args, missing, take))
            elif missing:
                ask_checkpoint(load_engine(args), args, missing, take)
        rows.check_answers()
    except openai.OpenAIError as error:
        raise OSError(
            f"{args.base_url}: {getattr(error, 'message', error)} (--retries {args.retries}). The "
            f"completions so far are in {args.out}: resume with the same command"
        ) from error
    report(args, rows, len(jobs), repeated)


def report(args: TeacherArgs, rows: TeacherRows, num_jobs: int, repeated: int) -> None:
    """Print the fate of all completions, and write it to --json."""
    written = rows.counts["written"]
    dropped = {reason: count for reason, count in rows.counts.items() if reason != "written"}
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    refused = f"{len(rows.refused)}{f' ({rows.refused[0]})' if rows.refused else ''}"
    print(
        f"{args.out}: {written} rows written; {rows.found} of {num_jobs} completions were there "
        f"before; {repeated} rows repeat a prompt; dropped: {reasons}; refused: {refused}"
    )
    if args.json:
        counts = {"written": written, "there_before": rows.found, "answers": num_jobs}
        counts |= {"repeated_prompts": repeated, "dropped": dropped, "refused": len(rows.refused)}
        write_json(args.json, counts)


if __name__ == "__main__":
    command(main)
