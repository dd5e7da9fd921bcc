"""The web page, drawn by Streamlit's own test bench: no browser, untrained networks, replies that
are made up.
"""

import re
import shutil
import string
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from streamlit.testing.v1 import AppTest
from transformers import AutoTokenizer

from model.engine import Output
from scripts import web_demo
from scripts.web import engines, text
from scripts.web.conversation import Conversation, Settings, Turn
from scripts.web.drawing import as_written
from scripts.web.run_folders import find_checkpoints
from tests.helpers.checkpoints import ROOT
from tests.helpers.own_tools import write_tools
from tests.helpers.web_checkpoints import make_adapter, make_save_folder, write_metrics

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "27 * 34"}}\n</tool_call>'


@pytest.fixture(autouse=True)
def same_main_module(monkeypatch):
    """The test bench puts the page in the place of `__main__`, which processes that are started
    later would run again.
    """
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    yield make_save_folder(tmp_path_factory.mktemp("out"))
    engines.load_cached.clear()  # ends the threads of the engines


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model")


def web_args(out, **flags):
    return web_demo.parse_args(
        web_demo.WebArgs, ["--save_dir", str(out), "--device", "cpu", *flags]
    )


def app(monkeypatch, out, page="chat", flags=(), **settings):
    """The page of that name as it looks at first, with these settings."""
    monkeypatch.setattr(
        sys, "argv", ["web_demo.py", "--save_dir", str(out), "--device", "cpu", *flags]
    )
    if page == "chat":
        at = AppTest.from_file(str(ROOT / "scripts/web_demo.py"), default_timeout=20)
    else:
        at = AppTest.from_function(
            only_page, kwargs={"name": page, "args": web_args(out)}, default_timeout=20
        )
    for name, value in {"language": "en", "max_tokens": 6, **settings}.items():
        at.session_state[name] = value
    at.run()
    assert not at.exception
    return at


def only_page(name, args):
    import importlib

    importlib.import_module(f"scripts.web.page_{name}").show(args)


def ask(at, message):
    at.chat_input[0].set_value(message).run()
    assert not at.exception
    return at


def shown(at):
    """All text on the page."""
    kinds = (
        at.title,
        at.subheader,
        at.markdown,
        at.text,
        at.caption,
        at.info,
        at.error,
        at.code,
        at.button,
        at.selectbox,
        at.multiselect,
    )
    return "\n".join(str(getattr(one, "label", "") or one.value) for kind in kinds for one in kind)


def progress(at):
    return [bar.proto.text for bar in at.get("progress")]


class FakeEngine:
    """Writes these replies, a few characters at a time and all before the page looks, and remembers
    the prompts.
    """

    def __init__(self, *replies, max_len=2048):
        self.replies, self.prompts, self.params, self.engine = (
            list(replies),
            [],
            [],
            SimpleNamespace(max_len=max_len),
        )

    def submit(self, prompt, params, on_output):
        self.prompts.append(prompt)
        self.params.append(params)
        reply = self.replies.pop(0)
        request = SimpleNamespace(prompt=prompt, sampled=[], num_reused=0, finish_reason=None)
        for start in range(0, len(reply), 5):
            request.sampled.append(1)
            if start + 5 >= len(reply):
                request.finish_reason = "stop"
            on_output(Output(request, reply[start : start + 5]))
        return request

    def cancel(self, request):
        request.finish_reason = "cancelled"


def fake(monkeypatch, tokenizer, *replies, **options):
    """Let every checkpoint answer with these replies; returns the FakeEngine."""
    engine = FakeEngine(*replies, **options)
    monkeypatch.setattr(
        engines, "get", lambda run, base, args: engines.Loaded(run.name, engine, tokenizer, True)
    )
    return engine


# ---- the texts


def test_every_text_is_there_in_both_languages_with_the_same_fields_and_is_used():
    def fields(value):
        return sorted(name for _, name, _, _ in string.Formatter().parse(value) if name)

    for key, (english, chinese) in text.TEXT.items():
        assert english and chinese and fields(english) == fields(chinese), key
    code = "".join(
        path.read_text() for path in (ROOT / "scripts/web").glob("*.py") if path.name != "text.py"
    )
    assert set(re.findall(r"""\bt\(\s*["'](\w+)""", code)) - {"axis_"} <= set(text.TEXT)
    named = set(re.findall(r"""["'](\w+)["']""", code)) | {
        "val_loss",
        "axis_tokens",
        "axis_time",
        "axis_steps",
    }
    assert set(text.TEXT) <= named


def test_the_examples_ask_the_same_in_both_languages():
    assert [tool for _, tool in text.EXAMPLES["en"]] == [tool for _, tool in text.EXAMPLES["zh"]]


# ---- starting it


def test_the_script_starts_streamlit_on_this_machine_alone(monkeypatch):
    started = []
    monkeypatch.setattr("os.execv", lambda program, argv: started.append(argv))
    web_demo.main(["--port", "8602", "--save_dir", "runs"])
    [argv] = started
    assert argv[1:4] == ["-m", "streamlit", "run"] and Path(argv[4]) == ROOT / "scripts/web_demo.py"
    assert "--server.address=127.0.0.1" in argv and "--server.port=8602" in argv
    assert argv[argv.index("--") + 1 :] == ["--port", "8602", "--save_dir", "runs"]
    with pytest.raises(SystemExit):
        web_demo.main(["--port", "0"])


def test_the_configuration_beside_the_script_keeps_it_on_this_machine():
    config = (ROOT / "scripts/.streamlit/config.toml").read_text()
    assert 'address = "127.0.0.1"' in config and "gatherUsageStats = false" in config


# ---- talking


def test_an_answer_comes_with_its_figures_and_can_be_written_again(out, monkeypatch):
    at = app(monkeypatch, out, seed=5)
    assert at.title[0].value == "MiniMind"
    ask(at, "hello")
    assert [message.name for message in at.chat_message] == ["user", "assistant"]
    assert re.search(
        r"chat_a · \d tokens · [\d,]+ tokens/s · prompt \d+ tokens", at.caption[-1].value
    )
    first = at.session_state["chat"].turns[0]
    at.button(key="regenerate").click().run()
    again = at.session_state["chat"].turns[0]
    assert len(at.session_state["chat"].turns) == 1 and not at.exception
    assert (
        first.completions[0].request.sampled != again.completions[0].request.sampled
        and again.attempt == 1
    )
    ask(at, "and more")
    assert len(at.chat_message) == 4
    at.sidebar.button[0].click().run()  # a new conversation
    assert not at.chat_message and at.title


def test_the_same_seed_gives_the_same_answer(out, monkeypatch):
    answers = []
    for _ in range(2):
        at = ask(app(monkeypatch, out, seed=5), "hello")
        answers.append(at.session_state["chat"].turns[0].completions[0].request.sampled)
    assert answers[0] == answers[1]


def test_all_labels_change_with_the_language(out, monkeypatch):
    at = app(monkeypatch, out)
    english = shown(at)
    at.session_state["language"] = "zh"
    chinese = shown(at.run())
    assert "Checkpoint" in english and "模型" in chinese
    for key in ("checkpoint", "tools", "new_chat", "tagline", "try"):
        assert (
            text.translate("en", key) in english
            and text.translate("zh", key) in chinese
            and text.translate("en", key) not in chinese
        )


def test_what_was_chosen_stays_when_the_language_changes(out, monkeypatch):
    at = app(monkeypatch, out)
    at.selectbox(key="picked").set_value("lora_a").run()
    at.segmented_control(key="thinking").set_value("on").run()
    at.segmented_control(key="language").set_value("zh").run()
    assert (
        at.selectbox(key="picked").value == "lora_a"
        and at.segmented_control(key="thinking").value == "on"
    )


def test_checkpoints_adapters_and_pretrained_ones_can_be_picked(out, monkeypatch):
    at = app(monkeypatch, out)
    picker = at.selectbox(key="picked")
    assert picker.options == [
        "chat_a",
        "lora_a · adapter",
        "more/chat_b",
        "more/pretrain · continues text",
    ]
    ask(at, "hello")
    at.selectbox(key="picked").set_value("lora_a").run()
    ask(at, "hello")
    assert "lora_a · 6 tokens" in at.caption[-1].value
    at.selectbox(key="picked").set_value("more/pretrain").run()
    ask(at, "once")
    turn = at.session_state["chat"].turns[-1]
    assert turn.completions[0].request.prompt == [0, *turn.loaded.tokenizer("once").input_ids]


def test_an_adapter_that_taught_to_chat_brings_its_template(out, tmp_path):
    shutil.copytree(out / "more/pretrain", tmp_path / "pretrain")
    for name in ("lora_raw", "lora_chat"):
        make_adapter(tmp_path / name, "pretrain")
    (tmp_path / "lora_chat" / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    runs = {run.name: run for run in find_checkpoints(tmp_path)}
    loaded = {name: engines.get(run, run.base, web_args(tmp_path)) for name, run in runs.items()}
    assert {name: one.chats for name, one in loaded.items()} == {
        "lora_chat": True,
        "lora_raw": False,
        "pretrain": False,
    }
    tokens = loaded["lora_chat"].encode([{"role": "user", "content": "hi"}], None, None)
    assert loaded["lora_chat"].tokenizer.decode(tokens) == "<hi>"


def test_an_adapter_without_its_base_asks_for_one(out, monkeypatch, tmp_path):
    shutil.copytree(out / "chat_a", tmp_path / "renamed")
    make_adapter(tmp_path / "lora", "gone")
    at = app(monkeypatch, tmp_path)
    at.selectbox(key="picked").set_value("lora").run()
    assert at.selectbox(key="picked_base").value == "renamed"
    assert "lora · 6 tokens" in ask(at, "hello").caption[-1].value


def test_where_there_is_nothing_the_page_says_what_to_do(monkeypatch, tmp_path, out):
    assert "no checkpoint" in app(monkeypatch, tmp_path).info[0].value
    shutil.copytree(out / "chat_a", tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"no weights")
    assert "damaged cannot be loaded" in app(monkeypatch, tmp_path).error[0].value


# ---- tools and thinking


def test_a_tool_that_is_called_is_run_and_its_result_handed_back(out, monkeypatch, tokenizer):
    engine = fake(monkeypatch, tokenizer, CALL, "27 * 34 = 918.")
    at = ask(app(monkeypatch, out, tools=["calculator"]), "27 * 34?")
    assert "Called `calculator`" in shown(at)
    assert [code.value for code in at.code] == ['{"expression": "27 * 34"}', '{"result": 918}']
    assert "27 * 34 = 918." in shown(at)
    assert '"name": "calculator"' in tokenizer.decode(engine.prompts[0])
    assert '<tool_response>\n{"result": 918}\n</tool_response>' in tokenizer.decode(
        engine.prompts[1]
    )


def test_tools_are_not_run_for_ever_nor_without_being_chosen(out, monkeypatch, tokenizer):
    fake(monkeypatch, tokenizer, *[CALL] * 9)
    at = ask(app(monkeypatch, out, tools=["calculator"]), "27 * 34?")
    assert len(at.code) == 8 and "too many rounds of tools" in at.caption[-1].value
    fake(monkeypatch, tokenizer, CALL)
    at = ask(app(monkeypatch, out), "27 * 34?")
    assert not at.code and as_written(CALL) in shown(at)


def test_tools_of_the_users_own_file(out, monkeypatch, tokenizer, tmp_path):
    path = write_tools(tmp_path)
    call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>'
    engine = fake(monkeypatch, tokenizer, call, "It is 42.")
    at = app(monkeypatch, out, flags=["--tools", str(path)])
    assert at.multiselect[0].options[-2:] == ["count_letter", "multiply"]
    at.multiselect[0].select("multiply")
    at = ask(at, "6 times 7?")
    assert [code.value for code in at.code] == ['{"a": 6, "b": 7}', '{"result": 42}']
    assert '"multiply"' in tokenizer.decode(
        engine.prompts[0]
    ) and '{"result": 42}' in tokenizer.decode(engine.prompts[1])
    path.write_text(
        "broken("
    )  # while the page is open: it says so, and continues with the toy world's
    at.run()
    assert "SyntaxError" in at.error[0].value and at.multiselect[0].options[-1] == "count_letter"


def test_a_call_that_fails_is_shown_as_such(out, monkeypatch, tokenizer):
    fake(monkeypatch, tokenizer, CALL.replace("27 * 34", "a secret"), "Sorry.")
    assert "`calculator` failed" in shown(ask(app(monkeypatch, out, tools=["calculator"]), "?"))


def test_thinking_is_folded_away(out, monkeypatch, tokenizer):
    engine = fake(monkeypatch, tokenizer, "2 + 7 = 9\n</think>\n\nIt is 19.")
    at = ask(app(monkeypatch, out, thinking="on"), "12 + 7?")
    status = at.status[0]
    assert (
        status.label == "Reasoning"
        and status.markdown[0].value == "2 + 7 = 9"
        and not status.proto.expanded
    )
    assert "It is 19." in [markdown.value for markdown in at.markdown]
    assert tokenizer.decode(engine.prompts[0]).endswith("<think>\n")


def test_the_settings_reach_the_engine(out, monkeypatch, tokenizer):
    engine = fake(monkeypatch, tokenizer, "yes")
    ask(
        app(
            monkeypatch,
            out,
            temperature=0.3,
            top_p=0.5,
            top_k=7,
            max_tokens=9,
            seed=4,
            system="Be kind.",
            thinking="off",
        ),
        "?",
    )
    [params] = engine.params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens, params.seed) == (
        0.3,
        0.5,
        7,
        9,
        4,
    )
    prompt = tokenizer.decode(engine.prompts[0])
    assert prompt.startswith("<|im_start|>system\nBe kind.") and prompt.endswith(
        "<think>\n\n</think>\n\n"
    )


# ---- conversations without a page


def loaded(out, name="chat_a"):
    return engines.get(
        next(run for run in find_checkpoints(out) if run.name == name), None, web_args(out)
    )


def finish(turn):
    end = time.monotonic() + 20
    while turn.is_running and time.monotonic() < end:
        turn.advance(0.05)
    assert not turn.is_running
    return turn


def test_a_stopped_answer_keeps_what_there_is_and_frees_the_engine(out):
    one, talk = loaded(out), Conversation()
    talk.ask(one, "hello", Settings(max_tokens=1500, seed=1))
    while not talk.turns[0].stats()["tokens"]:
        talk.turns[0].advance(0.05)
    talk.stop()
    assert not talk.is_running and talk.turns[0].note == "was_stopped"
    talk.ask(one, "again", Settings(max_tokens=3, seed=1))
    finish(talk.turns[1])
    assert talk.turns[1].history[0]["content"] == "hello" and len(talk.turns[1].history) == 2
    assert talk.turns[0].completions[0].request.finish_reason == "cancelled"


def test_a_conversation_that_grows_too_long_loses_its_oldest_rounds(tokenizer):
    engine = FakeEngine("short", "short", max_len=200)
    one, talk = engines.Loaded("fake", engine, tokenizer, True), Conversation()
    talk.ask(one, "word " * 80, Settings())
    finish(talk.turns[0])
    talk.ask(one, "word " * 60, Settings())
    assert finish(talk.turns[1]).num_left_out == 1 and len(engine.prompts[1]) + 64 <= 200


def test_rounds_left_out_are_counted_once_however_many_replies_a_turn_has(tokenizer):
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6 * 7"}}\n</tool_call>'
    engine = FakeEngine("short", call, "42", max_len=500)
    one, talk = engines.Loaded("fake", engine, tokenizer, True), Conversation()
    talk.ask(one, "word " * 240, Settings())
    finish(talk.turns[0])
    talk.ask(one, "word " * 30, Settings(tools=("calculator",)))
    assert finish(talk.turns[1]).num_left_out == 1 and len(talk.turns[1].completions) == 2


def test_a_message_that_is_too_long_by_itself_is_refused_with_the_reason(out):
    turn = Turn(loaded(out), [], "word " * 3000, Settings())
    assert not turn.is_running and "shorten it" in turn.error


def test_a_checkpoint_that_was_trained_on_is_loaded_anew(out):
    before = loaded(out)
    assert loaded(out) is before
    (out / "chat_a/model.safetensors").touch()
    assert loaded(out) is not before


def test_only_a_few_checkpoints_stay_loaded(out):
    runs = find_checkpoints(out)[: engines.MOST_LOADED + 1]
    first, *others = [engines.get(run, run.base, web_args(out)) for run in runs]
    end = time.monotonic() + 10
    while first.engine.thread.is_alive() and time.monotonic() < end:
        time.sleep(0.02)
    assert not first.engine.thread.is_alive() and all(
        one.engine.thread.is_alive() for one in others
    )


# ---- the other pages


def test_two_checkpoints_are_compared(out, monkeypatch):
    at = ask(app(monkeypatch, out, "compare", right="more/chat_b", seed=2), "hello")
    assert [message.name for message in at.chat_message] == ["user", "assistant", "assistant"]
    figures = [caption.value for caption in at.caption]
    assert figures[0].startswith("chat_a · 6 tokens") and figures[1].startswith(
        "more/chat_b · 6 tokens"
    )
    left, right = (
        at.session_state[f"compare_{side}"].turns[0].completions[0].request.sampled
        for side in ("left", "right")
    )
    assert left != right


def test_curves_of_the_chosen_runs_are_drawn_and_follow_them(out, monkeypatch):
    for name in ("chat_a", "more/chat_b"):
        write_metrics(out / name, 40)  # now: a run that wrote long ago is not running
    at = app(monkeypatch, out, "curves", runs=["chat_a", "more/chat_b"])
    assert [one.value.strip("*") for one in at.markdown if one.value.startswith("**")] == [
        "Training loss (nats per token)",
        "Validation (bits per byte)",
        "Target tokens per second",
        "Learning rate",
    ]
    assert len(at.get("vega_lite_chart")) == 4
    assert progress(at) == ["step 40 of 100"] * 2 and "running" in shown(at)
    assert "every 2 s" in at.caption[-1].value
    write_metrics(out / "chat_a", 100)
    at.session_state["language"] = "zh"
    at.run()
    assert progress(at)[0] == "第 100 / 100 步" and "验证集（比特/字节）" in shown(at)
    at.multiselect(key="metrics").set_value(["loss"]).run()
    assert len(at.get("vega_lite_chart")) == 1
    at.multiselect(key="runs").set_value([]).run()
    assert "至少选择一次" in at.info[0].value and not at.exception


def test_without_runs_the_page_of_curves_says_so(monkeypatch, tmp_path):
    assert "no run" in app(monkeypatch, tmp_path, "curves").info[0].value


def test_signs_that_streamlit_would_obey_are_escaped_outside_of_code():
    assert as_written("3~5 `a~b`\nx\n\ny") == "3\\~5 `a~b`  \nx\n\ny"
    assert as_written(":red[a] http://b") == "\\:red[a] http://b"
    assert as_written(":smile: :material/home:") == ":\u2060smile: :\u2060material/home:"
    code = "```\n:smile: ~\n"  # still being written
    assert as_written(code) == code
