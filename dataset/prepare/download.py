"""Fetch published data files from a hub: resumable, checked by the digest that the hub's file list
gives.

Both hubs list a repository's files with size and digest, so one short transfer serves both, and
every file is checked to the last byte. (huggingface_hub resumes too, but compares sizes only, and
knows nothing of ModelScope.) A transfer goes to `<name>.<digest>.part`, which is renamed when
whole. An interrupted one resumes where it stopped; a file that was published anew has another
digest, hence another part file, and starts from the beginning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

CHUNK = 1 << 18
ATTEMPTS = 5  # transfers that break off in a row without bringing a byte
TIMEOUT = 60  # seconds without an answer
LINK, NEXT = re.compile(r"<([^>]*)>([^<]*)"), re.compile(r'\brel="?([^";]* )?next\b', re.I)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its address, its size in bytes, its digest ("" where unknown)."""

    name: str
    url: str
    size: int
    sha256: str = ""
    git_sha1: str = ""  # small files that the hub keeps in git itself


@dataclass(frozen=True)
class Hub:
    """A hub: its address, how it lists a repository, and the published MiniMind data sets on it."""

    variable: str  # of the environment: a mirror's address
    address: str
    repo: str
    revision: str
    list_files: Callable[[str, str, str], list[RemoteFile]]

    def endpoint(self) -> str:
        """Return the address of the hub, or of the mirror that the environment names."""
        return (os.environ.get(self.variable) or self.address).rstrip("/")


def _list_huggingface(endpoint: str, repo: str, revision: str) -> list[RemoteFile]:
    entries = _get_pages(
        f"{endpoint}/api/datasets/{repo}/tree/{quote(revision, safe='')}", "recursive=1"
    )
    base = f"{endpoint}/datasets/{repo}/resolve/{quote(revision, safe='')}"
    return [
        RemoteFile(
            entry["path"],
            f"{base}/{quote(entry['path'])}",
            entry["size"],
            sha256=(entry.get("lfs") or {}).get("oid", ""),
            git_sha1="" if entry.get("lfs") else entry.get("oid", ""),
        )
        for entry in entries
        if entry["type"] == "file"
    ]


def _list_modelscope(endpoint: str, repo: str, revision: str) -> list[RemoteFile]:
    base, files, page = f"{endpoint}/api/v1/datasets/{repo}/repo", [], 0
    while len(files) == 100 * page:
        page += 1
        query = {
            "Revision": revision,
            "Root": "/",
            "Recursive": "True",
            "PageNumber": page,
            "PageSize": 100,
        }
        files += get_json(f"{base}/tree?{urlencode(query)}")[0]["Data"]["Files"]
    return [
        RemoteFile(
            file["Path"],
            f"{base}?{urlencode({'Revision': revision, 'FilePath': file['Path']})}",
            file["Size"],
            sha256=file.get("Sha256") or "",
        )
        for file in files
        if file["Type"] == "blob"
    ]


HUBS = {
    "huggingface": Hub(
        "HF_ENDPOINT",
        "https://huggingface.co",
        "jingyaogong/minimind_dataset",
        "main",
        _list_huggingface,
    ),
    "modelscope": Hub(
        "MODELSCOPE_ENDPOINT",
        "https://www.modelscope.cn",
        "gongjy/minimind_dataset",
        "master",
        _list_modelscope,
    ),
}


def list_files(
    hub_name: str, repo: str | None = None, revision: str | None = None
) -> dict[str, RemoteFile]:
    """Return the files of a data set repository by name; OSError "why there is no list. fix"."""
    hub = HUBS[hub_name]
    repo, revision = repo or hub.repo, revision or hub.revision
    try:
        return {file.name: file for file in hub.list_files(hub.endpoint(), repo, revision)}
    except (OSError, HTTPException) as error:
        raise OSError(
            _explain(error, hub, f"{hub.endpoint()}, data set {repo}, revision {revision}")
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise OSError(
            f"{hub.endpoint()}: the answer is no list of files ({error!r}). Is {hub.variable} the "
            "address of a mirror of the whole hub?"
        ) from error


def find_file(files: dict[str, RemoteFile], name: str) -> RemoteFile:
    """Return the file of that name, with or without its ".jsonl"; ValueError lists the others."""
    for candidate in (name, f"{name}.jsonl"):
        if candidate in files:
            return files[candidate]
    raise ValueError(
        f"{name}: no such file in the data set. There are: {', '.join(sorted(files))}."
    )


def download(hub_name: str, file: RemoteFile, out_dir: str | Path, sha256: str = "") -> Path:
    """Fetch a file into a folder, unless it is there and whole, and return its path.

    sha256: the expected digest, in hex; default: the hub's. OSError: no connection, no space, or
    wrong content. An unfinished transfer is kept, wrong content is not.
    """
    hub = HUBS[hub_name]
    if sha256:
        file = RemoteFile(file.name, file.url, file.size, sha256=sha256.lower())
    if Path(file.name).is_absolute() or ".." in Path(file.name).parts:
        raise ValueError(
            f"{file.name}: the hub's list names a file outside the folder. Do not use this data "
            "set."
        )
    target = Path(out_dir) / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and target.stat().st_size == file.size and is_intact(target, file):
        return target
    part = target.with_name(
        f"{target.name}.{(file.sha256 or file.git_sha1)[:16] or file.size}.part"
    )
    have = _size(part)
    if have > file.size:
        part.unlink()
        have = 0
    free = shutil.disk_usage(target.parent).free
    if free < file.size - have:
        raise OSError(
            f"{target.parent}: {free / 1e6:,.0f} MB free, {file.name} needs "
            f"{(file.size - have) / 1e6:,.0f} MB more. Free some, or give another --out_dir."
        )
    try:
        _transfer(file, part)
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{_explain(error, hub, file.url)} {_size(part):,} of {file.size:,} bytes are there; "
            "the same command resumes from them."
        ) from error
    if not is_intact(part, file):
        part.unlink()
        raise OSError(
            f"{file.name}: the content is damaged, its checksum is not "
            f"{file.sha256 or file.git_sha1}. It was deleted; try again, or another hub with --hub."
        )
    os.replace(part, target)
    return target


def _transfer(file: RemoteFile, part: Path) -> None:
    """Append to `part` until it has the file's size, over new connections where one breaks off."""
    failures = 0
    with tqdm(
        total=file.size,
        initial=_size(part),
        unit="B",
        unit_scale=True,
        desc=file.name,
        disable=None,
    ) as bar:
        while (have := _size(part)) < file.size or not part.exists():
            try:
                _append(file, part, have, bar)
                error = None
            except (OSError, HTTPException) as caught:
                if (isinstance(caught, HTTPError) and caught.code < 500) or getattr(
                    caught, "errno", 0
                ) == errno.ENOSPC:
                    raise
                error = caught
            failures = 0 if _size(part) > have else failures + 1
            if failures == ATTEMPTS or (isinstance(error, URLError) and _refused(error)):
                raise error or OSError(f"the server closes the connection at byte {have:,}")
            if failures:
                time.sleep(min(2.0**failures, 10) / 10)


def _append(file: RemoteFile, part: Path, have: int, bar: tqdm) -> None:
    headers = {"User-Agent": "minimind", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with urlopen(Request(file.url, headers=headers), timeout=TIMEOUT) as response:
        resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        if have and not resumes:  # a server that knows no ranges sends everything again
            bar.reset(file.size)
        with open(part, "ab" if resumes else "wb") as out:
            while chunk := response.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))


def is_intact(path: Path, file: RemoteFile) -> bool:
    """Whether a file on disk has its published size and digest."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256:
        digest, wanted = hashlib.sha256(), file.sha256
    else:  # git hashes a header too
        digest, wanted = hashlib.sha1(b"blob %d\0" % file.size), file.git_sha1
    with open(path, "rb") as data:
        while chunk := data.read(CHUNK):
            digest.update(chunk)
    return not wanted or digest.hexdigest() == wanted


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _get_pages(url: str, query: str) -> list:
    """Return the items of all pages of a list: each page names the next one in a header (RFC 8288).

    Of the address that it names only the query counts: behind a mirror it may be that of the hub
    itself.
    """
    items, asked = [], set()
    while query not in asked:
        asked.add(query)
        page, links = get_json(f"{url}?{query}")
        items += page
        query = next(
            (urlsplit(link).query for link, rest in LINK.findall(links) if NEXT.search(rest)), query
        )
    return items


def get_json(url: str) -> tuple[Any, str]:
    """Return the JSON at an address, and the Link headers that came with it."""
    with urlopen(Request(url, headers={"User-Agent": "minimind"}), timeout=TIMEOUT) as response:
        return json.load(response), ", ".join(response.headers.get_all("Link", []))


def _refused(error: URLError) -> bool:
    return (
        isinstance(error.reason, ConnectionRefusedError)
        or "getaddrinfo" in type(error.reason).__name__.lower()
    )


def _explain(error: Exception, hub: Hub, request: str) -> str:
    """Explain why a request failed, with the fix."""
    if isinstance(error, HTTPError):
        reasons = {
            404: "there is no such data set, revision or file",
            401: "it is private or does not exist",
            403: "access is denied",
            429: "too many requests; wait some minutes",
        }
        return f"{request}: {reasons.get(error.code, error.reason)} (HTTP {error.code})."
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"{request}: no space left on the disk. Free some, or give another --out_dir."
    reason = getattr(error, "reason", error)
    others = " or ".join(f"--hub {name}" for name, other in HUBS.items() if other is not hub)
    return (
        f"{request}: no connection ({reason}). Try a mirror ({hub.variable}=https://... before the "
        f"command) or {others}."
    )
