"""minitune against transformers: logits, losses, packing, generation, for every variant of the family."""

import pytest
import torch

pytest.importorskip("transformers")

import minitune as mt
from tests.oracles import VARIANTS, make
from tests.tolerance import relative

LENGTHS = (11, 30, 1, 22)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(theirs, ours) of the same weights, which no test changes."""
    folder = tmp_path_factory.mktemp("model")
    return make(request.param, folder), mt.load(folder, dtype="float32", device="cpu")


def _documents(vocab_size):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab_size, (n,), generator=generator) for n in LENGTHS]


def _batch(documents):
    tokens = torch.cat(documents)
    labels = torch.cat([torch.cat((d[1:], torch.tensor([-100]))) for d in documents])
    bounds = torch.tensor([0, *torch.tensor([len(d) for d in documents]).cumsum(0)], dtype=torch.int32)
    return mt.Batch(tokens=tokens, labels=labels, cu_seqlens=bounds)


def test_logits(pair):
    theirs, ours = pair
    for document in _documents(97):
        with torch.no_grad():
            expected = theirs(document[None]).logits[0]
            assert relative(ours.logits(document), expected) < 1e-5


def test_packed_documents_are_as_if_alone(pair):
    theirs, ours = pair
    documents = _documents(97)
    batch = _batch(documents)
    with torch.no_grad():
        packed = ours.token_losses(batch)
        alone = torch.cat([ours.token_losses(_batch([d])) if len(d) > 1 else torch.zeros(1) for d in documents])
        expected = [theirs(d[None]).logits[0, :-1] for d in documents]
    assert relative(packed, alone) < 1e-6
    losses = [torch.nn.functional.cross_entropy(e, d[1:], reduction="none")
              for e, d in zip(expected, documents, strict=True)]
    assert relative(packed, torch.cat([torch.cat((x, torch.zeros(1))) for x in losses])) < 1e-5
    assert float(ours.loss(batch)) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_greedy_generation(pair):
    theirs, ours = pair
    prompts = [d[:n].tolist() for d, n in zip(_documents(97), (9, 14, 1, 5), strict=True)]
    with torch.no_grad():
        expected = [theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.int64),
                                    max_new_tokens=20, do_sample=False, pad_token_id=0)[0, len(p):].tolist()
                    for p in prompts]
    expected = [e[: e.index(2)] if 2 in e else e for e in expected]
    assert [ours.generate(p, 20) for p in prompts] == expected
    assert ours.generate(prompts, 20) == expected      # all at once, of unequal lengths


def test_generation_of_unequal_prompts_at_once(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, dtype="float32", device="cpu")
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [20, 21, 22]]
    assert model.generate(prompts, 15) == [model.generate(p, 15) for p in prompts]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_checkpoints_of_half_precision(tmp_path, dtype):
    theirs = make("llama-2-gqa", tmp_path, getattr(torch, dtype)).float()
    document = _documents(97)[1]
    with torch.no_grad():
        assert relative(mt.load(tmp_path, dtype="float32", device="cpu").logits(document),
                        theirs(document[None]).logits[0]) < 1e-5
