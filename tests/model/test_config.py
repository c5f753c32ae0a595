"""Shapes round-trip through config.json, and contradictions are refused with what to change."""

import pytest

from glm45.model.config import PRESETS, ModelConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_round_trips_through_the_hub_form(name):
    assert ModelConfig.from_hub(preset(name).to_hub()) == preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_the_peer_reads_every_preset_as_we_mean_it(name):
    from transformers import Glm4MoeConfig

    ours, theirs = preset(name), Glm4MoeConfig(**preset(name).to_hub())
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    assert theirs.rope_parameters["partial_rotary_factor"] == ours.partial_rotary_factor
    assert theirs.head_dim == ours.head_dim
    assert ModelConfig.from_hub(theirs.to_dict()) == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 6}, "rotates 3 dimensions"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ({"first_k_dense_replace": 9}, "between 0 and num_hidden_layers 4"),
        ({"n_group": 3}, "n_routed_experts 8 is not a multiple of n_group 3"),
        ({"n_group": 8}, "leaves fewer than 2"),
        ({"n_group": 2, "topk_group": 3}, "topk_group 3 exceeds n_group 2"),
        ({"num_experts_per_tok": 9}, "exceeds the 8 experts"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "exceeds the 2 experts"),
        ({"num_nextn_predict_layers": 2}, "0 or 1"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
    ],
)
def test_contradictions_are_refused_with_what_to_change(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
    ],
)
def test_features_this_model_lacks_are_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hub({**tiny().to_hub(), **changes})


@pytest.mark.parametrize("key", ["head_dim", "rope_theta"])
def test_keys_with_dangerous_defaults_must_be_written(tiny, key):
    values = {k: v for k, v in tiny().to_hub().items() if k not in (key, "rope_parameters")}
    with pytest.raises(ValueError, match=f"no {key}"):
        ModelConfig.from_hub(values)


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'glm-4\.5'"):
        preset("glm-45")
