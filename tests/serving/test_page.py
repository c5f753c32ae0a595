"""The chat page, driven in headless Chromium; the engine is scripted.

Needs playwright's Python package and a chromium: set GLM45_CHROMIUM, or have one at /usr/bin/chromium.
"""

import re

import pytest

TOOLS = '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]'
CALL = (
    "<think>Look it up.</think>\nOne moment.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
    "<arg_value>Paris</arg_value>\n</tool_call><|observation|>"
)

pytestmark = pytest.mark.slow


@pytest.fixture
def page(browser, shared_server, engine):
    """A fresh page of the shared server; any error in its console fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(shared_server.url)
    page.locator("#model", has_text="tiny").wait_for()
    yield page
    context.close()
    assert not [problem for problem in problems if "status of" not in problem], problems
    assert all(url.startswith((shared_server.url, "data:")) for url in requests), "the page loads from elsewhere"


def say(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def answer(page, number=0):
    """Wait for the end of an answer and return its text."""
    page.locator(".assistant .figures").nth(number).filter(has_text=re.compile("tokens|stopped")).wait_for()
    return page.locator(".assistant .prose").nth(number).inner_text()


def test_send_and_stream(page, engine, tokenizer):
    """A question streams an answer, word by word, with figures at the end; a second one carries the first."""
    engine.text, engine.delay = "<think></think>\n**Bold** words come one by one.<|user|>", 0.03
    say(page, "hi there")
    page.locator(".assistant .prose", has_text="Bold").wait_for()
    assert page.locator("#send").get_attribute("aria-label") == "Stop (Esc)"
    assert answer(page) == "Bold words come one by one."
    assert page.locator(".assistant strong").inner_text() == "Bold"
    assert "tokens/s" in page.locator(".assistant .figures").inner_text()
    engine.delay = 0.0
    say(page, "more")
    answer(page, 1)
    prompt = tokenizer.decode(engine.asked[-1].prompt)
    assert prompt.index("hi there") < prompt.index("**Bold**") < prompt.index("more")


def test_thinking_is_folded_once_the_answer_begins(page, engine):
    """Reasoning shows while it is written, folds when the answer begins, and opens at a click."""
    engine.text, engine.delay = "<think>" + "thought " * 20 + "</think>\n" + "word " * 20 + "<|user|>", 0.02
    say(page, "hi")
    page.locator("details.fold.live[open]").wait_for()
    answer(page)
    fold = page.locator("details.fold")
    assert fold.get_attribute("open") is None
    assert fold.locator("summary").inner_text().startswith("Thought")
    fold.locator("summary").click()
    assert "thought thought" in fold.locator(".inside").inner_text()


@pytest.mark.parametrize("how", ["key", "button"])
def test_stop(page, engine, how):
    """Escape or the button ends the answer, keeps what there is, and the engine hears of it."""
    engine.text, engine.delay = "<think></think>\n" + "word " * 500, 0.02
    say(page, "hi")
    page.locator(".assistant .prose", has_text="word word").wait_for()
    page.keyboard.press("Escape") if how == "key" else page.click("#send")
    assert "word word" in answer(page)
    assert "stopped" in page.locator(".assistant .figures").inner_text()
    while engine.num_open:
        page.wait_for_timeout(20)


@pytest.mark.parametrize("how", ["stop", "length"])
def test_a_call_that_is_cut_short_is_dropped(page, engine, how):
    """Stopped or at the token limit, half a call leaves what was said before it, and the chat goes on."""
    page.click("#open-settings")
    page.fill("textarea[name=tools]", TOOLS)
    page.click("#close-settings")
    engine.text, engine.delay = CALL.partition("</arg_value>")[0] + " or" * 300, 0.02 if how == "stop" else 0.0
    say(page, "weather?")
    if how == "stop":
        page.locator(".call").wait_for()
        page.keyboard.press("Escape")
    assert answer(page) == "One moment."
    assert page.locator(".call").count() == 0
    engine.text, engine.delay = "<think></think>\nIt is sunny.<|user|>", 0.0
    say(page, "and now?")
    page.get_by_text("It is sunny.").wait_for()


def test_the_share_of_accepted_drafts_is_shown(page, engine):
    """Of the drafts made while the answer was written."""
    engine.text = lambda prompt, index: engine.stats_now.update(drafted_tokens=8, accepted_tokens=6) or "ok<|user|>"
    say(page, "hi")
    answer(page)
    assert "MTP 75 % accepted" in page.locator(".assistant .figures").inner_text()


def test_only_changed_settings_are_sent(page, engine):
    """What nobody touched is the server's to choose: a checkpoint brings its own defaults."""

    def sent():
        with page.expect_request("**/v1/chat/completions") as asked:
            say(page, "hi")
        return asked.value.post_data_json

    names = ("temperature", "top_p", "seed", "thinking")
    assert not set(names) & set(sent())
    answer(page)
    page.click("#open-settings")
    assert page.locator(".slider output").all_inner_texts() == ["default", "default"]
    page.locator("input[name=top_p]").fill("0.5")
    page.click("#close-settings")
    request = sent()
    assert request["top_p"] == 0.5
    assert "temperature" not in request


def test_tool_call_and_result(page, engine, tokenizer):
    """A call shows name and arguments, takes a result, and the answer goes on from it."""
    page.click("#open-settings")
    page.fill("textarea[name=tools]", TOOLS)
    page.click("#close-settings")
    assert page.locator("#tools-label").inner_text() == "1 tool"
    engine.text = CALL
    say(page, "weather?")
    page.locator(".call .result textarea").wait_for()
    assert "get_weather" in page.locator(".call-head").inner_text()
    assert '"city": "Paris"' in page.locator(".call > pre").inner_text()
    engine.text = "<think></think>\nIt is sunny.<|user|>"
    page.fill(".call .result textarea", "sun")
    page.press(".call .result textarea", "Enter")
    page.get_by_text("It is sunny.").wait_for()
    assert "<tool_response>\nsun\n</tool_response>" in tokenizer.decode(engine.asked[-1].prompt)
    assert page.locator(".call .state").inner_text() == "done"


def test_errors_are_shown_and_can_be_retried(page, engine):
    """A refused request and a stream that fails raise the banner; Try again asks anew."""
    engine.fail_after, engine.delay = 4, 0.01
    say(page, "hi")
    page.locator("#banner").wait_for()
    assert "failed" in page.locator("#banner-text").inner_text()
    engine.reset()
    page.click("#banner-retry")
    assert answer(page) == "The answer is 42."
    assert not page.locator("#banner").is_visible()
    page.click("#open-settings")
    page.fill("input[name=max_tokens]", "1000000")
    page.click("#close-settings")
    say(page, "again")
    page.locator("#banner").wait_for()
    assert "lower max_tokens" in page.locator("#banner-text").inner_text()


def test_edit_and_retry_and_copy(page, engine, tokenizer):
    """An edited question replaces what followed; retry asks the same again; copy takes the text."""
    say(page, "first")
    answer(page)
    page.keyboard.press("ArrowUp")  # in the empty composer: edit the last message
    page.fill(".edit textarea", "second")
    page.press(".edit textarea", "Enter")
    page.locator(".bubble", has_text="second").wait_for()
    answer(page)
    assert page.locator(".turn").count() == 2
    prompt = tokenizer.decode(engine.asked[-1].prompt)
    assert "second" in prompt
    assert "first" not in prompt
    engine.text = "<think></think>\nAnother answer.<|user|>"
    page.locator(".assistant .actions button[title='Answer again']").click()
    page.get_by_text("Another answer.").wait_for()
    assert engine.asked[-1].prompt == engine.asked[-2].prompt
    page.locator(".assistant .actions button[title='Copy']").click()
    assert page.evaluate("navigator.clipboard.readText()") == "Another answer."


def test_thinking_switch_and_settings_reach_the_server(page, engine, tokenizer):
    """The pill cycles auto, on, off; temperature, seed and system prompt are those of the request."""
    page.click("#thinking")
    page.click("#thinking")
    assert page.locator("#thinking-label").inner_text() == "Thinking: off"
    page.click("#open-settings")
    page.fill("textarea[name=system]", "Be brief.")
    page.fill("input[name=seed]", "7")
    page.locator("input[name=temperature]").fill("0.5")
    page.click("#close-settings")
    say(page, "hi")
    answer(page)
    asked = engine.asked[-1]
    assert (asked.params.seed, asked.params.temperature) == (7, 0.5)
    prompt = tokenizer.decode(asked.prompt)
    assert prompt.endswith("/nothink<|assistant|>\n<think></think>")
    assert "<|system|>\nBe brief." in prompt


def test_what_the_model_writes_cannot_run(page, engine):
    """HTML, scripts and javascript links stay text."""
    evil = '<img src=x onerror="window.hit=1"><script>window.hit=1</script> [click](javascript:window.hit=1)'
    engine.text = f"<think></think>\n{evil}<|user|>"
    say(page, "hi")
    assert "<script>" in answer(page)
    assert page.locator(".prose img, .prose script, .prose a").count() == 0
    assert page.evaluate("window.hit") is None


def test_a_conversation_outlives_a_reload_and_a_new_one_is_empty(page, engine):
    """The browser keeps the conversation; Alt+N starts another."""
    say(page, "hi")
    answer(page)
    page.reload()
    assert answer(page) == "The answer is 42."
    page.keyboard.press("Alt+KeyN")
    assert page.locator("#welcome").is_visible()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_colours_follow_the_system(browser, shared_server, engine, width, scheme):
    """On a phone and a desktop no part sticks out sideways; dark and light are the system's."""
    code = "```python\n" + "x = " + "1 + " * 100 + "1\n```"
    engine.text = (
        f"<think>{'long ' * 50}</think>\n# Title\n\n{code}\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n{'w' * 300}<|user|>"
    )
    context = browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(shared_server.url)
    say(page, "x" * 300)
    answer(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "document.querySelector('#scroll').scrollWidth <= document.querySelector('#scroll').clientWidth"
    )
    light = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])") > 128
    assert light == (scheme == "light")
    context.close()
