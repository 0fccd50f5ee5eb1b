"""``visionmamba generate``: the model's tokens, as ids and as text, and one clear line for what cannot be continued."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from visionmamba.language import MambaConfig, MambaLMHeadModel

WORDS = ["<|endoftext|>", "state", "space", "models", "remember", "what", "they", "need", "é", "…"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=10, ssm_cfg={"layer": "Mamba2", "headdim": 8, "d_state": 8})
    MambaLMHeadModel(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0])
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return words


def _expected(folder, prompt, length):
    model = MambaLMHeadModel.from_pretrained(folder)
    return model.generate(torch.tensor([prompt]), length, vocab_size=10)[0].tolist()


def test_ids(run, folder):
    expected = _expected(folder, [1, 2, 3], 9)
    result = run("generate", folder, "--ids", "1,2,3", "--max-new-tokens", 6, "--device", "cpu")
    assert (result.status, result.out.strip()) == (0, ",".join(map(str, expected)))
    result = run("generate", folder, "--ids", "1 2 3", "--max-new-tokens", 6, "--device", "cpu", "--json")
    assert json.loads(result.out)["new_ids"] == expected[3:]


def test_text_is_streamed(run, folder, tokenizer):
    expected = _expected(folder, [1, 2, 3], 9)
    if 0 in expected[3:]:
        expected = expected[: expected.index(0, 3) + 1]
    result = run("generate", folder, "state space models", "--max-new-tokens", 6, "--device", "cpu")
    assert (result.status, result.out.strip()) == (0, tokenizer.decode(expected).strip())


def test_sampling_follows_the_seed(run, folder):
    def sample(seed):
        return run(
            "generate", folder, "--ids", "1", "--top-k", 0, "--temperature", 9, "--seed", seed, "--device", "cpu"
        )

    assert sample(1).out == sample(1).out != sample(2).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a PROMPT or --ids"),
        (("--ids", "1,x"), "--ids: expected integers like 12,7,301, got '1,x'"),
        (("--ids", ""), "input_ids: expected a prompt of at least one token"),
        (("--ids", "1,10"), "input_ids: expected ids from 0 to 9, got 10"),
        (("--ids", "1", "--dtype", "int8"), "--dtype: expected float32, bfloat16 or float16, got 'int8'"),
        (("--ids", "1", "--temperature", "0"), "sampling: expected"),
    ],
)
def test_bad_input(run, folder, arguments, message):
    result = run("generate", folder, *arguments)
    assert result.status == 1
    assert message in " ".join(result.err.split())


def test_bad_models(run, folder, tmp_path):
    missing = run("generate", folder / "config.json", "--ids", "1")
    assert missing.status == 1 and "expected a folder" in missing.err
    config = json.loads((folder / "config.json").read_text()) | {"ssm_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    other = run("generate", folder, "--ids", "1")
    assert other.status == 1 and "got the weights of Mamba2" in " ".join(other.err.split())
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "elsewhere.safetensors")
    (folder / "model.safetensors").unlink()
    gone = run("generate", folder, "--ids", "1")
    assert gone.status == 1 and "neither model.safetensors nor pytorch_model.bin" in " ".join(gone.err.split())
