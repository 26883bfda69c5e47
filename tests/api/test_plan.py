"""plan: what is said before the first step is what the run then has."""

import pytest

import minitune as mt
from minitune.api.plan import plan
from minitune.config import Training
from minitune.training import flat, needs
from tests.files import write_numbers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_numbers(tmp_path_factory.mktemp("data") / "data.jsonl", range(20))


def _load(folder, data, training, **settings):
    model = mt.load(folder, device="cpu", dtype="float32", **{"lora": mt.LoRA(rank=4), **settings})
    return model, mt.data.stream(data, model.tokenizer, tokens=training.tokens, epochs=training.epochs,
                                 seed=training.seed)


@pytest.mark.parametrize("settings", [{"epochs": 3, "micro_batches": 2}, {"max_steps": 3}])
def test_the_plan_is_what_the_run_then_has(settings, tiny, data):
    training = Training(tokens=64, **settings)
    model, batches = _load(tiny, data, training)
    rows = dict(plan(model, batches, training))
    assert model.training and not any(p.grad is not None for p in model.trainable_parameters())
    run = mt.train(model, batches, training=training)
    assert rows["steps"].startswith(f"{run.info.total_steps} of {training.micro_batches} x 64 tokens")
    assert len(run.records) == run.info.total_steps
    assert rows["trained"].startswith(f"{run.info.n_parameters:,} parameters")
    assert rows["data"] == f"20 documents, {batches.n_tokens:,} tokens, {batches.n_trained:,} of them trained"


def test_the_loss_is_that_of_the_first_step(tiny, data):
    training = Training(tokens=64, max_steps=1)
    model, batches = _load(tiny, data, training, lora=mt.LoRA(rank=4, dropout=0.5))
    before = float(dict(plan(model, batches, training))["loss of the first row"])
    assert abs(mt.train(model, batches, training=training).records[0].loss - before) < 1e-3     # B is zero at the start


@pytest.mark.parametrize(("lora", "times"), [(mt.LoRA(rank=4, dora=True), 3), (mt.LoRA(rank=4, dropout=0.1), 3)])
def test_layers_under_plain_autograd_keep_more(lora, times, tiny, data):
    kept = []
    for each in (mt.LoRA(rank=4), lora):
        model, batches = _load(tiny, data, Training(tokens=64), lora=each, memory="keep")
        kept.append(_bytes(dict(plan(model, batches, Training(tokens=64)))["kept for the backward (keep)"]))
    assert kept[1] == pytest.approx(times * kept[0], rel=0.05)


def _bytes(text):
    number, unit = text.split()[:2]
    return float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


def test_the_bytes_are_those_of_weights_and_moments(tiny, data):
    sizes = {}
    for quant in (None, "nf4"):
        model, batches = _load(tiny, data, Training(tokens=64), quant=quant)
        n = sum(p.numel() for p in model.trainable_parameters())
        for moments, each in (("fp32", 12), ("8bit", 6)):
            training = Training(tokens=64, moments=moments)
            assert abs(_bytes(dict(plan(model, batches, training))["gradients and moments"]) - each * n) < 1e5
        sizes[quant] = _bytes(dict(plan(model, batches, Training(tokens=64)))["memory: weights, loaded"])
        if quant is None:
            assert abs(sizes[quant] - sum(p.nbytes for p in model.parameters())) < 1e5
    assert sizes["nf4"] < 0.8 * sizes[None]


def test_what_is_to_come_is_the_sum(tiny, data):
    model, batches = _load(tiny, data, Training(tokens=64))
    rows = dict(plan(model, batches, Training(tokens=64)))
    parts = [value for what, value in rows.items() if what.startswith(("gradients", "kept for", "the layer at work"))]
    assert len(parts) == 3 and abs(sum(map(_bytes, parts)) - _bytes(rows["to come, beside free"])) < 2e5


@pytest.mark.parametrize("large", [1, 500_000])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_large_gradients_and_what_was_kept_are_there_at_one_time_in_the_second_micro_batch(tiny, data, micro_batches,
                                                                                          large, monkeypatch):
    monkeypatch.setattr(flat, "WHOLE", large)
    training = Training(tokens=64, micro_batches=micro_batches)
    model, batches = _load(tiny, data, training, lora=None, train="full", memory="keep")
    rows = dict(plan(model, batches, training))
    state, kept, work = (_bytes(value) for what, value in rows.items()
                         if what.startswith(("gradients", "kept for", "the layer at work")))
    gradients = 4 * sum(p.numel() for p in model.trainable_parameters() if p.numel() >= large)
    assert (kept < gradients) == (large == 1) and kept > 1e6 and gradients > 1e6
    overlap = min(kept, gradients) if micro_batches == 1 else 0
    assert abs(_bytes(rows["to come, beside free"]) - (state + kept + work - overlap)) < 2e5
    assert ("not at one time" in rows) == (micro_batches == 1)


def test_trained_base_weights_stand_with_their_copies_and_gradients(tiny, data):
    sizes = {}
    for train in ("norms", "full"):
        model, batches = _load(tiny, data, Training(tokens=64), lora=None, train=train, memory="keep")
        rows = dict(plan(model, batches, Training(tokens=64)))
        sizes[train] = [_bytes(rows[what]) for what in ("kept for the backward (keep)", "the layer at work, about")]
    projections, table = model.network.projections(), model.network.embedding.numel()
    copies = 4 * sum(p.n_rows * p.n_columns for p in projections)
    layer = (copies // model.config.n_layers) * 3       # copies, products, gradients in fp32
    assert copies > 1e6 and abs(sizes["full"][0] - sizes["norms"][0] - copies) < 2e5
    assert abs(sizes["full"][1] - sizes["norms"][1] - max(layer, 2 * table * 8)) < 2e5


def test_what_does_not_fit_is_said(tiny, data, monkeypatch):
    model, batches = _load(tiny, data, Training(tokens=64))
    assert "fit" not in dict(plan(model, batches, Training(tokens=64)))["to come, beside free"]
    monkeypatch.setattr(needs, "free_bytes", lambda _: 1000)
    assert "it does not fit" in dict(plan(model, batches, Training(tokens=64)))["to come, beside free"]
    with pytest.warns(UserWarning, match=r"a step takes about \S+ MB beside the weights, and 0\.0 MB are free: it may"):
        mt.train(model, batches, quiet=True, max_steps=1)
