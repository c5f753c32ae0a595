"""What the parser found wrong with an answer: the ground of format penalties in reinforcement learning."""

from typing import Literal, NamedTuple

ProblemKind = Literal[
    "unclosed_reasoning",  # the answer or a call begins before </think>
    "stray_tag",  # a tag where the grammar has none
    "stray_text",  # text inside a call, outside name, keys and values
    "bad_name",  # a call without a name, or with one that no function can have
    "unknown_tool",  # tools were given and this is not one of them
    "unclosed_key",  # <arg_key> without </arg_key>
    "missing_value",  # a key without <arg_value>
    "duplicate_argument",
    "not_json",  # a value that the schema does not let be a string is not JSON
    "unclosed_call",  # another call begins before </tool_call>
    "truncated_call",  # the text ends inside a call
    "text_after_end",  # text follows the token that ends the turn
    "layout",  # a call whose white space is neither GLM-4.5's nor GLM-4.7's
]

DEVIATIONS: frozenset[ProblemKind] = frozenset({"layout"})
"""Kinds that leave no doubt about what was meant."""


class Problem(NamedTuple):
    """One thing wrong, and where."""

    kind: ProblemKind
    position: int
    """Characters of the text before it, special tokens counted by their spelling."""
    detail: str
    call: int | None = None
    """Index in `tool_calls` of the call that it spoils, if any."""

    def __str__(self) -> str:
        return f"{self.kind} at {self.position}: {self.detail}"


class FormatStatus(NamedTuple):
    """Whether an answer keeps to the format.

    `well_formed` allows white space around tags that the templates would not write (kind "layout"): what was meant is
    certain. `exact` does not.
    """

    problems: tuple[Problem, ...]
    end: str | None
    """The token that ended the turn, if the text holds it: `<|user|>`, `<|observation|>` or `<|endoftext|>`."""
    complete_calls: tuple[int, ...]
    """Indices in `tool_calls` of the calls that closed and have no problem: those that are safe to run."""

    @property
    def well_formed(self) -> bool:
        """Whether the text says without doubt what it means."""
        return all(problem.kind in DEVIATIONS for problem in self.problems)

    @property
    def exact(self) -> bool:
        """Whether the text is also laid out as a template would."""
        return not self.problems
