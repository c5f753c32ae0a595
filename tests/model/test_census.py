"""The census agrees with the report's Table 1 and with models built on the meta device."""

import json
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glm45.model.census import cache_bytes_per_token, census, forward_flops_per_token
from glm45.model.config import PRESETS, preset
from glm45.model.transformer import Glm45


@pytest.mark.parametrize("name", PRESETS)
def test_totals_equal_a_model_on_the_meta_device(name):
    model = Glm45(preset(name), device="meta")
    assert census(preset(name)).total == sum(parameter.numel() for parameter in model.parameters())


def test_components_equal_a_model_on_the_meta_device(tiny):
    counted = census(tiny()).components
    sizes = {name: p.numel() for name, p in Glm45(tiny(), device="meta").named_parameters()}
    main = {name: size for name, size in sizes.items() if name.startswith("layers.")}
    assert counted["attention"] == sum(size for name, size in main.items() if ".self_attn." in name)
    assert counted["routed experts"] == sum(size for name, size in main.items() if ".experts." in name)
    assert counted["shared experts"] == sum(size for name, size in main.items() if "shared_experts" in name)
    assert counted["multi-token prediction"] == sum(size for name, size in sizes.items() if name.startswith("mtp."))


def test_the_reports_figures():
    large, air = census(preset("glm-4.5")), census(preset("glm-4.5-air"))
    assert round(large.without_embeddings / 1e9, 1) == 355.2
    assert round(large.active / 1e9, 1) == 32.1
    assert round(air.without_embeddings_and_mtp / 1e9, 1) == 105.6
    assert round(air.active / 1e9, 1) == 12.2


def test_small_presets_keep_their_promised_sizes():
    assert census(preset("pico")).total < 0.1e6
    assert 1e6 <= census(preset("demo")).total <= 4e6
    assert 25e6 <= census(preset("nano")).total <= 35e6
    head = preset("mini").vocab_size * preset("mini").hidden_size
    assert 0.95e9 <= census(preset("mini")).total <= 1.1e9
    assert 150e6 <= census(preset("mini")).active + head <= 200e6


@pytest.mark.parametrize("mtp", [False, True])
def test_forward_operations_equal_torchs_counter(tiny, mtp):
    """On one token: causal attention has no half there that is computed and thrown away."""
    model = Glm45(tiny())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), mtp=mtp)
    assert counter.get_total_flops() == forward_flops_per_token(tiny(), 1, mtp=mtp)


def test_cache_bytes(tiny):
    assert cache_bytes_per_token(preset("glm-4.5")) == 92 * 2 * 8 * 128 * 2


def test_inspect_prints_json_for_a_preset_and_refuses_others():
    command = [sys.executable, "-m", "glm45", "inspect"]
    done = subprocess.run([*command, "glm-4.5-air", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["parameters"]["active"] == census(preset("glm-4.5-air")).active
    failed = subprocess.run([*command, "/nowhere"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("glm45: no preset")
    assert failed.stderr.count("\n") == 1
