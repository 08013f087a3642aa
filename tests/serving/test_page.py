"""The chat page in a real browser, in front of the native engine."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
from torch import Tensor

from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.serving.slots import Slots
from tests.serving.browser import browser, page_at
from tests.serving.made_servers import save_model, serving, start

STEP_SECONDS = 0.03  # of a token, so that there is time to look at a stream
LIMIT = 24
THOUGHT = {0: "<think>", 9: "</think>"}  # every answer begins with nine tokens of it


@pytest.fixture(scope="module")
def started():
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "hf")


@pytest.fixture(scope="module")
def address(folder):
    real = Slots._choose
    tokenizer = load_tokenizer(folder)
    marks = {at: tokenizer.encode(mark)[0] for at, mark in THOUGHT.items()}

    def choose(self: Slots, logits: Tensor) -> Tensor:
        time.sleep(STEP_SECONDS)
        tokens = real(self, logits)
        for i, row in enumerate(self._rows):
            tokens[i] = marks.get(row.count, tokens[i])
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slots, "_choose", choose)
        with serving(start(folder, "native")) as url:
            yield url


@pytest.fixture
def page(started, address):
    with page_at(started, address) as one:
        set_up(one)
        yield one


def set_up(page, temperature: str = "0") -> None:
    """Greedy answers of at most `LIMIT` tokens."""
    page.click("#gear")
    page.fill("#temperature", temperature)
    page.fill("#limit", str(LIMIT))
    page.click("#gear")


def ask(page, question: str, *, wait: bool = True) -> None:
    before = page.locator(".turn.assistant").count()
    page.fill("#input", question)
    page.press("#input", "Enter")
    page.locator(".turn.assistant").nth(before).wait_for(state="attached")
    if wait:
        page.get_by_role("button", name="Send").wait_for()


def answered(address: str, *messages: str) -> dict[str, str]:
    """Thinking and answer that the API gives, in the page's settings."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    body = {"messages": said, "temperature": 0, "max_tokens": LIMIT}
    message = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
    return {"thinking": message.get("reasoning_content") or "", "content": message["content"]}


def shown(page) -> dict[str, str]:
    """Thinking and answer of the last turn, folded or not."""
    turn = page.locator(".turn.assistant").last
    return {
        "thinking": turn.locator("details .body").text_content(),
        "content": turn.locator("> .body").text_content(),
    }


def test_an_answer_streams_folds_its_thinking_stops_and_survives_a_reload(page, address):
    question = "What is 4 + 3?"
    ask(page, question, wait=False)
    seen = {sum(map(len, shown(page).values())) for _ in range(8) if page.wait_for_timeout(60) is None}
    assert len(seen) > 2, "the text grows while it is written"
    page.get_by_role("button", name="Send").wait_for()
    assert shown(page) == answered(address, question)

    thought = page.locator("details .body")
    assert not thought.is_visible()
    page.get_by_text("Thinking").click()
    assert thought.is_visible()

    ask(page, "And then?", wait=False)
    page.wait_for_timeout(5 * 1000 * STEP_SECONDS)
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").wait_for()
    while httpx.get(f"{address}/health").json()["writing"]:
        time.sleep(0.02)
    turns = page.locator(".turn").all_text_contents()
    page.reload()
    page.get_by_text("Stopped.").wait_for()
    assert page.locator(".turn").all_text_contents() == turns


@pytest.mark.slow
def test_a_reload_in_the_middle_keeps_what_was_written(page):
    ask(page, "What is 4 + 3?", wait=False)
    page.wait_for_timeout(10 * 1000 * STEP_SECONDS)
    page.reload()
    assert page.locator(".turn.user").inner_text() == "What is 4 + 3?"
    assert any(shown(page).values())


@pytest.mark.slow
def test_retry_asks_the_last_question_again_and_copy_copies(page, address):
    question = "What is 4 + 3?"
    ask(page, question)
    first = shown(page)
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("() => navigator.clipboard.readText()").replace("\r\n", "\n") == first["content"]
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Send").wait_for()
    assert shown(page) == first
    assert page.locator(".turn").count() == 2


@pytest.mark.slow
def test_system_prompt_temperature_and_earlier_turns_are_sent_and_settings_stay(page):
    page.click("#gear")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.35")
    ask(page, "one")
    first = shown(page)["content"]
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "two")
    body = sent.value.post_data_json
    assert body["temperature"] == 0.35 and body["max_tokens"] == LIMIT and body["model"] == "hf"
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("system", "Be brief."), ("user", "one"), ("assistant", first), ("user", "two"),
    ]  # fmt: skip
    page.reload()
    assert page.input_value("#system") == "Be brief." and page.input_value("#temperature") == "0.35"


@pytest.mark.slow
def test_a_question_that_is_too_long_is_told_and_asked_no_more(page):
    ask(page, "abc " * 200)
    assert "the model's context is 128" in page.locator(".error").inner_text()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "one")
    assert [m["content"] for m in sent.value.post_data_json["messages"]] == ["one"]


@pytest.mark.slow
def test_markup_stays_text(page):
    text = '<img src=x onerror="document.title=1"><b>x</b>'
    ask(page, text)
    assert page.locator(".turn.user").inner_text() == text
    assert page.locator("main img, main b").count() == 0 and page.title() == "hf"


@pytest.mark.slow
def test_keyboard_alone(page):
    page.reload()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#input") == "one\ntwo"
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.get_by_text("Stopped.").wait_for()
    for _ in range(2):
        page.keyboard.press("Shift+Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Retry"
    page.keyboard.press("Control+Shift+O")
    assert page.locator(".turn").count() == 0
    assert page.evaluate("() => document.activeElement.id") == "input"


BACKGROUND = "() => getComputedStyle(document.body).backgroundColor"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_on_a_phone_and_a_screen(started, address, scheme, width):
    with page_at(started, address, color_scheme=scheme, viewport={"width": width, "height": 700}) as page:
        set_up(page)
        ask(page, "a word that is l" + "o" * 70 + "ng")
        page.click("#gear")
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        brightness = sum(map(int, page.evaluate(BACKGROUND)[4:-1].split(", "))) / 3
        assert brightness > 200 if scheme == "light" else brightness < 60
        before = page.evaluate(BACKGROUND)
        page.get_by_role("button", name="Light or dark").click()
        after = page.evaluate(BACKGROUND)
        assert after != before
        page.reload()
        assert page.evaluate(BACKGROUND) == after


@pytest.mark.slow
def test_a_server_with_a_key_is_asked_with_it(started, folder):
    with (
        serving(start(folder, "native"), api_key="secret") as address,
        page_at(started, address) as page,
    ):
        page.locator("#key").wait_for()  # the settings open by themselves
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.get_by_role("heading", name="hf").wait_for()
        ask(page, "one")
        assert any(shown(page).values())


@pytest.mark.slow
def test_a_server_that_is_gone_is_told(started, folder):
    with serving(start(folder, "native")) as address:
        context = started.new_context()
        page = context.new_page()
        page.goto(address)
    page.fill("#input", "one")
    page.press("#input", "Enter")
    page.get_by_text("The server cannot be reached").wait_for()
    context.close()
