"""Checkpoints in the hub layout: equal both ways, refused when damaged, never half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm45.model import hub
from glm45.model.census import census
from glm45.model.config import preset


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes", [{}, {"use_qk_norm": False, "attention_bias": False, "n_shared_experts": 2}], ids=str
)
def test_save_and_load_give_the_same_model(make_model, tmp_path, changes):
    model = make_model(**changes)
    hub.save(model, tmp_path / "m")
    loaded = hub.load(tmp_path / "m")
    assert loaded.config == model.config
    assert equal_states(model, loaded)


def test_their_checkpoint_through_us_is_bit_equal(make_model, peer_of, tmp_path):
    """Load theirs, save ours, load ours there."""
    from transformers import Glm4MoeForCausalLM

    peer = peer_of(make_model(num_nextn_predict_layers=0))
    peer.save_pretrained(tmp_path / "theirs")
    hub.save(hub.load(tmp_path / "theirs"), tmp_path / "ours")
    back = Glm4MoeForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert equal_states(peer, back)
    theirs, ours = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_a_checkpoint_without_its_mtp_layer_loads_without_one_and_says_so(make_model, tmp_path):
    hub.save(make_model(num_nextn_predict_layers=0), tmp_path / "m")
    values = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 1}))
    with pytest.warns(UserWarning, match="no tensor of its MTP layer"):
        assert hub.load(tmp_path / "m").mtp is None


def test_shards_hold_every_tensor_once_and_respect_their_size(make_model, tmp_path):
    model = make_model()
    hub.save(model, tmp_path / "m", max_shard_bytes=40_000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 40_000 + 30_000 for file in files)  # plus a header
    keys = [key for file in files for key in load_file(file)]
    assert sorted(keys) == sorted(entry.key for entry in hub.entries(model.config))
    index = json.loads((tmp_path / "m" / hub.INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(keys)
    assert equal_states(model, hub.load(tmp_path / "m"))


def test_copies_of_embedding_and_head_in_the_mtp_layer_are_accepted_if_equal(make_model, tmp_path):
    model = make_model()
    hub.save(model, tmp_path / "m", duplicate_mtp_head=True)
    tensors = load_file(tmp_path / "m/model.safetensors")
    assert torch.equal(tensors["model.layers.4.shared_head.head.weight"], model.lm_head.weight)
    assert equal_states(model, hub.load(tmp_path / "m"))
    tensors["model.layers.4.embed_tokens.weight"] += 1
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.4\.embed_tokens\.weight differs"):
        hub.load(tmp_path / "m")


def test_bf16_checkpoints_keep_the_correction_bias_in_fp32(make_model, tmp_path):
    model = make_model()
    hub.save(model, tmp_path / "m", dtype=torch.bfloat16)
    loaded = hub.load(tmp_path / "m")
    assert loaded.lm_head.weight.dtype == loaded.compute_dtype == torch.bfloat16
    for ours, theirs in zip(model.moe_layers(), loaded.moe_layers(), strict=True):
        assert torch.equal(ours.gate.e_score_correction_bias, theirs.gate.e_score_correction_bias)
    assert loaded(torch.arange(8)[None]).logits_BTV.dtype == torch.bfloat16


def test_unequal_kinds_of_damage_get_messages_of_their_own(make_model, tmp_path):
    """One byte flipped in a header, a missing shard, an extra key, a wrong shape, a missing key, NaN, a cut file."""
    model = make_model()
    messages = {}

    def damaged(name):
        hub.save(model, tmp_path / name, max_shard_bytes=150_000)
        return tmp_path / name, sorted((tmp_path / name).glob("*.safetensors"))

    def refused(name, folder):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            hub.load(folder)
        messages[name] = str(error.value).replace(str(tmp_path), "")

    folder, files = damaged("header")
    data = bytearray(files[0].read_bytes())
    data[8] ^= 1  # the header's opening brace
    files[0].write_bytes(data)
    refused("header", folder)
    assert "damaged or cut short" in messages["header"]

    folder, files = damaged("shard")
    files[1].unlink()
    refused("shard", folder)
    assert f"shard {files[1].name} is missing" in messages["shard"]

    folder, files = damaged("extra")
    save_file({**load_file(files[0]), "model.surprise": torch.zeros(2)}, files[0])
    refused("extra", folder)
    assert "1 unexpected: model.surprise" in messages["extra"]

    folder, files = damaged("shape")
    file = next(file for file in files if "model.norm.weight" in load_file(file))
    save_file({**load_file(file), "model.norm.weight": torch.zeros(3)}, file)
    refused("shape", folder)
    assert "model.norm.weight has shape [3], the configuration says [48]" in messages["shape"]

    folder, files = damaged("key")
    tensors = load_file(files[0])
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, files[0])
    refused("key", folder)
    assert "1 missing: model.layers.0.self_attn.q_proj.weight" in messages["key"]

    folder, files = damaged("nan")
    tensors = load_file(files[0])
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] = float("nan")
    save_file(tensors, files[0])
    refused("nan", folder)
    assert "model.layers.0.self_attn.q_proj.weight holds values that are not finite" in messages["nan"]

    folder, files = damaged("cut")
    os.truncate(files[0], files[0].stat().st_size - 100)
    refused("cut", folder)
    assert "damaged or cut short" in messages["cut"]
    assert len(set(messages.values())) == len(messages)


def test_every_flipped_header_byte_is_refused_or_harmless(make_model, tmp_path):
    """A header is text: whichever byte is hit, the file is refused, or it says the same as before."""
    model = make_model(num_hidden_layers=1, num_nextn_predict_layers=0, first_k_dense_replace=1)
    hub.save(model, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    intact = file.read_bytes()
    header_length = int.from_bytes(intact[:8], "little")
    for position in range(0, 8 + header_length, 7):
        data = bytearray(intact)
        data[position] ^= 1 << (position % 7)
        file.write_bytes(data)
        try:
            loaded = hub.load(tmp_path / "m")
        except (ValueError, FileNotFoundError):
            continue
        assert equal_states(model, loaded), f"byte {position} changed the model unnoticed"


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no configuration"):
        hub.load(tmp_path)


@pytest.mark.parametrize("index", ["[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{"])
def test_an_index_that_is_none_is_refused(make_model, tmp_path, index):
    hub.save(make_model(), tmp_path / "m")
    (tmp_path / "m" / hub.INDEX_FILE).write_text(index)
    with pytest.raises(ValueError, match=r"index\.json (is not an index|names a shard outside)"):
        hub.load(tmp_path / "m")


def test_a_failed_save_leaves_the_old_checkpoint(make_model, tmp_path):
    model = make_model()
    hub.save(model, tmp_path / "m")

    def fail(entry):
        if "lm_head" in entry.key:
            raise OSError(28, "No space left on device")
        return torch.zeros(entry.shape)

    with pytest.raises(OSError, match="No space"):
        hub.write(model.config, tmp_path / "m", fail)
    assert equal_states(model, hub.load(tmp_path / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


KILLED_SAVE = """
import sys, torch
from glm45.model import hub
from glm45.model.transformer import Glm45
model = hub.load(sys.argv[1])
with torch.no_grad():
    model.norm.weight.fill_(7)
print("saving", flush=True)
while True:
    hub.save(model, sys.argv[1], max_shard_bytes=20_000)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_checkpoint_the_new_one_or_none(make_model, tmp_path):
    model = make_model()
    for trial in range(4):
        path = tmp_path / f"m{trial}"
        hub.save(model, path)
        process = subprocess.Popen([sys.executable, "-c", KILLED_SAVE, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.013 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.exists():
            norm = hub.load(path).norm.weight
            assert torch.equal(norm, model.norm.weight) or (norm == 7).all()
        hub.save(model, path)
        assert equal_states(model, hub.load(path))
        assert not list(tmp_path.glob(".m*")), "leftovers of a killed save stay behind"


MEASURED = """
import resource, sys
from glm45.model import hub
from glm45.model.config import preset
from glm45.model.transformer import Glm45
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = Glm45(preset("nano")) if sys.argv[2] == "save" else None
before = peak()
hub.load(sys.argv[1]) if model is None else hub.save(model, sys.argv[1], max_shard_bytes=20 << 20)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_within_the_model_plus_one_shard(tmp_path):
    """Growth of the peak in megabytes, in a process of its own, for a model of 121 MB and shards of 20 MB."""

    def growth(what):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "m"), what]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    model = 4 * census(preset("nano")).total / 2**20
    slack = 25  # code that is loaded on first use
    assert growth("save") < 20 + slack
    assert growth("load") < model + 20 + slack
