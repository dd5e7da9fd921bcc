#!/usr/bin/env bash
# datasets: one message with a list as its content turns "12" into 12 in all other rows
#
# Expected: a JSON string stays a string. load_dataset("json") documents that it infers the type
#   of each column; the Json feature is documented as storing JSON objects as encoded strings, so
#   encoding and decoding should give back the value that the file holds.
# What happens: when `content` is text in most rows and a list of parts in one row (the usual mix
#   of text and image chats), the column becomes Json(decode=True). A text that happens to be
#   valid JSON is not encoded once more before it is stored, so reading decodes it: "12" -> 12,
#   "007" -> 7, "1.10" -> 1.1, "true" -> True, "null" and "NaN" -> None, and a text with quotation
#   marks around it loses them. No error, no warning; all other texts are unchanged. Without the
#   row that has a list, the same rows are read exactly.
# Who is hurt: anyone who trains or scores on short answers. "null" becomes an empty reply, "1.10"
#   is trained as "1.1", and an exact match of "007" with 7 is false. The cause is in another row.
# Workaround: write every content in one shape (all text or all lists of parts), or read the file
#   with json.loads line by line. A text inside a list of parts is safe: the script shows it.
# Versions: datasets 5.2.0.
set -euo pipefail
export HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet datasets==5.2.0
cd "$work"
timeout 300 env/bin/python - <<'PY'
import json

import datasets

TEXTS = ["12", "007", "1.10", "true", "null", "NaN", '"Hello"', '{"a": 1}', "twelve", "12 apples"]


def row(content):
    question = {"role": "user", "content": "What is the answer?"}
    return {"messages": [question, {"role": "assistant", "content": content}]}


def read_back(name, rows):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)
    data = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")
    print(f"{name}: {data.features['messages']}")
    return [one["messages"][-1]["content"] for one in data]


print("datasets", datasets.__version__)
parts = [{"type": "text", "text": "12"}]
plain = read_back("text_only", [row(text) for text in TEXTS])
mixed = read_back("one_list", [row(text) for text in TEXTS] + [row(parts)])
print(f"{'in the file':14}{'text only':14}{'with one list row'}")
for text, a, b in zip(TEXTS, plain, mixed):
    print(f"{text!r:14}{a!r:14}{b!r:14}{'' if b == text else '<- changed'}")
print("the list row itself:", mixed[-1])

changed = [text for text, b in zip(TEXTS, mixed) if b != text]
same = plain == TEXTS and changed == TEXTS[:8] and mixed[0] == 12 and mixed[-1] == parts
print(f"{len(changed)} of {len(TEXTS)} texts changed")
CHANGED = "the behaviour is not the one that the head of this script describes"
raise SystemExit(0 if same else CHANGED)
PY
