import json
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest

from trainer.runtime.tracker import open_tracker

BEFORE = [
    {"step": step, "loss": 9.0 - step, "seconds": step / 2} for step in range(1, 9)
]  # and then it crashes
VALIDATION = {"step": 4, "val_bpb/held_out": 2.5, "seconds": 2.1}  # where its last checkpoint is
BEFORE.insert(4, VALIDATION)
AFTER = [{"step": step, "loss": 9.0 - step, "seconds": step / 2} for step in range(5, 11)]


def settings(**changes):
    defaults = {
        "use_wandb": False,
        "tracker": "none",
        "wandb_project": "MiniMind",
        "wandb_run_name": "",
    }
    return SimpleNamespace(**defaults | changes)


def write_metrics(folder):
    """The record of the process that crashed, not yet cut."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BEFORE))


def crash_and_resume(folder, name):
    """Eight steps, the process is lost after a checkpoint at step 4, another goes on to step 10."""
    write_metrics(folder)  # an earlier run of that name: none of a new one's business
    first = open_tracker(settings(tracker=name), folder, {"learning_rate": 0.1}, first=0)
    for row in BEFORE:
        first.log(row, row["step"])
    lost = json.loads((folder / "tracker.json").read_text())["id"]
    first.close(failed=True)
    with open_tracker(settings(tracker=name), folder, {"learning_rate": 0.1}, first=4) as second:
        for row in AFTER:
            second.log(row, row["step"])
    assert json.loads((folder / "tracker.json").read_text())["id"] == lost
    return lost


def leveldb_log(path, skip=7):
    """The records of a log file: blocks of 32 KB, each record in pieces with checksum, length and
    kind before them.
    """
    data, at, record = path.read_bytes(), skip, b""
    while at + 7 <= len(data):
        room = 2**15 - at % 2**15
        _, length, kind = struct.unpack("<IHB", data[at : at + 7]) if room >= 7 else (0, 0, 0)
        if not kind:  # the end of a block
            at += room
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""


def wandb_history(path):
    from wandb.proto import wandb_internal_pb2

    for data in leveldb_log(path):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            yield {
                name: value for name, value in row.items() if name not in ("_runtime", "_timestamp")
            }


def test_wandb_offline(tmp_path, monkeypatch):
    """The newest folder has the whole run, for syncing. Numbers of one step are one row."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    lost = crash_and_resume(tmp_path / "pretrain_tiny", "wandb")
    wandb.teardown()  # until its process has written everything
    folders = sorted((tmp_path / "pretrain_tiny" / "wandb").glob(f"offline-run-*-{lost}*"))
    assert len(folders) == 2
    histories = [list(wandb_history(folder / f"run-{lost}.wandb")) for folder in folders]
    whole = next(rows for rows in histories if rows[-1]["_step"] == 10)
    assert [row["_step"] for row in whole] == list(range(1, 11))
    assert [row["loss"] for row in whole] == [9.0 - step for step in range(1, 11)]
    assert whole[3] == {"_step": 4, "loss": 5.0, "val_bpb/held_out": 2.5, "seconds": 2.1}


def swanlab_scalars(path):
    """{metric: its steps} of a run's file."""
    from swanlab.proto.swanlab.record.v1 import record_pb2

    found = {}
    for data in leveldb_log(path):
        record = record_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "scalar":
            found.setdefault(record.scalar.key, []).append(record.scalar.step)
    return found


def test_swanlab_offline(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "root"))
    lost = crash_and_resume(tmp_path / "pretrain_tiny", "swanlab")
    files = list((tmp_path / "pretrain_tiny" / "swanlog").glob(f"run-*-{lost}*/run-{lost}.swanlab"))
    found = [swanlab_scalars(file) for file in files]
    whole = next(metrics for metrics in found if metrics["loss"][-1] == 10)
    assert whole["loss"] == list(range(1, 11)) and whole["val_bpb/held_out"] == [4]


def test_tensorboard(tmp_path):
    """Drawn from one folder, every step is there once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "pretrain_tiny"
    run = folder / "tensorboard" / crash_and_resume(folder, "tensorboard")
    events = EventAccumulator(str(run)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, 9.0 - step) for step in range(1, 11)
    ]
    assert [event.step for event in events.Scalars("val_bpb/held_out")] == [4]
    assert set(events.Tags()["scalars"]) == {"loss", "seconds", "val_bpb/held_out"}


def test_a_tracker_that_was_not_there_before_gets_the_whole_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_metrics(tmp_path)
    with open_tracker(settings(tracker="tensorboard"), tmp_path, {}, first=4) as tracker:
        tracker.log({"loss": 4.0}, 5)
    (run,) = (tmp_path / "tensorboard").iterdir()
    assert [event.step for event in EventAccumulator(str(run)).Reload().Scalars("loss")] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_steps_that_are_repeated_replace_the_first_try(tmp_path):
    """The run goes back to step 4 within one process: the curve is that of the second try."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_tracker(settings(tracker="tensorboard"), tmp_path, {}, first=0) as tracker:
        for step in range(1, 9):
            tracker.log({"loss": 9.0 - step}, step)
        write_metrics(tmp_path)
        tracker.go_back(4)
        for step in range(5, 8):
            tracker.log({"loss": 0.5}, step)
    (run,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(run)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [
        (1, 8),
        (2, 7),
        (3, 6),
        (4, 5),
        (5, 0.5),
        (6, 0.5),
        (7, 0.5),
    ]


@pytest.fixture
def fake_wandb(monkeypatch):
    """A wandb that remembers what it was given; `step` is the first that its server lacks."""

    class FakeRun(SimpleNamespace):
        def log(self, numbers, step):
            self.rows.append((step, numbers))

        def finish(self, exit_code):
            self.exit_code = exit_code

    fake = ModuleType("wandb")
    fake.run = FakeRun(rows=[], step=0, exit_code=None)
    fake.init = lambda **given: setattr(fake, "given", given) or fake.run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_online_only_what_the_server_lacks_is_sent(tmp_path, fake_wandb):
    """Of a server that has steps up to 2: the rest of the record is sent, then what is new; of one
    that has 8: only that.
    """
    write_metrics(tmp_path)
    for has, steps in ((2, [3, 4, 4, 5, 6, 7, 8, 9, 10]), (8, [9, 10])):
        fake_wandb.run.step, fake_wandb.run.rows = has + 1, []
        tracker = open_tracker(settings(use_wandb=True), tmp_path, {}, first=4)
        for row in AFTER:
            tracker.log(row, row["step"])
        assert [step for step, _ in fake_wandb.run.rows] == steps


def test_the_name_the_project_and_the_id(tmp_path, fake_wandb):
    ids = []
    for first in (0, 7, 0):
        open_tracker(settings(use_wandb=True), tmp_path / "sft", {}, first=first)
        ids.append(fake_wandb.given["id"])
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 21
    given = fake_wandb.given
    assert (given["name"], given["project"], given["resume"]) == ("sft", "MiniMind", "allow")
    open_tracker(
        settings(tracker="wandb", wandb_run_name="mine", wandb_project="P"),
        tmp_path,
        {"a": 1},
        first=0,
    )
    given = fake_wandb.given
    assert (given["name"], given["project"], given["config"]) == ("mine", "P", {"a": 1})


def test_only_numbers_are_sent_and_the_end_is_told(tmp_path, fake_wandb):
    tracker = open_tracker(settings(use_wandb=True), tmp_path, {}, first=0)
    tracker.log(
        {"step": 3, "loss": 1.0, "text": "x", "flag": True, "inf": float("inf"), "none": None}, 3
    )
    tracker.log({"text": "x"}, 4)
    tracker.close()
    assert fake_wandb.run.rows == [(3, {"loss": 1.0})] and fake_wandb.run.exit_code == 0
    with pytest.raises(KeyError), open_tracker(settings(use_wandb=True), tmp_path, {}, first=0):
        raise KeyError
    assert fake_wandb.run.exit_code == 1


def test_a_failing_tracker_costs_one_warning(tmp_path, fake_wandb, capsys):
    tracker = open_tracker(settings(use_wandb=True), tmp_path, {}, first=0)
    fake_wandb.run.rows = None  # so that log fails
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.go_back(1)
    tracker.close()
    assert (
        capsys.readouterr().out.count("warning: the tracker failed (AttributeError") == 1
        and fake_wandb.run.exit_code is None
    )


def test_one_that_cannot_start_says_what_to_do(tmp_path, fake_wandb):
    def refuse(**given):
        raise RuntimeError("no API\nkey.")

    fake_wandb.init = refuse
    with pytest.raises(
        ValueError,
        match=r"--tracker wandb could not start: no API key. Log in with .* WANDB_MODE=offline",
    ):
        open_tracker(settings(use_wandb=True), tmp_path, {}, first=0)


def test_no_tracker(tmp_path):
    with open_tracker(settings(), tmp_path, {}, first=0) as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert tracker.backend is None and not list(tmp_path.iterdir())
