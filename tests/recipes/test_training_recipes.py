"""The training recipes hold the report's figures, and fit where they say."""

import pytest

from glm45.config import from_dict, to_dict
from glm45.data.mixture import shares
from glm45.recipes.catalogue import TRAINING, training_recipe
from glm45.recipes.parts import report_stages
from glm45.recipes.whole import whole_run
from glm45.training.estimate import check_memory
from glm45.training.run import TrainConfig
from glm45.training.schedule import Plan


def test_the_full_recipe_is_the_reports():
    """Report sections 2.2 to 2.4, figure 3."""
    recipe = training_recipe("full")
    assert [round(stage.tokens / 1e11) for stage in recipe.stages] == [150, 70, 5, 5, 1]
    assert [stage.sequence_length for stage in recipe.stages] == [4096, 4096, 32_768, 32_768, 131_072]
    assert [stage.rope_theta for stage in recipe.stages] == [1e4, 1e4, 1e6, 1e6, 1e6]
    assert [stage.mtp_weight for stage in recipe.stages] == [0.3, 0.1, 0.1, 0.1, 0.1]
    assert [stage.router_bias_rate for stage in recipe.stages] == [0.001, 0, 0, 0, 0]
    assert [stage.packing for stage in recipe.stages] == ["concatenate"] * 2 + ["best_fit"] * 3
    assert (recipe.learning_rate.peak, recipe.learning_rate.final, recipe.learning_rate.shape) == (
        2.5e-4,
        2.5e-5,
        "cosine",
    )
    optimizer = recipe.optimizer
    assert (optimizer.momentum, optimizer.ns_steps, optimizer.update_rms, optimizer.weight_decay) == (0.95, 5, 0.2, 0.1)
    assert recipe.balance_weight == 1e-4


def test_the_batch_grows_from_16_to_64_million_over_500_billion_tokens():
    plan = Plan(training_recipe("full").stages)
    sizes = [round(segment.step_tokens / 2**20) for segment in plan.segments[:4]]
    assert sizes == [16, 32, 48, 64]
    assert plan.segments[3].first_token == pytest.approx(5e11, rel=1e-3)


@pytest.mark.parametrize("tokens", [2_000_000, 90_000_000])
def test_scaled_stages_keep_the_shares(tokens):
    stages = report_stages(tokens, batch_tokens=4096, lengths=(256, 512, 1024))
    shares = [stage.tokens / tokens for stage in stages]
    assert shares == pytest.approx([0.649, 0.303, 0.0216, 0.0216, 0.0043], abs=6e-4)


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_comes_back_from_json(name):
    recipe = training_recipe(name)
    assert from_dict(TrainConfig, to_dict(recipe)) == recipe
    assert Plan(recipe.stages).num_steps > 10


@pytest.mark.parametrize("name", ["one_gpu", "air", "full"])
def test_large_recipes_fit_80_gb_by_estimate_and_no_less_is_said_to_fit(name):
    recipe = training_recipe(name)
    check_memory(recipe, 80e9, "a GPU of 80 GB")
    with pytest.raises(MemoryError, match=r"a rank needs about .* GB .* and a GPU has 8.0 GB: raise layout.shard"):
        check_memory(recipe, 8e9, "a GPU")


@pytest.mark.parametrize("name", ["nano_cpu", "one_gpu"])
def test_larger_runs_read_web_pages_as_prose_where_there_are_some(name):
    general = whole_run(name).training.stages[0].mixture
    tokens = dict.fromkeys(["a-prose.high", "a-code.high", "a-codeweb.high"], 100)
    assert shares(general, tokens)["a-prose.high"] == pytest.approx(0.5)
    both = shares(general, tokens | {"a-web.high": 100, "a-web.heldout": 9})
    assert both["a-web.high"] == both["a-prose.high"] == pytest.approx(0.25)
