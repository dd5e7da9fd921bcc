"""The files of a teacher's rows: those to learn from, and those that were dropped."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.files.jsonl import dump_row, parse_row
from dataset.files.outputs import why_unwritable
from dataset.toy.rows import question_of_row
from dataset.toy.scorer import score
from scripts.teacher.jobs import Completion, Job

MOST_REFUSED = 20  # requests before the first completion: then it is not the rows' fault


class TeacherRows:
    """OUT and OUT.dropped.jsonl, which grow row by row; `done` are the keys of their rows.

    settings: those of all completions in a file, written in its rows; with "keep_right" wrong
    completions are dropped.
    """

    def __init__(self, out: str | Path, teacher: str, settings: dict[str, Any]):
        self.out, self.teacher, self.settings = Path(out), teacher, settings
        self.dropped = self.out.with_suffix(".dropped.jsonl")
        if problem := why_unwritable(self.out.parent):
            raise ValueError(f"--out {self.out}: {problem}")
        self.done: set[str] = set()
        self.refused: list[str] = []
        self.counts = Counter()
        for path in (self.out, self.dropped):
            for row in whole_rows(path):
                self._check_origin(row, path)
                self.done.add(Job("", row, row["conversations"][:-1], row["sample"]).key)
        self.found = len(self.done)
        for path in filter(Path.is_file, (self.out, self.dropped)):  # now known to be ours
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # cut off a half row

    def _check_origin(self, row: dict, path: Path) -> None:
        """ValueError for a row of another teacher or with other settings."""
        if row.get("teacher") != self.teacher:
            raise ValueError(
                f"{path} holds completions of {row.get('teacher')!r}, not of {self.teacher!r}: "
                "give another --out"
            )
        if row.get("settings") != self.settings:
            raise ValueError(
                f"{path} holds completions with the settings {row.get('settings')}, not "
                f"{self.settings}: give another --out, or set them back"
            )

    def take(self, job: Job, completion: Completion) -> None:
        """Write a completion into its file. ValueError if the teacher refuses everything."""
        if completion.finish_reason == "refused":  # not written: it may be answered next time
            self.refused.append(f"{job.where}: {completion.why}")
            if len(self.refused) >= MOST_REFUSED:
                self.check_answers()
            return
        reason = self.fault(job, completion)
        row = {"conversations": [*job.messages, completion.message], "teacher": self.teacher}
        row |= {"settings": self.settings, "sample": job.sample}
        row |= {name: x for name, x in job.row.items() if name not in (*row, "prompt")}
        row |= {"dropped": reason} if reason else {}
        with open(self.dropped if reason else self.out, "a", encoding="utf-8") as file:
            file.write(dump_row(row))
        self.counts[reason or "written"] += 1

    def fault(self, job: Job, completion: Completion) -> str:
        """The reason to drop a completion; "" for a row to learn from."""
        if completion.finish_reason in ("length", "content_filter"):
            return completion.finish_reason
        content = completion.message["content"] or ""
        if not content.strip() and not completion.message.get("tool_calls"):
            return "empty"
        if self.settings["keep_right"] and "answer" in job.row:
            answer = str(job.row["answer"])
            question = question_of_row({**job.row, "conversations": [{}], "answer": answer})
            return "" if score(question, content) else "wrong"
        return ""

    def check_answers(self) -> None:
        """ValueError if there was no completion at all, only refusals."""
        if self.refused and not self.counts and not self.found:
            raise ValueError(f"{self.teacher} answers nothing. {self.refused[0]}")


def whole_rows(path: Path) -> Iterator[dict]:
    """The rows of a file that is written line by line, without the half row of a killed process.

    ValueError if there is only such a half: nobody can tell its origin.
    """
    content = path.read_bytes() if path.is_file() else b""
    if content and b"\n" not in content:
        raise ValueError(f"{path} holds no whole row: delete it, or give another --out")
    for line_no, line in enumerate(content.decode(errors="replace").split("\n")[:-1], 1):
        try:
            yield parse_row(line)
        except ValueError as error:
            raise ValueError(f"{path}:{line_no}: {error}") from error
