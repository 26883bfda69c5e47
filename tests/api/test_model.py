"""Model: base weights train as transformers trains them and are saved, all memory policies alike, and it casts."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import minitune as mt
from minitune.checkpoint import writer
from tests.batches import documents, packed
from tests.oracles import logits_of, make
from tests.tolerance import relative

TRAIN = {"full": None, "head": {"lm_head.weight"}, "embedding": {"model.embed_tokens.weight"},
         "norms": 7, "last:1": 9, ("*.q_proj.weight",): 3, ("last:1", "head"): 10}


def _batch():
    return packed(documents((20, 20)))


@pytest.mark.parametrize("train", TRAIN, ids=str)
def test_base_weights_train_as_transformers_trains_them(tmp_path, train):
    theirs = make("llama-2-gqa", tmp_path)
    ours = mt.load(tmp_path, train=list(train) if isinstance(train, tuple) else train, dtype="float32", device="cpu")
    batch = _batch()
    ours.loss(batch).backward()
    halves = batch.tokens.split(20)
    loss = sum(torch.nn.functional.cross_entropy(theirs(h[None]).logits[0, :-1], h[1:], reduction="sum")
               for h in halves) / 38
    loss.backward()
    gradients = {}
    for name, parameter in ours.network.named_parameters():
        if parameter.requires_grad:
            gradients[id(parameter)] = name
    trained = _trained(ours)
    assert len(trained) == len(gradients) == len(ours.trainable_parameters())
    expected = TRAIN[train]
    if isinstance(expected, set):
        assert set(trained) == expected
    elif isinstance(expected, int):
        assert len(trained) == expected
    for name, parameter in trained.items():
        assert relative(parameter.grad, theirs.get_parameter(name).grad) < 1e-5, name


def _trained(model):
    """Hugging Face name -> Parameter, of what is trained."""
    found = {name: getattr(owner, attribute) for name, owner, attribute in model.network.single_weights()}
    for projection in model.network.projections():
        found |= {key.replace("/", "."): p for key, p in projection.trained.items()}
    return {name: p for name, p in found.items() if p.requires_grad}


def test_a_fully_trained_model_is_saved_and_loads_in_transformers(tmp_path):
    make("qwen2", tmp_path / "base")
    model = mt.load(tmp_path / "base", train="full", dtype="float32", device="cpu")
    batch = _batch()
    optimizer = mt.SGD(model.trainable_parameters(), lr=0.5)
    before = float(model.loss(batch).detach())
    for _ in range(3):
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = model.logits(batch.tokens)
    assert float(model.loss(batch).detach()) < before
    model.save(tmp_path / "saved")
    assert relative(logits_of(tmp_path / "saved", batch.tokens), after) < 1e-5
    assert mt.load(tmp_path / "saved", dtype="float32", device="cpu").generate([5, 6], 4) == model.generate([5, 6], 4)


@pytest.mark.parametrize(("dtype", "saved"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_a_saved_model_computes_what_the_trained_one_does(tmp_path, dtype, saved):
    """Steps too small for the bf16 of the base's files: of a model that computes in fp32 they are kept."""
    make("llama-2-gqa", tmp_path / "base", torch.bfloat16)
    model = mt.load(tmp_path / "base", train="norms", device="cpu", dtype=dtype)
    for p in model.trainable_parameters():
        p.data += 1e-4
    model.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["torch_dtype"] == saved
    tokens = torch.arange(5, 20)
    with torch.no_grad():
        again = mt.load(tmp_path / "saved", device="cpu", dtype=dtype)
        assert torch.equal(again.logits(tokens), model.logits(tokens))
    mt.load(tmp_path / "base", device="cpu", dtype="float32").save(tmp_path / "copy")       # nothing is trained
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_file_is_no_folder_to_save_into(tiny, tmp_path):
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(mt.InputError, match="saved is a file; name a folder"):
        mt.load(tiny, train="norms", device="cpu").save(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "mine"


class Casts(TorchDispatchMode):
    """Counts the tensors that are made in another dtype."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        self.made += function is torch.ops.aten._to_copy.default
        return function(*arguments, **(settings or {}))


def test_saving_a_trained_model_holds_one_tensor_in_the_files_dtype_at_a_time(tmp_path, monkeypatch):
    make("llama-2-gqa", tmp_path / "base", torch.bfloat16)
    model = mt.load(tmp_path / "base", train="full", device="cpu", dtype="bfloat16")
    before, write = [], writer._write_tensor
    with Casts() as casts:
        monkeypatch.setattr(writer, "_write_tensor", lambda *args: (before.append(casts.made), write(*args)))
        model.save(tmp_path / "saved")
    assert before == list(range(1, len(model.network.hf_weights()) + 1))
    name = "model.safetensors"
    assert (tmp_path / "saved" / name).stat().st_size <= (tmp_path / "base" / name).stat().st_size


def test_a_model_moves_and_casts_to_the_dtype_that_it_has(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=2), device="cpu", dtype="float32")
    assert model.to("cpu") is model and model.float() is model and model.cpu() is model
    assert model.logits([5, 6, 7]).shape == (3, 4096)


def test_all_is_frozen_by_default(tiny):
    model = mt.load(tiny, device="cpu")
    with pytest.raises(mt.InputError, match="nothing to train"):
        model.trainable_parameters()
    assert not model.loss(_batch()).requires_grad


def test_memory_policies_train_alike(tiny):
    losses = []
    for memory in ("keep", "pointwise", "full", "offload", "auto"):
        model = mt.load(tiny, lora=mt.LoRA(rank=4), device="cpu", memory=memory)
        optimizer = mt.AdamW(model.trainable_parameters(), lr=1e-2)
        for _ in range(3):
            loss = model.loss(_batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert len(set(losses)) == 1


def test_adapter_rates_of_lora_plus(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=2, lr_ratio=16.0), device="cpu")
    first, second = model.param_groups(1e-3)
    assert (first["lr"], second["lr"]) == (1e-3, 16e-3)
    assert all(p.shape[0] == 2 for p in first["params"]) and all(p.shape[1] == 2 for p in second["params"])


def test_weights_of_tokens(tiny):
    model = mt.load(tiny, device="cpu", dtype="float32")
    plain = _batch()
    weights = torch.rand(plain.n_tokens)
    batch = mt.Batch(tokens=plain.tokens, labels=plain.labels, cu_seqlens=plain.cu_seqlens, weights=weights)
    expected = (model.token_losses(plain) * weights).sum() / plain.n_trained
    assert float(model.loss(batch)) == pytest.approx(float(expected), rel=1e-6)


def test_modes_of_torch_that_would_spoil_a_model_are_refused(tiny):
    with torch.inference_mode(), pytest.raises(mt.InputError, match=r"load: torch\.inference_mode is on"):
        mt.load(tiny, device="cpu")
    ids = torch.arange(3, 9)
    for dtype in ("float32", "bfloat16"):
        model = mt.load(tiny, device="cpu", dtype=dtype)
        expected = model.logits(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if dtype == "float32":
                with pytest.raises(mt.InputError, match=r"the model computes in float32, and torch\.autocast is on"):
                    model.logits(ids)
            else:
                assert torch.equal(model.logits(ids), expected)
