"""The first pass of clean_corpus.py on a Ray cluster, with the same functions and hence the same
rows kept.

Every file is judged by one task, so a corpus should come in many files, which all machines must see
under the same path (a shared file system), as they must this project. Hashes are shuffled by their
value: equal text, and texts that agree in a band, meet in one task. The driver gets 17 bytes a row,
and the signatures of candidates only; it links them and writes the output as the local engine does.
RAY_ADDRESS names the cluster; without it Ray starts on this machine.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dataset.prepare import near_duplicates as near
from dataset.prepare.contamination import EvaluationIndex
from dataset.prepare.verdicts import (
    CleanOptions,
    Verdicts,
    analyze_block,
    drop_near_duplicates,
    drop_repeats,
    iter_blocks,
)

ROOT = Path(__file__).resolve().parents[2]
ROWS_PER_SHARD = 1_000_000  # of the shuffle; each is sorted by one task in memory


def judge_on_cluster(
    paths: list[str], options: CleanOptions, index: EvaluationIndex | None
) -> Verdicts:
    """Return every row's verdict; ImportError without Ray."""
    ray = _start()
    reference = ray.put(index)
    data = ray.data.from_items(
        [{"file": i} for i in range(len(paths))], override_num_blocks=len(paths)
    )
    files = [str(Path(path).resolve()) for path in paths]

    def analyze(batch):
        number, evaluation = int(batch["file"][0]), ray.get(reference)
        for block in iter_blocks([files[number]], first=number):
            found = analyze_block(block, options, evaluation)
            details = [found.details.get(place, "") for place in found.place.tolist()]
            yield {
                **found._asdict(),
                "key": found.key.view(np.int64),
                "bands": found.bands.view(np.int64),
                "details": np.array(details, object),
            }

    try:
        rows = data.map_batches(analyze, batch_size=1).materialize()
    except ray.exceptions.RayError as error:
        cause = next((e for e in _causes(error) if type(e) in (ValueError, OSError)), None)
        if cause is None:
            raise
        # the user's own fault, without the cluster's traceback
        raise ValueError(str(cause)) from error
    verdicts = _collect_verdicts(rows)
    shards = max(1, len(verdicts.place) // ROWS_PER_SHARD)
    if options.exact:
        _find_exact(rows, verdicts, shards)
    if options.threshold:
        _find_near(rows, verdicts, shards, options)
    return verdicts


def _start():
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray needs Ray. Install it: pip install 'ray[data]'") from error
    if not ray.is_initialized():
        ray.init(
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray


def _causes(error):
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _batches(data, *columns: str):
    """Yield the columns of a data set, batch by batch, as numpy arrays."""
    chosen = data.select_columns(list(columns))
    for batch in chosen.iter_batches(batch_size=None, batch_format="numpy"):
        yield tuple(batch[name] for name in columns)


def _gather(data, *columns: str) -> list[np.ndarray]:
    parts = list(zip(*_batches(data, *columns), strict=True))
    return [*map(np.concatenate, parts)] or [np.zeros(0, np.int64) for _ in columns]


def _collect_verdicts(rows) -> Verdicts:
    place, size, reason, details = _gather(rows, "place", "size", "reason", "details")
    order = np.argsort(place)
    named = {int(place[i]): str(details[i]) for i in np.flatnonzero(details != "")}
    return Verdicts(
        place[order], size[order], reason[order].astype(np.uint8), np.full(len(place), -1), named
    )


def _find_exact(rows, verdicts: Verdicts, shards: int) -> None:
    def spread(batch):
        good = batch["reason"] == 0
        low, high = batch["key"][good].T
        return {"shard": low % shards, "low": low, "high": high, "place": batch["place"][good]}

    def repeats(group):
        order = np.argsort(group["place"])
        low, high, place = (group[name][order] for name in ("low", "high", "place"))
        again, first = near.repeats(low, high)
        return {"place": place[again], "original": place[first]}

    found = _shuffle(_map(rows, spread), repeats, shards)
    place, original = _gather(found, "place", "original")
    again, first = (np.searchsorted(verdicts.place, places) for places in (place, original))
    drop_repeats(verdicts, again, first, "exact_duplicate")


def _find_near(rows, verdicts: Verdicts, shards: int, options: CleanOptions) -> None:
    def spread(batch):
        good = (batch["reason"] == 0) & (batch["signature"][:, 0] != near.EMPTY)
        keys = batch["bands"][good]
        band = np.broadcast_to(np.arange(keys.shape[1]), keys.shape).ravel()
        place = np.repeat(batch["place"][good], keys.shape[1])
        return {"shard": band * shards + keys.ravel() % shards, "key": keys.ravel(), "place": place}

    def candidates(group):
        order = np.argsort(group["place"])
        members, starts = near.buckets(group["key"][order])
        begins = np.zeros(len(members), bool)
        begins[starts] = True
        return {"place": group["place"][order][members], "begins": begins}

    partitions = near.bands_for(options.threshold)[0] * shards
    found = _shuffle(_map(rows, spread), candidates, partitions)
    groups = [
        (np.searchsorted(verdicts.place, place), begins)
        for place, begins in _batches(found, "place", "begins")
    ]
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *(row for row, _ in groups)]))
    wanted = wanted[verdicts.reason[wanted] == 0]
    if not len(wanted):
        return
    signature = _signatures_of(rows, verdicts.place[wanted])
    parents = near.Parents(len(verdicts.place))
    small = near.Parents(len(wanted))  # in the numbering of `wanted`, which has the same order
    for row, begins in groups:
        alive = verdicts.reason[row] == 0
        bucket = np.cumsum(begins)[alive]
        members = np.searchsorted(wanted, row[alive])
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        near.link_buckets(members, starts, signature, options.threshold, small)
    parents.parent[wanted] = wanted[small.roots()]
    drop_near_duplicates(verdicts, parents)


def _signatures_of(rows, places: np.ndarray) -> np.ndarray:
    """Return the signatures of rows, given by their sorted places: uint32 [C, K]."""

    def pick(batch):
        chosen = np.isin(batch["place"], places)
        return {"place": batch["place"][chosen], "signature": batch["signature"][chosen]}

    place, signature = _gather(_map(rows, pick), "place", "signature")
    return signature[np.argsort(place)]


def _map(data, function):
    return data.map_batches(function, batch_size=None, batch_format="numpy")


def _shuffle(data, function, partitions: int):
    groups = data.groupby("shard", num_partitions=partitions)
    return groups.map_groups(function, batch_format="numpy")
