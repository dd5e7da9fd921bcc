import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dataset.prepare import download as module
from dataset.prepare.download import download, find_file, list_files

CONTENT = bytes(range(256)) * 4000  # 1 MB
SMALL = b'{"text": "small"}\n'
REPO = "jingyaogong/minimind_dataset"


class FakeHub(BaseHTTPRequestHandler):
    """Both hubs on one port. `server.cut`: bytes after which a transfer breaks off; `server.log`:
    what was asked.
    """

    def do_GET(self):
        server = self.server
        server.log.append((self.path, self.headers.get("Range")))
        if self.path.startswith(f"/api/datasets/{REPO}/tree/main"):
            lfs = {"oid": server.sha256, "size": len(server.content), "pointerSize": 130}
            git = hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
            entries = [
                {"type": "directory", "oid": "0", "size": 0, "path": "images"},
                {
                    "type": "file",
                    "oid": "1",
                    "size": len(server.content),
                    "path": "big.jsonl",
                    "lfs": lfs,
                },
                {"type": "file", "oid": git, "size": len(SMALL), "path": "small.jsonl"},
            ]
            return (
                self.reply_with_page(entries)
                if server.pages
                else self.reply(json.dumps(entries).encode())
            )
        if self.path.startswith(
            "/api/v1/datasets/gongjy/minimind_dataset/repo/tree?Revision=master"
        ):
            files = [
                {"Type": "tree", "Path": "images", "Size": 0},
                {
                    "Type": "blob",
                    "Path": "big.jsonl",
                    "Size": len(server.content),
                    "Sha256": server.sha256,
                },
            ]
            return self.reply(json.dumps({"Code": 200, "Data": {"Files": files}}).encode())
        if self.path == f"/datasets/{REPO}/resolve/main/small.jsonl":
            return self.reply(SMALL)
        if "big.jsonl" in self.path:
            return self.send_file()
        return self.send_error(404)

    def reply_with_page(self, entries):
        """One entry; the link to the next one is that of the hub, even if a mirror is asked."""
        page = int((re.search(r"&cursor=(\d)%3D$", self.path) or [0, 0])[1])
        hub = f"https://huggingface.co/api/datasets/{REPO}/tree/main?recursive=1"
        links = [f'<{hub}>; rel="first"', f'<{hub}&cursor={page + 1}%3D>; rel="next"'][
            : 2 if page < 2 else 1
        ]
        self.reply(json.dumps([entries[page]]).encode(), {"Link": ", ".join(links)})

    def reply(self, body, headers=()):
        self.send_response(200)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self):
        content, start = self.server.content, 0
        if self.server.knows_ranges and (
            match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        ):
            start = int(match[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(
            content[start : start + self.server.cut]
            if self.server.cut is not None
            else content[start:]
        )
        self.server.sent += 1
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.content, server.sha256 = CONTENT, hashlib.sha256(CONTENT).hexdigest()
    server.cut, server.knows_ranges, server.pages, server.log, server.sent = (
        None,
        True,
        False,
        [],
        0,
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for variable in (
        "HF_ENDPOINT",
        "MODELSCOPE_ENDPOINT",
    ):  # the mirror variables are what leads here
        monkeypatch.setenv(variable, f"http://127.0.0.1:{server.server_port}/")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(hub_name, name, folder, **options):
    return download(hub_name, find_file(list_files(hub_name), name), folder, **options)


@pytest.mark.parametrize("hub_name", ["huggingface", "modelscope"])
def test_a_file_arrives_whole_and_is_not_fetched_twice(hub, tmp_path, hub_name):
    path = fetch(hub_name, "big", tmp_path)
    assert path == tmp_path / "big.jsonl" and path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["big.jsonl"]
    fetch(hub_name, "big.jsonl", tmp_path)
    assert hub.sent == 1
    path.write_bytes(CONTENT[:-1] + b"x")  # damaged on disk: same size, other content
    assert fetch(hub_name, "big", tmp_path).read_bytes() == CONTENT and hub.sent == 2


def test_a_list_of_several_pages_is_read_to_its_end(hub):
    whole = list_files("huggingface")
    hub.pages = True
    assert list_files("huggingface") == whole and list(whole) == ["big.jsonl", "small.jsonl"]
    assert [path.partition("?")[2] for path, _ in hub.log[1:]] == [
        "recursive=1",
        *(f"recursive=1&cursor={n}%3D" for n in (1, 2)),
    ]


def test_a_list_that_never_ends_is_left(hub, monkeypatch):
    monkeypatch.setattr(
        module,
        "get_json",
        lambda url: ([{"path": "a", "size": 1, "type": "file"}], '<?recursive=1>; rel="next"'),
    )
    assert list(list_files("huggingface")) == ["a"]


def test_a_small_file_is_checked_by_its_git_hash(hub, tmp_path):
    assert fetch("huggingface", "small", tmp_path).read_bytes() == SMALL
    file = find_file(list_files("huggingface"), "small")
    (tmp_path / "small.jsonl").write_bytes(SMALL[:-2] + b"x\n")
    assert not module.is_intact(tmp_path / "small.jsonl", file)


def test_a_connection_that_breaks_off_is_taken_up_again(hub, tmp_path):
    hub.cut = 300_000
    assert fetch("huggingface", "big", tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in hub.log[1:]] == [
        None,
        "bytes=300000-",
        "bytes=600000-",
        "bytes=900000-",
    ]


def test_the_same_command_resumes_after_an_interruption(hub, tmp_path):
    file = find_file(list_files("huggingface"), "big")
    hub.cut = 0
    part = tmp_path / f"big.jsonl.{hub.sha256[:16]}.part"
    part.write_bytes(CONTENT[:123_456])
    with pytest.raises(
        OSError, match=r"123,456 of 1,024,000 bytes are there; the same command resumes"
    ):
        download("huggingface", file, tmp_path)
    assert part.stat().st_size == 123_456 and not (tmp_path / "big.jsonl").exists()
    hub.cut = None
    assert download("huggingface", file, tmp_path).read_bytes() == CONTENT
    assert hub.log[-1][1] == "bytes=123456-"


def test_a_server_without_ranges_sends_everything_again(hub, tmp_path):
    hub.knows_ranges = False
    (tmp_path / f"big.jsonl.{hub.sha256[:16]}.part").write_bytes(b"y" * 1000)
    assert fetch("huggingface", "big", tmp_path).read_bytes() == CONTENT


def test_a_file_published_anew_starts_from_the_beginning(hub, tmp_path):
    (tmp_path / f"big.jsonl.{hub.sha256[:16]}.part").write_bytes(CONTENT[:5000])
    hub.content = b"new" * 100_000
    hub.sha256 = hashlib.sha256(hub.content).hexdigest()
    assert fetch("huggingface", "big", tmp_path).read_bytes() == hub.content
    assert hub.log[-1][1] is None


def test_wrong_content_is_refused_and_deleted(hub, tmp_path):
    hub.sha256 = "0" * 64
    with pytest.raises(
        OSError, match=r"big\.jsonl: the content is damaged, its checksum is not 0000"
    ):
        fetch("modelscope", "big", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="checksum is not ffff"):  # what the user says counts more
        fetch("modelscope", "big", tmp_path, sha256="F" * 64)


def test_what_is_not_there(hub, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no_such: no such file in the data set. There are: big.jsonl, small.jsonl.",
    ):
        fetch("huggingface", "no_such", tmp_path)
    with pytest.raises(
        OSError, match=r"data set a/b, revision main: there is no such data set.*HTTP 404"
    ):
        list_files("huggingface", repo="a/b")
    with pytest.raises(OSError, match=r"revision v9: .*HTTP 404"):
        list_files("modelscope", revision="v9")


def test_no_connection_names_the_mirror_variable(hub, tmp_path, monkeypatch):
    file = find_file(list_files("huggingface"), "big")
    gone = module.RemoteFile(file.name, "http://127.0.0.1:9/big.jsonl", file.size, file.sha256)
    with pytest.raises(OSError, match=r"no connection.*HF_ENDPOINT=https://.*--hub modelscope"):
        download("huggingface", gone, tmp_path)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        OSError, match=r"no connection.*MODELSCOPE_ENDPOINT=https://.*--hub huggingface"
    ):
        list_files("modelscope")


def test_a_full_disk_is_named_before_the_transfer(hub, tmp_path, monkeypatch):
    file = find_file(list_files("huggingface"), "big")
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000})()
    )
    with pytest.raises(OSError, match=r"0 MB free, big.jsonl needs 1 MB more. Free some"):
        download("huggingface", file, tmp_path)
    assert hub.sent == 0


@pytest.mark.parametrize("name", ["../evil.jsonl", "/tmp/evil.jsonl"])
def test_a_list_cannot_write_outside_the_folder(hub, tmp_path, name):
    with pytest.raises(ValueError, match="outside the folder"):
        download("huggingface", module.RemoteFile(name, "http://127.0.0.1:9/", 1), tmp_path)
