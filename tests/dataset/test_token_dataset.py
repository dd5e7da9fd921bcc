"""Datasets of many files: shares, shards, one cache each, several runs at once."""

import lzma
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dataset import inspect_rows, token_dataset
from dataset.lm_dataset import ROOT, PretrainDataset, ReasonDataset, SFTDataset
from dataset.pair_dataset import PairDataset
from tests.helpers.rows import chat, targets_of, write

CORPORA = ROOT.parent / "shared" / "data"
KNOWN = ["aaa9d22f1a98946d", "3972069cabf4055c", "ad2311a451df3d61", "a71d7d8140165621"]


def test_several_files_and_shares(tokenizer, tmp_path):
    first = write(tmp_path / "a.jsonl", [{"text": f"a {i}"} for i in range(50)])
    second = tmp_path / "b.jsonl.xz"
    second.write_bytes(
        lzma.compress("".join(f'{{"text": "b {i}"}}\n' for i in range(1000)).encode())
    )

    def texts(*paths):
        dataset = PretrainDataset(
            [str(path) for path in paths], tokenizer, 64, cache_dir=tmp_path / "cache"
        )
        return [tokenizer.decode(dataset[i]["input_ids"][1:-1]) for i in range(len(dataset))]

    both = texts(first, f"{second}@0.4")
    assert both[:50] == [f"a {i}" for i in range(50)]
    assert 380 <= len(both) - 50 <= 420
    assert both[50:] == texts(f"{second}@0.4")  # the same rows whatever else is read
    assert set(both[50:]) < set(texts(second))
    with pytest.raises(ValueError, match=r"1\.5 is no fraction"):
        texts(f"{first}@1.5")


@pytest.fixture
def encoded_files(monkeypatch):
    """Names of the files that became tokens, in order."""
    found, line_blocks = [], token_dataset.line_blocks
    monkeypatch.setattr(
        token_dataset,
        "line_blocks",
        lambda path, fraction: found.append(Path(path).name) or line_blocks(path, fraction),
    )
    return found


def test_a_new_shard_or_share_leaves_the_others_as_they_are(tokenizer, tmp_path, encoded_files):
    def dataset(entries):
        paths = [str(tmp_path / entry) for entry in entries.split()]
        return SFTDataset(
            paths,
            tokenizer,
            256,
            cache_dir=tmp_path / "cache",
            system_prompt_ratio=0.5,
            empty_think_ratio=0.5,
        )

    def rows(dataset):
        return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]

    for name in ("b", "c", "a"):
        write(tmp_path / f"{name}.jsonl", [chat(f"{name}, question {i}?") for i in range(20)])
    first = dataset("b.jsonl c.jsonl")
    whole = dataset(".")
    assert encoded_files == ["b.jsonl", "c.jsonl", "a.jsonl"]
    assert rows(whole)[20:] == rows(first) and whole.report.rows_read == 60
    part = dataset("[ab].jsonl c.jsonl@0.5")
    assert encoded_files[3:] == ["c.jsonl"]  # each share of a file is a cache of its own
    assert rows(part)[:40] == rows(whole)[:40] and set(map(str, rows(part)[40:])) < set(
        map(str, rows(whole)[40:])
    )
    (tmp_path / "b.jsonl").rename(tmp_path / "z.jsonl")
    again = dataset("z.jsonl c.jsonl")
    assert (
        len(encoded_files) == 4
        and again.fingerprint == first.fingerprint
        and rows(again) == rows(first)
    )
    assert (
        len(
            {
                first.fingerprint,
                whole.fingerprint,
                part.fingerprint,
                dataset("c.jsonl z.jsonl").fingerprint,
            }
        )
        == 4
    )


def test_a_file_without_targets_is_no_trouble_among_others(tokenizer, tmp_path):
    def dataset(*names):
        return SFTDataset(
            [tmp_path / name for name in names], tokenizer, 256, cache_dir=tmp_path / "cache"
        )

    write(tmp_path / "mute.jsonl", [{"conversations": [{"role": "user", "content": "hi"}]}] * 2)
    write(tmp_path / "chat.jsonl", [chat()])
    both = dataset("mute.jsonl", "chat.jsonl")
    assert (
        len(both) == 1
        and targets_of(tokenizer, both) == "4.<|im_end|>"
        and both.report.rows_no_target == 2
    )
    for _ in range(2):  # when it is built, and from the cache
        with pytest.raises(
            ValueError,
            match=r"no sequence to train on\.(.*\n)*no target: .*mute\.jsonl:1; .*mute\.jsonl:2\n",
        ):
            dataset("mute.jsonl")


def test_a_missing_shard_is_named_before_the_others_become_tokens(
    tokenizer, tmp_path, encoded_files
):
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"b\.jsonl: no such file"):
        PretrainDataset(
            [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
            tokenizer,
            64,
            cache_dir=tmp_path / "cache",
        )
    assert encoded_files == []


def test_of_several_runs_that_start_at_once_one_builds_everything(
    tokenizer, tmp_path, encoded_files
):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(50)])
    with ThreadPoolExecutor(3) as runs:
        found = [
            runs.submit(PretrainDataset, tmp_path, tokenizer, 64, cache_dir=tmp_path / "cache")
            for _ in range(3)
        ]
    assert [len(run.result()) for run in found] == [150] * 3
    assert encoded_files == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_a_build_goes_on_with_the_file_that_stopped_it(tokenizer, tmp_path, encoded_files):
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "b.jsonl", [{"text": "b"}, {"text": 5}])
    with pytest.raises(ValueError, match=r"b\.jsonl:2"):
        PretrainDataset(tmp_path, tokenizer, 64, cache_dir=tmp_path / "cache")
    write(tmp_path / "b.jsonl", [{"text": "b"}, {"text": "5"}])
    assert len(PretrainDataset(tmp_path, tokenizer, 64, cache_dir=tmp_path / "cache")) == 3
    assert encoded_files == ["a.jsonl", "b.jsonl", "b.jsonl"]


def test_the_cache_is_used_again_and_its_name_tells_what_it_holds(pretrain, sft, monkeypatch):
    rows = [{"text": "hello world"}, {"text": "从零开始。"}]
    first = pretrain(rows)
    others = [
        pretrain(rows, 63).fingerprint,
        pretrain(rows[1:]).fingerprint,
        pretrain(rows, bad_rows="skip").fingerprint,
        sft([chat()]).fingerprint,
        sft([chat()], seed=1).fingerprint,
        sft([chat()], system_prompt_ratio=1.0).fingerprint,
    ]
    assert len({first.fingerprint, *others}) == 7
    monkeypatch.setattr(token_dataset, "line_blocks", None)  # a build would call it
    again = pretrain(rows)
    assert again.fingerprint == first.fingerprint and str(again.report) == str(first.report)
    assert all(np.array_equal(again[i]["labels"], first[i]["labels"]) for i in range(len(first)))


def test_another_tokenizer_or_template_is_another_cache(sft, tokenizer, monkeypatch):
    before = sft([chat()]).fingerprint
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "{# changed #}")
    assert sft([chat()]).fingerprint != before


def test_fingerprints_stay_as_they_were_for_runs_that_are_resumed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_dataset, "tokenizer_sha256", lambda tokenizer: "a tokenizer")
    sides = {side: chat("Two?", side)["conversations"] for side in ("chosen", "rejected")}
    files = [
        (PretrainDataset, [{"text": "one"}, {"text": "two"}], "@0.5", {}),
        (
            SFTDataset,
            [chat("Two?", "2")] * 2,
            "",
            {"system_prompt_ratio": 0.5, "empty_think_ratio": 0.25, "seed": 3},
        ),
        (ReasonDataset, [chat("Two?", "2")] * 2, "", {"direct_ratio": 0.5, "bad_rows": "skip"}),
        (PairDataset, [sides] * 2, "", {"whole": True}),
    ]
    found = []
    for kind, rows, fraction, options in files:
        path = f"{write(tmp_path / 'rows.jsonl', rows)}{fraction}"
        dataset = kind(path, tokenizer, 64, cache_dir=tmp_path / "cache", **options)
        found.append(dataset.fingerprint[:16])
    assert found == KNOWN


@pytest.mark.skipif(not CORPORA.exists(), reason="the real corpora are not here")
@pytest.mark.parametrize(
    ("dataset_class", "names"),
    [
        (
            PretrainDataset,
            ["pretrain/pt_zh_lctt_tech", "pretrain/pt_en_wiki", "pretrain/pt_en_debian_docs"],
        ),
        (SFTDataset, ["sft/sft_en_gpteacher"]),
        (SFTDataset, ["sft/sft_zh_oasst", "sft/sft_zh_classical_translate"]),
    ],
    ids=["pretrain", "sft_en", "sft_zh"],
)
def test_real_corpora_pack_with_little_waste(tokenizer, tmp_path, dataset_class, names):
    paths = []
    for name in names:
        with lzma.open(CORPORA / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
            paths.append(
                write(
                    tmp_path / f"{Path(name).name}.jsonl",
                    [line.rstrip("\n") for line, _ in zip(file, range(300))],
                )
            )
    dataset = dataset_class(paths, tokenizer, 512, cache_dir=tmp_path / "cache", num_proc=1)
    assert dataset.report.rows_read == 300 * len(names)
    assert inspect_rows.padding_ratio(dataset) < 0.03
