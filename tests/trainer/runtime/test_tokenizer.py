"""A network is never read with another tokenizer than its own."""

import shutil
from pathlib import Path

import pytest
import torch

from model.model_minimind import MiniMindForCausalLM
from tests.helpers.checkpoints import random_network
from tests.helpers.other_tokenizer import trained_network, write_other_tokenizer
from trainer.runtime.tokenizer import load_tokenizer, tokenizer_of

ROOT = Path(__file__).resolve().parents[3]
OURS = ROOT / "model"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_other_tokenizer(tmp_path_factory.mktemp("other") / "theirs")


@pytest.fixture
def checkout(tmp_path, other):
    """A folder like theirs: out/chat_64.pth, model/tokenizer.json."""
    shutil.copytree(other, tmp_path / "model")
    (tmp_path / "out").mkdir()
    torch.save(trained_network(other).state_dict(), tmp_path / "out" / "chat_64.pth")
    return tmp_path


def vocabulary(folder):
    return load_tokenizer(folder).get_vocab()


def test_the_tokenizer_in_the_checkout_of_a_pth_file_is_recognised(checkout, other, capsys):
    path = checkout / "out" / "chat_64.pth"
    found = tokenizer_of(MiniMindForCausalLM.from_pth(path), path)
    assert found.get_vocab() == vocabulary(other) != vocabulary(OURS)
    said = capsys.readouterr().out
    assert f"chat_64.pth: the tokenizer of {checkout / 'model'}, with which the network" in said


def test_ours_is_recognised_too_and_wrong_ones_are_passed_over(checkout):
    path = checkout / "out" / "chat_64.pth"
    assert tokenizer_of(trained_network(OURS), path).get_vocab() == vocabulary(OURS)


def test_where_none_fits_it_must_be_named(checkout, other, capsys):
    path = checkout / "out" / "chat_64.pth"
    shutil.rmtree(checkout / "model")
    with pytest.raises(ValueError, match=r"holds no tokenizer, and none .*--tokenizer_path"):
        tokenizer_of(trained_network(other), path)
    with pytest.raises(ValueError, match="none that is here fits"):
        tokenizer_of(random_network(0), path)
    assert tokenizer_of(trained_network(other), path, str(other)).get_vocab() == vocabulary(other)
    assert "warning" not in capsys.readouterr().out
    tokenizer_of(trained_network(other), path, str(OURS))
    assert "is it the one that it was trained with?" in capsys.readouterr().out


def test_one_beside_the_file_is_taken(checkout, other):
    path = checkout / "out" / "chat_64.pth"
    shutil.rmtree(checkout / "model")
    shutil.copytree(other, checkout / "out" / "chat_64_tokenizer")
    assert tokenizer_of(trained_network(other), path).get_vocab() == vocabulary(other)


def test_a_tokenizer_of_another_kind_or_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json: give a folder"):
        load_tokenizer(tmp_path)
    model = random_network(0, vocab_size=100)
    with pytest.raises(ValueError, match="has 6400 entries, the network 100"):
        tokenizer_of(model, tmp_path / "x.pth", str(OURS))
