"""Expert iteration: cold starts with the planted share of faults, the graph of steps, and one tiny run through it."""

import importlib
import json

import pytest

from glm45.environments.arithmetic import arithmetic_tasks
from glm45.environments.instructions import instruction_tasks
from glm45.environments.tasks import is_held_out_task, prompt_text, read_tasks
from glm45.environments.tools import read_calls, tool_tasks
from glm45.pipeline import Context, Pipeline
from glm45.posttraining.coldstart import ColdStartConfig, cold_start
from glm45.posttraining.steps import equal_parts
from glm45.recipes.posttraining import RECIPES, posttraining_steps


def test_cold_starts_have_the_planted_share_of_faults_and_no_held_out_prompt():
    config = ColdStartConfig()
    made = {domain: list(cold_start(domain, 1, 400, config)) for domain in ("arithmetic", "tools", "instructions")}
    careful = sum(each.metadata["careful"] for each in made["arithmetic"]) / 400
    assert careful == pytest.approx(config.arithmetic.careful_share, abs=0.08)
    families = (arithmetic_tasks(0, 4000), tool_tasks(0, 9000), instruction_tasks(0, 9000))
    held_out = {prompt_text(task) for tasks in families for task in tasks if is_held_out_task(task)}
    asked = {message["content"] for made_of in made.values() for each in made_of for message in each.messages}
    assert not asked & held_out
    assert all(each.thinking for each in made["arithmetic"])
    assert not any(each.thinking for each in made["tools"] + made["instructions"])
    assert made["tools"] == list(cold_start("tools", 1, 400, config))
    with pytest.raises(ValueError, match="no cold start for 'agents'"):
        list(cold_start("agents", 1, 1, config))


def test_sound_cold_starts_are_right():
    config = ColdStartConfig(sound_share=1.0)
    for each in cold_start("arithmetic", 2, 100, config):
        truth = str(eval(each.messages[0]["content"].removesuffix("=?")))
        assert each.messages[1]["content"] == truth or not each.metadata["careful"]
    for each in cold_start("tools", 2, 100, config):
        assert read_calls(each.messages[1]) is not None


@pytest.mark.parametrize("name", ["experts", *RECIPES])
def test_every_recipe_is_a_graph_of_functions_that_are_there(name):
    steps = posttraining_steps(name, [])
    pipeline = Pipeline("nowhere", steps)
    assert len(pipeline.steps) >= 4
    for step in steps:
        module, function = step.function.split(":")
        assert callable(getattr(importlib.import_module(module), function)), step.function
        json.dumps(dict(step.config))


def test_experts_share_a_base_and_meet_in_the_overall_set():
    needs = {step.name: step.needs for step in posttraining_steps("experts", [])}
    experts = ("reasoning", "tool", "general")
    assert all(needs[f"{name}-cold-start"] == ("base",) for name in experts)
    assert needs["overall-sft"] == ("base", *(f"{name}-trajectories" for name in experts))
    assert needs["final-rl"] == ("overall-sft", "tasks")
    assert set(needs["comparison"]) == {"tasks", "final-rl", *(f"{name}-rl" for name in experts)}
    assert "final-rl" not in {step.name for step in posttraining_steps("experts", ["final_rl_steps=0"])}


def test_a_pass_on_several_domains_takes_as_many_prompts_of_each():
    domains = [list(arithmetic_tasks(1, count)) for count in (5, 3)]
    assert equal_parts(domains) == [*domains[0][:3], *domains[1]]
    assert equal_parts(domains[:1]) == domains[0]


def test_unknown_recipes_and_overrides_are_refused():
    with pytest.raises(ValueError, match="known: experts, arithmetic"):
        posttraining_steps("expert", [])
    with pytest.raises(ValueError, match="takes seed=, steps="):
        posttraining_steps("length", ["lr=3"])


@pytest.mark.parametrize("steps", range(1, 5))
def test_caps_grow_in_the_shortest_runs_too(steps):
    (arm,) = (step for step in posttraining_steps("length", [f"steps={steps}"]) if step.name == "multi-stage")
    caps = arm.config["rl"]["lengths"]["caps"]
    assert caps[0][0] == 0
    assert caps[-1][1] == 64


def plant_pools(context):
    """What `steps.pools` writes, by decree: so small a policy finds every prompt unsolvable."""
    ids = [task.task_id for task in read_tasks(context.inputs["tasks"] / "arithmetic.train.jsonl")]
    found = {"pools": {"moderate": ids[::2], "hard": ids[1::2]}, "samples": 5, "generated_tokens": 50}
    (context.folder / "pools.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_experiment_runs_and_prints_its_comparison(name, tmp_path):
    """With a policy that has learnt next to nothing; the steps are run here, one after another."""
    for step in posttraining_steps(name, ["steps=2", "conversations=200"]):
        config = json.loads(json.dumps(dict(step.config)))
        if step.name == "tasks":
            config["num_tasks"] = 200
        if "rl" in config:
            config["rl"]["evaluation"] |= {"num_tasks": 4, "num_samples": 2}
            for stage in config["rl"]["stages"]:
                stage |= {"prompts_per_step": 2, "samples_per_prompt": 4}
        module, function = step.function.split(":")
        run = plant_pools if function == "pools" else getattr(importlib.import_module(module), function)
        (tmp_path / step.name).mkdir()
        inputs = {need: tmp_path / need for need in step.needs}
        run(Context(folder=tmp_path / step.name, config=config, inputs=inputs, run=tmp_path))
    rows = json.loads((tmp_path / "arms" / "arms.json").read_text())
    table = (tmp_path / "arms" / "arms.md").read_text()
    assert all(f"| {arm} " in table for arm in rows)
    assert all(row["updates"] == 2 and row["after"]["greedy"]["error"] is not None for row in rows.values())
    if name == "curriculum":
        assert all(row["of these for choosing"] == 50 for row in rows.values())
        by = [name for name in rows["hard-only"]["after"] if name.startswith("sampled, num_digits")]
        assert by
        assert not any(name.endswith("_error") for name in by)


@pytest.mark.proof
def test_a_tiny_run_goes_through_every_step(tmp_path):
    """Nothing is learnt in so few steps; every filter is open, and all figures and the lineage are written."""
    from glm45.recipes.posttraining import run_posttraining

    overrides = ["num_tasks=200", "final_rl_steps=1", "base_sft.epochs=1", "balance.thinking_share=0"]
    overrides += ["trajectories.num_prompts=8", "trajectories.rejection.min_reward=0", "rl.evaluation.num_tasks=8"]
    for expert in range(3):
        overrides += [f"experts.{expert}.{name}" for name in ("base_count=100", "cold_start_count=60", "rl_steps=1")]
    table = run_posttraining("experts", tmp_path, overrides)
    figures = json.loads((tmp_path / "steps" / "comparison" / "comparison.json").read_text())
    assert all(f"| {name} " in table for name in figures)
    assert set(figures) == {"reasoning", "tool", "general"}
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    assert set(lineage) == {step.name for step in posttraining_steps("experts", overrides)}
    assert all(record["token"] for record in lineage.values())
