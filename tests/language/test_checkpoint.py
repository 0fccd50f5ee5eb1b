"""Saving and loading language models: both layouts, both file formats, shards, and files that do not fit."""

import json

import pytest
import torch
from _lm_goldens import document, language_golden, small_model
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from visionmamba.language import MambaConfig, MambaLMHeadModel
from visionmamba.language.text import load_tokenizer
from visionmamba.models._checkpoint import CheckpointError


@pytest.mark.parametrize("layout", ["mamba_ssm", "huggingface"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", ["mamba1_tiny", "mamba2_tiny"])
def test_round_trip(name, safe, layout, tmp_path):
    golden = language_golden(name)
    model = golden.model()
    model.save_pretrained(tmp_path, safe_serialization=safe, layout=layout)
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    tokens = golden.tokens("tokens")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight


@pytest.mark.parametrize("kind", ["hybrid", "mlp"])
def test_round_trip_of_hybrids(kind, tmp_path):
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", ["mamba1_tiny", "mamba2_tiny"])
def test_huggingface_layout(name, tmp_path):
    check = document("hf_mapping")["cross_check"][name]
    golden = language_golden(name)
    golden.model().save_pretrained(tmp_path, layout="huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        key: value for key, value in check["hf_config"].items() if name == "mamba1_tiny" or "time_step" not in key
    }
    assert {key: config[key] for key in expected} == expected
    keys = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert keys == {key: shape for key, shape in check["hf_keys"] if key != "lm_head.weight"}


@pytest.mark.parametrize("name", ["mamba1_tiny", "mamba2_tiny"])
def test_reads_huggingface_files(name, tmp_path):
    """Files as transformers writes them: its configuration, its embedding's name, no tied output layer."""
    check = document("hf_mapping")["cross_check"][name]
    golden = language_golden(name)
    kind = "mamba" if name == "mamba1_tiny" else "mamba2"
    (tmp_path / "config.json").write_text(json.dumps(check["hf_config"] | {"model_type": kind}))
    weights = golden.state_dict()
    weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
    del weights["lm_head.weight"]
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "model.safetensors")
    model = MambaLMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(golden.tokens("tokens")).logits
    torch.testing.assert_close(logits, torch.from_numpy(golden.arrays["logits"]), rtol=0, atol=2e-5)


def test_reads_a_published_file(tmp_path):
    """A pytorch_model.bin with both tied entries and the few fields of a published config.json."""
    golden = language_golden("mamba1_tiny")
    config = {"d_model": 64, "n_layer": 4, "vocab_size": 253, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"fused_add_norm": True, "pad_vocab_size_multiple": 8}))
    torch.save(golden.state_dict(), tmp_path / "pytorch_model.bin")
    model = MambaLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32
    with torch.no_grad():
        logits = model(golden.tokens("tokens")).logits
    torch.testing.assert_close(logits.float(), torch.from_numpy(golden.arrays["logits"]), rtol=0, atol=0.15)


def test_reads_shards(tmp_path):
    model = small_model("mamba2")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: weights[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no b\.safetensors, which the index names"):
        MambaLMHeadModel.from_pretrained(tmp_path)


def test_the_other_mamba(tmp_path):
    small_model("mamba2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"ssm_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a Mamba1 model, as the config says, got the weights of Mamba2"):
        MambaLMHeadModel.from_pretrained(tmp_path)


def test_a_checkpoint_that_does_not_fit(tmp_path):
    model = small_model("mamba1")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["backbone.norm_f.weight"]
    weights["extra.weight"] = torch.zeros(2)
    weights["backbone.layers.0.mixer.D"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        MambaLMHeadModel.from_pretrained(tmp_path)
    message = str(error.value)
    assert "missing backbone.norm_f.weight" in message
    assert "unexpected extra.weight" in message
    assert "backbone.layers.0.mixer.D has shape (5,) instead of (128,)" in message


def test_only_tensors_are_unpickled(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("unpickled",)

    small_model("mamba1").save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"backbone.embedding.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: holds more than tensors"):
        MambaLMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_truncated_weights(safe, tmp_path):
    small_model("mamba1").save_pretrained(tmp_path, safe_serialization=safe)
    file = tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=rf"{file.name}: not a readable"):
        MambaLMHeadModel.from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    small_model("mamba1").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        MambaLMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "expected JSON"), ("[1]", "expected a JSON object, got list")])
def test_a_config_that_cannot_be_read(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        MambaLMHeadModel.from_pretrained(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers every request with one error."""

    def answer(error):
        def download(name, file):
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    return answer


def test_a_hub_that_cannot_be_reached(hub):
    hub(LocalEntryNotFoundError("offline"))
    message = r"^a/b: not a folder; as a repository, no config\.json in the local cache, and the hub cannot be reached$"
    with pytest.raises(FileNotFoundError, match=message):
        MambaLMHeadModel.from_pretrained("a/b")


@pytest.mark.parametrize("name", ["a/b", "not a name"])
def test_neither_a_folder_nor_a_repository(name, hub, monkeypatch):
    if name == "a/b":
        hub(RepositoryNotFoundError.__new__(RepositoryNotFoundError))  # its constructor wants an HTTP response
    with pytest.raises(FileNotFoundError, match=f"^{name}: neither a folder nor a repository of the hub$"):
        MambaLMHeadModel.from_pretrained(name)


def test_missing_tokenizer(hub, tmp_path):
    pytest.importorskip("tokenizers")
    hub(LocalEntryNotFoundError("offline"))
    message = r"no tokenizer\.json, and EleutherAI/gpt-neox-20b's, the published models', cannot be had from the hub$"
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"^a/b: not a folder; as a repository, no tokenizer\.json in the local"
    ):
        load_tokenizer(str(tmp_path), "a/b")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json$"):
        load_tokenizer("a/b", str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba9"}}, "expected layer 'Mamba1', 'Mamba2' or 'S4D', got 'Mamba9'"),
        ({"n_layer": 2, "attn_layer_idx": [2]}, "attn_layer_idx: expected indices below 2"),
        ({"d_mode": 3}, "unknown fields d_mode"),
        ({"model_type": "gpt2"}, "expected model_type 'mamba' or 'mamba2', got 'gpt2'"),
        ({"model_type": "mamba2", "hidden_size": 64, "num_heads": 3, "head_dim": 32}, "96 channels in heads"),
    ],
)
def test_bad_config(values, message):
    with pytest.raises(ValueError, match=message):
        MambaConfig.from_dict(values)


def test_no_huggingface_layout_for_hybrids(tmp_path):
    with pytest.raises(ValueError, match="has no attn_layer_idx"):
        small_model("hybrid").save_pretrained(tmp_path, layout="huggingface")
    with pytest.raises(ValueError, match="layout: expected one of mamba_ssm, huggingface, got 'keras'"):
        small_model("hybrid").save_pretrained(tmp_path, layout="keras")
