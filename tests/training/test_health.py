"""Signs of a sick run against hand-made ones."""

import math

import pytest
import torch

from glm45.model.config import preset
from glm45.model.transformer import Glm45
from glm45.training.gradients import clip_gradients, gradient_squares
from glm45.training.health import HealthConfig, RouterMonitor, UpdateNorms, attention_logit_range
from glm45.training.layout import Layout
from glm45.training.loop import train
from glm45.training.metrics import read_record
from glm45.training.parallel import World
from glm45.training.run import Run

ALONE = World(Layout(replicate=1), torch.device("cpu"))


def test_the_alarm_of_the_report_rings_at_80_percent_on_20_percent():
    """80 % of the tokens on 2 of 10 experts ring, 78 % do not; a dead expert is named."""
    monitor = RouterMonitor(HealthConfig(max_violation=100))
    even = [2.75] * 8
    monitor.add(torch.tensor([[39.0, 39.0, *even], [40.0, 40.0, *[2.5] * 8], [11.0] * 9 + [0.0]]))
    balance, alarms = monitor.look()
    assert alarms == [
        "MoE layer 1: 80% of the tokens go to the busiest 20 % of the experts",
        "MoE layer 2: 1 experts got no token",
    ]
    assert balance["max_violation"][0] == pytest.approx(2.9)  # 39 over a mean of 10, less 1
    assert balance["dead_experts"] == [0, 0, 1]
    assert monitor.look() == ({}, [])


def test_a_layer_that_did_not_run_rings_no_alarm():
    """The MTP layer of a stage whose MTP loss has no weight."""
    monitor = RouterMonitor(HealthConfig())
    monitor.add(torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
    balance, alarms = monitor.look()
    assert alarms == []
    assert balance["max_violation"] == [0.0, None]


def test_the_default_alarm_can_ring_on_the_smallest_model():
    shape = preset("demo")
    assert HealthConfig().max_violation < shape.n_routed_experts / shape.num_experts_per_tok - 1


def test_the_monitor_sums_over_steps_and_survives_a_restart():
    first, second = RouterMonitor(HealthConfig()), RouterMonitor(HealthConfig())
    first.add(torch.tensor([[3.0, 1.0]]))
    second.load_state(first.state())
    for monitor in (first, second):
        monitor.add(torch.tensor([[1.0, 3.0]]))
    assert first.look() == second.look()
    assert first.look() == ({}, [])


@pytest.mark.slow
def test_a_planted_router_bias_rings_and_the_balance_update_mends_it(toy_recipe, tmp_path, monkeypatch):
    """One expert is given a selection bias that no score can beat: with rate 0 it stays, with a rate it goes."""
    from glm45.training import loop

    begin = loop.TrainingState.begin

    def planted(*arguments):
        state = begin(*arguments)
        for block in state.model.moe_layers():
            block.gate.e_score_correction_bias[0] = 0.6
        return state

    monkeypatch.setattr(loop.TrainingState, "begin", planted)
    violations = {}
    for rate in (0.0, 0.1):
        folder = tmp_path / str(rate)
        settings = ("health.every=6", "health.max_violation=0.9", f"stages.0.router_bias_rate={rate}")
        train(Run.open(folder, toy_recipe(*settings)))
        record = read_record(folder)
        violations[rate] = [line["max_violation"] for line in record if line.get("event") == "health"]
        rung = [line for line in record if line.get("event") == "alarm" and "MaxVio is" in line["message"]]
        assert len(rung) >= 3 if rate == 0 else len(rung) < len(violations[rate]) * 3
    assert min(violations[0.0][2]) > 0.9
    assert max(violations[0.1][2]) < 0.9


def test_gradient_norm_and_clipping_equal_torchs():
    torch.manual_seed(0)
    model = Glm45(preset("pico"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    squares = gradient_squares(model, ALONE)
    assert {"embeddings", "head", "norms", "attention", "experts", "shared_experts", "router", "dense", "mtp"} == set(
        squares
    )
    norm = math.sqrt(sum(squares.values()))
    assert norm == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-6)
    clip_gradients(model, norm, 0.5)
    assert math.sqrt(sum(gradient_squares(model, ALONE).values())) == pytest.approx(0.5, rel=1e-5)


def test_relative_updates_by_hand():
    model = Glm45(preset("pico"))
    before = UpdateNorms(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    moved = before.look(model, ALONE)
    assert moved["head"] == pytest.approx(0.1, rel=1e-4)
    assert moved["attention"] == 0


def test_attention_logits_are_measured_in_every_layer_and_grow_with_the_keys():
    model = Glm45(preset("pico"), seed=1).eval()
    tokens = torch.arange(20)[None]
    largest = attention_logit_range(model, tokens)
    assert len(largest) == 3
    with torch.no_grad():
        model.layers[1].self_attn.k_norm.weight.mul_(3)
    assert attention_logit_range(model, tokens)[1] == pytest.approx(3 * largest[1], rel=1e-3)
    # QK-norm bounds the logits by sqrt(head_dim) times the two norms' scales.
    assert max(largest) <= math.sqrt(model.config.head_dim) * 1.01
