"""What is drawn from: transformers' filtered probabilities, for every temperature, top_k and top_p; and the draws."""

import math

import pytest
import torch

pytest.importorskip("transformers")
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minitune.model.generate import distribution, sampler
from tests.tolerance import relative

LOGITS = torch.randn(5, 301, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.1], [1], [4], [20], [0]])


def _theirs(logits, temperature, top_k, top_p):
    scores = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 301, 10**6])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.37, 0.9, 1.0])
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    logits = LOGITS[:4]
    p, ids = distribution(logits, temperature, top_k, top_p)
    ours = torch.zeros_like(logits).scatter(1, ids, p / p.sum(-1, keepdim=True))
    theirs = _theirs(logits, temperature, top_k and min(top_k, 301), top_p)
    assert torch.equal(ours > 0, theirs > 0)
    assert relative(ours, theirs) < 1e-5
    assert p.shape == ids.shape == (4, min(top_k or 301, 301))


def test_equally_likely_tokens_are_cut_to_so_many():
    p, _ = distribution(LOGITS[4:], 1.0, 10, 0.55)
    assert int((p > 0).sum()) == 6


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}])
def test_draws_follow_the_probabilities(settings):
    logits = LOGITS[1:2].expand(20_000, -1)
    drawn = sampler(1.3, seed=5, **settings)(logits).bincount(minlength=301) / len(logits)
    p, ids = distribution(LOGITS[1:2], 1.3, settings.get("top_k"), settings.get("top_p"))
    expected = torch.zeros(301).scatter(0, ids[0], p[0] / p.sum())
    assert bool((drawn[expected == 0] == 0).all())
    deviation = (expected * (1 - expected) / len(logits)).sqrt().clamp_min(1e-4)
    assert float(((drawn - expected) / deviation).abs().max()) < 5


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-30, 0])
def test_a_tiny_temperature_is_greedy(temperature):
    rows = LOGITS[:4]
    assert torch.equal(sampler(temperature, seed=1)(rows), rows.argmax(-1))


@pytest.mark.parametrize("temperature", [1e30, 1e300, 10**30])
def test_a_huge_temperature_is_uniform(temperature):
    p, _ = distribution(LOGITS[:4], float(temperature))
    assert relative(p, torch.full_like(p, 1 / 301)) < 1e-5 and not math.isnan(float(p.sum()))
