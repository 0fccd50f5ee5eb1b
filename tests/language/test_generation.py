"""Generation: caches, sampling, penalties, stopping, streaming, and prompts that cannot be continued."""

import pytest
import torch
from _lm_goldens import small_model

from visionmamba.language.generation import penalize_repetition, sample

KINDS = ["mamba1", "mamba2", "hybrid", "mlp"]


@pytest.fixture(params=KINDS)
def model(request):
    return small_model(request.param)


@torch.no_grad()
def _without_cache(model, prompt, max_length):
    sequences, scores = prompt, []
    while sequences.shape[1] < max_length:
        scores.append(model(sequences).logits[:, -1])
        sequences = torch.cat([sequences, scores[-1].argmax(-1, keepdim=True)], dim=1)
    return sequences, scores


@pytest.mark.parametrize("length", [1, 2, 11])
def test_cache_equals_full_forward(model, length):
    prompt = torch.randint(0, 250, (3, length))
    expected, expected_scores = _without_cache(model, prompt, length + 8)
    output = model.generate(prompt, length + 8, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, expected)
    for score, reference in zip(output.scores, expected_scores, strict=True):
        torch.testing.assert_close(score, reference, rtol=1e-4, atol=1e-5)


def test_teacher_outputs_force_tokens(model):
    tokens = torch.randint(0, 250, (2, 12))
    output = model.generate(tokens[:, :4], 12, teacher_outputs=tokens, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, tokens)
    with torch.no_grad():
        expected = model(tokens).logits[:, 3:-1]
    torch.testing.assert_close(torch.stack(output.scores, 1), expected, rtol=1e-4, atol=1e-5)


def test_end_of_sequence():
    model = small_model("mamba2")
    prompt = torch.randint(0, 250, (4, 5))
    free = model.generate(prompt, 20)
    eos = int(free[0, 8])
    stopped = model.generate(prompt, 20, eos_token_id=eos)
    for row, unstopped in zip(stopped, free, strict=True):
        ends = (unstopped[5:] == eos).nonzero()
        length = int(ends[0]) + 6 if len(ends) else 20
        length = min(length, stopped.shape[1])
        assert torch.equal(row[:length], unstopped[:length])
        assert (row[length:] == eos).all()


def test_streamer():
    class Streamer:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    model, streamer, prompt = small_model("mamba1"), Streamer(), torch.randint(0, 250, (2, 5))
    sequences = model.generate(prompt, 9, streamer=streamer)
    assert streamer.ended
    assert torch.equal(streamer.values[0], prompt)
    assert torch.equal(torch.stack(streamer.values[1:], dim=1), sequences[:, 5:])


def test_sampling_is_reproducible_and_keeps_to_the_vocabulary():
    model = small_model("mamba1")
    with torch.no_grad():
        model.backbone.embedding.weight[253:] += 10.0  # padding rows that would be likely
    prompt = torch.randint(0, 250, (2, 5))

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 25, top_k=0, temperature=5.0, vocab_size=253, generator=generator)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert run(3).max() < 253


LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 0}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_k": 99}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_k": 0, "top_p": 0.7}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 0, "top_p": 0.76}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"top_k": 0, "min_p": 0.2}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"top_k": 3, "temperature": 0.5}, [0.746, 0.187, 0.067, 0, 0]),
    ],
)
def test_sampling_distribution(options, expected):
    tokens = sample(LOGITS.expand(20000, -1), **options, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(tokens, minlength=5) / 20000
    torch.testing.assert_close(frequencies, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.015)
    assert all(frequency == 0 for frequency, p in zip(frequencies, expected, strict=True) if p == 0)


@pytest.mark.parametrize(
    "options", [{"top_k": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"temperature": 0.0}], ids=lambda o: next(iter(o))
)
def test_bad_sampling_options(options):
    with pytest.raises(ValueError, match="sampling: expected top_k >= 0"):
        sample(LOGITS, **options)


def test_repetition_penalty():
    logits, previous = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0, 1, 1]])
    expected = torch.tensor([[1.0, -2.0, 0.5]])
    torch.testing.assert_close(penalize_repetition(logits, previous, 2.0), expected)
    prompt = torch.randint(0, 250, (1, 5))
    tokens = small_model("mamba2").generate(prompt, 25, repetition_penalty=1e4)[0]
    assert len(set(tokens[5:].tolist())) == 20


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "input_ids: expected a prompt of at least one token, got none"),
        (torch.zeros(0, 3, dtype=torch.long), {}, "input_ids: expected a prompt of at least one token"),
        (torch.zeros(3, dtype=torch.long), {}, r"input_ids: expected \(B, L\)"),
        (torch.zeros(1, 3), {}, "input_ids: expected integer ids"),
        (torch.zeros(1, 8, dtype=torch.long), {}, "max_length: expected more than the 8 tokens of the prompt, got 8"),
        (torch.tensor([[1, 256]]), {}, "input_ids: expected ids from 0 to 255, got 256"),
        (torch.tensor([[1, -1]]), {}, "input_ids: expected ids from 0 to 255, got -1"),
        (torch.tensor([[1, 253]]), {"vocab_size": 253}, "input_ids: expected ids from 0 to 252, got 253"),
        (
            torch.tensor([[1, 2]]),
            {"vocab_size": 300},
            "vocab_size: expected 1 to the 256 rows of the embedding, got 300",
        ),
        (torch.tensor([[1, 2]]), {"cg": True}, "cg: expected a CUDA device"),
        (torch.tensor([[1, 2]]), {"teacher_outputs": torch.ones(2, 8, dtype=torch.long)}, "teacher_outputs: expected"),
        (torch.tensor([[1, 2]]), {"teacher_outputs": torch.tensor([[1, 2, 256]])}, "teacher_outputs: expected ids"),
    ],
)
def test_bad_prompts(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        small_model("mamba1").generate(prompt, 8, **options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), r"input_ids: expected \(B, L\) with at least one token"),
        (torch.tensor([[3, 256]]), "input_ids: expected ids from 0 to 255, got 256"),
        (torch.tensor([[3, -1]]), "input_ids: expected ids from 0 to 255, got -1"),
        (torch.zeros(1, 2), "input_ids: expected integer ids, got torch.float32"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        small_model("mamba1")(tokens)


def test_timing_is_printed(capsys):
    model, prompt = small_model("mamba1"), torch.randint(0, 250, (1, 3))
    tokens = model.generate(prompt, 5, enable_timing=True)
    assert capsys.readouterr().out.startswith("Prompt processing + decoding time: ")
    assert torch.equal(tokens, model.generate(prompt, 5)) and capsys.readouterr().out == ""
