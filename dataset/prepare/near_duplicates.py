"""Near-duplicates by MinHash (Broder 1997) and banding (Leskovec et al., Mining of Massive
Datasets, chapter 3).

Two texts resemble each other as much as their sets of token n-grams overlap: Jaccard J = |A and B|
/ |A or B|. Under a random hash the two sets have the same minimum with probability J, so the ratio
of equal minima among `NUM_HASHES` estimates J (standard error 0.035 at J = 0.8). Texts whose minima
agree in a whole band of r of them become candidates; candidates whose estimate reaches the
threshold are linked; of linked texts the first one is kept.

Our own arrays instead of a library: measured on English text, one core, datasketch 2.0 signs 4
MB/s; rensa 0.5 signs quickly (over 200 MB/s), but it is fed lists of strings, which Python makes at
8 MB/s. The arrays of text_tokens.py cost less than that in all, and the signature is a dozen lines.

Long texts may differ only in the part that matters: questions about one passage, answers of which
one is preferred, word problems of one template. So answers have signatures of their own, and
numbers must be the same where they matter.

R texts, K = NUM_HASHES, b bands.
"""

from __future__ import annotations

import numpy as np

from dataset.files.hashes import scramble
from dataset.prepare.text_tokens import TEXT_BITS, Tokens, text_of

NUM_HASHES = 128
ANSWER_HASHES, SLACK = 32, 0.1
# tokens: 2% changed words leave J = 0.89, 5% leave 0.75; longer ones lose near-copies, shorter ones
# find templates
SHINGLE = 3
RECALL = 0.99  # chance that a pair exactly at the threshold becomes a candidate
EMPTY = 0xFFFFFFFF  # the signature of a text without a token
SEED = 20240229
PAIRS_AT_A_TIME = 1 << 14
ROUNDS = 16  # kinds of text in a bucket until it is split
STRIDE = 37  # from one splitting minimum to the next


def bands_for(threshold: float) -> tuple[int, int]:
    """Return (bands, rows per band): the fewest candidates that still find RECALL of the pairs."""
    for rows in range(NUM_HASHES, 1, -1):
        bands = NUM_HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return NUM_HASHES, 1


def signatures(tokens: Tokens, num_hashes: int = NUM_HASHES) -> np.ndarray:
    """Return the minima of each text's n-grams under K = num_hashes functions: uint32 [R, K]."""
    hashes, first = tokens.ngrams(SHINGLE, whole=True)
    out = np.full((len(tokens.chars), num_hashes), EMPTY, np.uint32)
    if not len(hashes):
        return out
    owner = tokens.text[first]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    # 32 bits go through the processor's vector units twice as fast
    low = (hashes >> np.uint64(32)).astype(np.uint32)
    multiply, add = _hash_functions()
    for k in range(num_hashes):
        out[owner[starts], k] = np.minimum.reduceat(low * multiply[k] + add[k], starts)
    return out


def _hash_functions() -> tuple[np.ndarray, np.ndarray]:
    values = scramble(np.arange(SEED, SEED + 2 * NUM_HASHES, dtype=np.uint64)).astype(np.uint32)
    return values[:NUM_HASHES] | np.uint32(1), values[NUM_HASHES:]


def band_keys(signature: np.ndarray, numbers: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Return a key per text and band, equal where the minima of the band and `numbers` are: uint64
    [R, b].

    numbers: uint64 [R], a hash of the numbers in a text where those must be equal too, 0 where they
    need not.
    """
    banded = signature[:, : bands * rows].astype(np.uint64).reshape(-1, bands, rows)
    keys = np.broadcast_to(numbers[:, None], banded.shape[:2])
    for row in range(rows):
        keys = scramble(keys ^ banded[:, :, row]) + np.uint64(row)
    return keys


def number_hashes(tokens: Tokens) -> np.ndarray:
    """Return a hash of the set of numbers that each text holds: uint64 [R]."""
    is_number = np.flatnonzero(tokens.digit)
    distinct = np.unique(tokens.keys(tokens.hashes[is_number], is_number))
    out = np.ones(len(tokens.chars), np.uint64)
    np.add.at(out, text_of(distinct), scramble(distinct >> TEXT_BITS))
    return out


def buckets(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group equal keys [R], two or more: (members, ascending in each group, starts of groups)."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    continues = np.concatenate([[False], same])[: len(keys)]
    inside = continues | np.concatenate([same, [False]])[: len(keys)]
    return order[inside], np.flatnonzero(~continues[inside])


def link_buckets(
    members: np.ndarray,
    starts: np.ndarray,
    signature: np.ndarray,
    threshold: float,
    parents: Parents,
) -> None:
    """Link the members of each bucket that are alike.

    Each member is compared with the bucket's first; those that differ from it form a bucket of
    their own, and so on: as many comparisons as the bucket has kinds of text, not all pairs. After
    every ROUNDS kinds the rest is split.
    """
    group, rounds = _numbered(len(members), starts), 0
    while len(members):
        leads = np.diff(group, prepend=-1) != 0
        leader = members[leads][np.cumsum(leads) - 1]
        rest = ~leads
        members, leader, group = members[rest], leader[rest], group[rest]
        same = alike(signature, leader, members, threshold)
        parents.link(leader[same], members[same])
        members, group = members[~same], group[~same]
        rounds += 1
        if rounds % ROUNDS == 0:
            chosen, starts = _split(members, group, signature, rounds // ROUNDS)
            members, group = members[chosen], _numbered(len(chosen), starts)


def _split(
    members: np.ndarray, group: np.ndarray, signature: np.ndarray, time: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split groups whose texts agree in little but the band, such as conversations under one long
    system prompt: `buckets`.

    A part agrees in one more minimum of the whole and of each answer, another one each time. Texts
    that are not alike differ in many, so that the comparisons grow with the number of texts, not
    with its square; near-copies that are torn apart here meet in other bands.
    """
    keys = scramble(group.astype(np.uint64))
    first, second = (NUM_HASHES + part * ANSWER_HASHES + time % ANSWER_HASHES for part in (0, 1))
    for column in (time * STRIDE % NUM_HASHES, first, second):
        keys = scramble(keys ^ signature[members, column])
    return buckets(keys)


def _numbered(count: int, starts: np.ndarray) -> np.ndarray:
    """Return the number, from 0, of the group that each of so many members is in."""
    begins = np.zeros(count, np.int64)
    begins[starts] = 1
    return np.cumsum(begins) - 1


def alike(
    signature: np.ndarray, left: np.ndarray, right: np.ndarray, threshold: float
) -> np.ndarray:
    """Tell whether texts left[i] and right[i] are near-duplicates: bool [pairs].

    signature: uint32 [R, K + 2 * ANSWER_HASHES], of the whole text and of two parts of it that must
    be alike too; short signatures estimate roughly, so these have some slack.
    """
    out = np.empty(len(left), bool)
    for i in range(0, len(left), PAIRS_AT_A_TIME):
        part = slice(i, i + PAIRS_AT_A_TIME)
        equal = signature[left[part]] == signature[right[part]]
        whole, *parts = np.split(equal, [NUM_HASHES, NUM_HASHES + ANSWER_HASHES], axis=1)
        out[part] = whole.mean(axis=1) >= threshold
        for answer in parts:
            out[part] &= answer.mean(axis=1) >= threshold - SLACK
    return out


def repeats(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of keys (low, high) that stood there before, and where each did first."""
    order = np.lexsort((high, low))  # stable: of equal keys the first one comes first
    low, high = low[order], high[order]
    begins = np.concatenate([[True], (low[1:] != low[:-1]) | (high[1:] != high[:-1])])[: len(order)]
    first = order[begins][np.cumsum(begins) - 1]
    return order[~begins], first[~begins]


class Parents:
    """Clusters of linked texts (union-find); the first text of each stands for it."""

    def __init__(self, count: int):
        self.parent = np.arange(count)

    def link(self, left: np.ndarray, right: np.ndarray) -> None:
        """Link left[i] with right[i]."""
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            a, b = self._find(a), self._find(b)
            self.parent[max(a, b)] = min(a, b)

    def _find(self, i: int) -> int:
        parent = self.parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    def roots(self) -> np.ndarray:
        """Return the first text of the cluster that each text is in: int64 [R]."""
        while (further := self.parent[self.parent] != self.parent).any():
            self.parent[further] = self.parent[self.parent[further]]
        return self.parent
