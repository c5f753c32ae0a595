"""The reasoning-gym adapter: any family, its own scorer, its own curriculum, short prompts."""

import json

import pytest

from glm45.environments import reasoning_gym
from glm45.environments.protocol import assistant
from glm45.environments.reasoning_gym import (
    SHORT_PROMPTS,
    ReasoningGymVerifier,
    family_names,
    level_options,
    reasoning_gym_tasks,
)

# Gold answers that the library's own scorers do not accept (five families), and slow generators (four).
LEFT_OUT = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
LEFT_OUT |= {"knight_swap", "sokoban", "futoshiki", "puzzle24"}


@pytest.mark.slow
def test_the_gold_answer_of_every_family_scores_one():
    verifier, checked = ReasoningGymVerifier(), 0
    for family in set(family_names()) - LEFT_OUT:
        task = next(reasoning_gym_tasks(family, seed=3, count=1))
        if task.answer is not None:
            assert verifier.score(task, assistant(task.answer)).value == 1.0, family
            checked += 1
    assert checked >= 90


def test_short_prompts_name_everything_that_is_asked():
    for family in SHORT_PROMPTS:
        short = next(reasoning_gym_tasks(family, seed=1, count=1, short_prompt=True)).messages[0]["content"]
        long = next(reasoning_gym_tasks(family, seed=1, count=1)).messages[0]["content"]
        assert len(short) < len(long) or family == "basic_arithmetic"
        assert "{" not in short


def test_levels_raise_difficulty():
    assert level_options("chain_sum", 3)["max_digits"] > level_options("chain_sum", 0)["max_digits"]
    easy, task = (next(reasoning_gym_tasks("chain_sum", seed=1, count=1, level=level)) for level in (0, 3))
    assert len(task.answer) > len(easy.answer)
    assert ReasoningGymVerifier().score(task, assistant(task.answer)).value == 1.0


def test_unknown_families_and_levels_are_refused():
    with pytest.raises(ValueError, match="no family 'chain_sums'"):
        next(reasoning_gym_tasks("chain_sums", seed=1, count=1))
    with pytest.raises(ValueError, match="level 99"):
        level_options("chain_sum", 99)
    with pytest.raises(ValueError, match=r"caesar_cipher refuses level 2 .*rotation must be in range"):
        next(reasoning_gym_tasks("caesar_cipher", seed=1, count=1, level=2))
    with pytest.raises(ValueError, match=r"chain_sum refuses level None with options \{'digits': 9}"):
        next(reasoning_gym_tasks("chain_sum", seed=1, count=1, options={"digits": 9}))
    with pytest.raises(ValueError, match="no short prompt"):
        next(reasoning_gym_tasks("maze", seed=1, count=1, short_prompt=True))


def test_a_family_that_refuses_its_own_answer_is_an_error_and_no_zero(monkeypatch):
    task = next(reasoning_gym_tasks("gcd", seed=1, count=1))
    family = type(reasoning_gym._dataset(json.dumps(task.metadata["recipe"])))
    monkeypatch.setattr(family, "score_answer", lambda self, answer, entry: 0.01)
    reasoning_gym._prove_family.cache_clear()
    with pytest.raises(ValueError, match=r"family 'gcd' gives its own answer .* 0.01: leave it out"):
        ReasoningGymVerifier().score(task, assistant(task.answer))
