"""What the web page finds in a save folder."""

import json

import pytest

from scripts.web.run_folders import find_checkpoints, find_runs
from tests.helpers.web_checkpoints import make_adapter, make_save_folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_save_folder(tmp_path_factory.mktemp("out"))


def test_checkpoints_and_adapters_are_found_two_levels_deep(out):
    found = {run.name: run for run in find_checkpoints(out)}
    assert list(found) == [
        "chat_a",
        "lora_a",
        "more/chat_b",
        "more/pretrain",
    ]  # those that chat first
    assert [run.chats for run in found.values()] == [True, True, True, False]
    assert [run.kind for run in found.values()] == ["model", "adapter", "model", "model"]
    assert found["lora_a"].base == out / "chat_a" and found["chat_a"].base is None
    assert len(found["lora_a"].stamp) == 2  # its own weights and those of its base


@pytest.mark.parametrize("base", ["more/chat_b", "elsewhere/chat_b", "{out}/more/chat_b"])
def test_the_base_of_an_adapter_is_found_as_path_or_beside_it(out, base):
    name = f"more/lora_{len(base)}"
    make_adapter(out / name, base.format(out=out))
    assert (
        next(run for run in find_checkpoints(out) if run.name == name).base == out / "more/chat_b"
    )


def test_an_adapter_whose_base_is_gone_still_is_offered(out):
    make_adapter(out / "lora_lost", "nowhere/at_all")
    assert next(run for run in find_checkpoints(out) if run.name == "lora_lost").base is None


def test_an_adapter_chats_if_it_or_its_base_does(out):
    for name in ("lora_raw", "lora_chat"):
        make_adapter(out / name, "more/pretrain")
    (out / "lora_chat" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    chats = {run.name: run.chats for run in find_checkpoints(out)}
    assert chats["lora_chat"] and not chats["lora_raw"] and chats["lora_a"]


def test_folders_without_weights_and_damaged_files_are_passed_over(out):
    (out / "empty").mkdir()
    (out / "empty/config.json").write_text("{")
    (out / "broken").mkdir()
    (out / "broken/adapter_config.json").write_text(json.dumps(["no", "object"]))
    names = [run.name for run in find_checkpoints(out)]
    assert "empty" not in names and "broken" not in names
    assert find_checkpoints(out / "missing") == [] and find_runs(out / "missing") == {}


def test_runs_come_with_the_newest_first(out):
    (out / "more/chat_b/metrics.jsonl").touch()
    assert next(iter(find_runs(out))) == "more/chat_b"
