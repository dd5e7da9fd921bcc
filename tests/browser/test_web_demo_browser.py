"""The web page in a real browser: what a visitor sees and clicks. Skipped where there is no
Chromium or no playwright.
"""

import re
import shutil

import pytest

from scripts.web_screenshots import NARROW, ROOT, ask, chromium, open_page, served
from tests.helpers.web_checkpoints import make_save_folder, write_metrics

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="needs a chromium on the path")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_save_folder(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def demo(out):
    with served(out) as address:
        yield address


@pytest.fixture(scope="module")
def scripted(out):
    """The page with an engine that writes what `scripted_page.py` says."""
    with served(out, ROOT / "tests/helpers/scripted_page.py", by_streamlit=True) as address:
        yield address


def figures(page):
    return page.locator(
        "[data-testid=stChatMessage] [data-testid=stCaptionContainer]"
    ).all_inner_texts()


def pick(page, label, option):
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=option).click()
    page.keyboard.press("Escape")
    page.wait_for_timeout(500)


def set_longest_completion(page, tokens):
    page.get_by_text("Sampling").click()
    page.get_by_label("Longest completion (tokens)").fill(str(tokens))
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)


def test_a_conversation_with_two_checkpoints(browser, demo):
    page = open_page(browser, demo)
    set_longest_completion(page, 12)
    ask(page, "hello there")
    [first] = figures(page)
    assert re.match(r"chat_a · \d+ tokens · [\d,]+ tokens/s", first)
    pick(page, "Checkpoint", "more/chat_b")
    ask(page, "and you?")
    assert [line.split(" · ")[0] for line in figures(page)] == ["chat_a", "more/chat_b"]
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_timeout(2000)
    assert len(figures(page)) == 2
    pick(page, "Checkpoint", "lora_a · adapter")
    ask(page, "with an adapter")
    assert figures(page)[2].startswith("lora_a · ")
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("heading", name="MiniMind").wait_for()


def test_a_tool_call_is_shown_with_its_result(browser, scripted):
    page = open_page(browser, scripted)
    page.get_by_role("button", name="Use the calculator").click()  # chooses the tool too
    page.get_by_text("The calculator says 918.").wait_for(timeout=30_000)
    page.get_by_role("button", name="Regenerate").wait_for()
    codes = page.locator("[data-testid=stCode] code").all_inner_texts()
    assert (
        codes == ['{"expression": "27 * 34"}', '{"result": 918}']
        and page.get_by_text("Called calculator").is_visible()
    )


def test_signs_of_an_answer_are_shown_as_it_wrote_them(browser, scripted):
    page = open_page(browser, scripted)
    ask(page, "signs")
    page.get_by_text("bold").wait_for(timeout=30_000)
    shown = page.locator("[data-testid=stMarkdown]").filter(has_text="bold")
    text = shown.inner_text().replace("\u2060", "")
    assert text == "3~5天，7~9天\n:red[a] :smile: :material/home: at 12:30:45\nbold a~b :smile:"
    assert shown.locator("strong").inner_text() == "bold" and not shown.locator("del").count()


def test_thinking_is_folded_until_it_is_clicked(browser, scripted):
    page = open_page(browser, scripted)
    ask(page, "hi")
    assert (
        page.get_by_text("Hello.").is_visible() and not page.get_by_text("Be brief.").is_visible()
    )
    page.get_by_text("Reasoning").click()
    page.get_by_text("Be brief.").wait_for()


def test_stop_ends_an_answer_and_keeps_it(browser, scripted):
    page = open_page(browser, scripted)
    page.locator("[data-testid=stChatInput] textarea").fill("count for ever")
    page.keyboard.press("Enter")
    page.get_by_text("5 6 7").wait_for(timeout=30_000)
    assert not page.get_by_text("Try one of these").is_visible()
    pick(page, "Tools", "get_weather")  # another control, meanwhile: the answer goes on
    page.get_by_text("25 26 27").wait_for(timeout=30_000)
    page.get_by_role("button", name="Stop").last.click()
    page.get_by_role("button", name="Regenerate").wait_for(timeout=10_000)
    kept = page.locator("[data-testid=stChatMessage]").last.inner_text()
    assert "stopped" in kept and "27" in kept
    page.wait_for_timeout(1000)
    assert page.locator("[data-testid=stChatMessage]").last.inner_text() == kept


def test_an_answer_goes_on_while_another_page_is_looked_at(browser, scripted):
    page = open_page(browser, scripted)
    page.locator("[data-testid=stChatInput] textarea").fill("count on")
    page.keyboard.press("Enter")
    page.get_by_text("5 6 7").wait_for(timeout=30_000)
    page.get_by_role("link", name="Curves").click()
    page.locator("[data-testid=stVegaLiteChart]").first.wait_for(timeout=30_000)
    page.get_by_role("link", name="Chat").click()
    page.get_by_text("5 6 7 8 9 10").wait_for(timeout=30_000)
    page.get_by_role("button", name="Stop").last.click()
    page.get_by_role("button", name="Regenerate").wait_for()
    answer = page.locator("[data-testid=stChatMessage]").last.inner_text()
    assert "1 2 3 4 5 6 7 8 9 10" in answer and "stopped" in answer


def test_both_languages_and_what_was_chosen_stays(browser, demo):
    page = open_page(browser, demo)
    page.get_by_role("radio", name="on", exact=True).or_(
        page.get_by_role("button", name="on", exact=True)
    ).first.click()
    pick(page, "Checkpoint", "lora_a · adapter")
    page.get_by_text("中文").click()
    page.get_by_text("从零训练的、属于你自己的语言模型。").wait_for()
    for text in ("模型", "思考", "工具", "系统提示词", "新对话", "试试这些问题", "模型对比"):
        page.get_by_text(text, exact=True).first.wait_for()  # which may take a moment
        assert page.get_by_text(text, exact=True).first.is_visible(), text
    page.get_by_text("lora_a · 适配器").first.wait_for()
    page.get_by_role("link", name="训练曲线").click()
    page.get_by_text("训练损失（奈特/词元）").first.wait_for()
    page.get_by_role("link", name="对话").click()
    page.get_by_text("lora_a · 适配器").first.wait_for()
    page.get_by_text("English").click()
    page.get_by_text("Try one of these").wait_for()
    again = open_page(browser, demo, language="zh")
    again.get_by_text("试试这些问题").wait_for()
    assert not again.get_by_text("Try one of these").is_visible()


def test_two_checkpoints_in_two_columns(browser, demo):
    page = open_page(browser, f"{demo}/compare")
    set_longest_completion(page, 12)
    pick(page, "Right", "more/chat_b")
    ask(page, "hello both")
    assert [line.split(" · ")[0] for line in figures(page)] == ["chat_a", "more/chat_b"]
    left, right = (
        page.locator("[data-testid=stChatMessage]").nth(n).bounding_box() for n in (1, 2)
    )
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 2


def test_curves_follow_a_run_that_is_under_way(browser, demo, out):
    write_metrics(out / "chat_a", 40)
    page = open_page(browser, f"{demo}/curves")
    page.get_by_text("step 40 of 100").first.wait_for()
    assert (
        page.locator(
            "[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg"
        ).count()
        >= 4
    )
    write_metrics(out / "chat_a", 70)
    page.get_by_text("step 70 of 100").wait_for(timeout=15_000)  # without a click


@pytest.mark.parametrize("name", ["", "compare", "curves"])
def test_nothing_is_wider_than_a_telephone(browser, demo, name):
    page = open_page(browser, f"{demo}/{name}", NARROW)
    page.wait_for_timeout(1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW[0]
    for part in page.locator(
        "[data-testid=stMain] button:visible, [data-testid=stVegaLiteChart]"
    ).all():
        box = part.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= NARROW[0] + 1
