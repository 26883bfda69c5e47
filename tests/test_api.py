"""The public face: loading, training, saving, generating, and one clear error for each misuse."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

import minitune as mt
from minitune.checkpoint import writer
from minitune.model.shapes import SHAPES
from tests.oracles import make
from tests.tolerance import relative

TRAIN = {"full": None, "head": {"lm_head.weight"}, "embedding": {"model.embed_tokens.weight"},
         "norms": 7, "last:1": 9, ("*.q_proj.weight",): 3, ("last:1", "head"): 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with a tokenizer, written by `mt.init`."""
    folder = tmp_path_factory.mktemp("tiny")
    mt.init("tiny", folder, tokenizer=Path(mt.__file__).parent / "examples" / "base", seed=1)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Number {i} is", "completion": f" {i * i}."}) + "\n"
                            for i in range(20)))
    return path


def _batch(n=40, seed=0):
    ids = torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return mt.data.pack([ids[: n // 2], ids[n // 2:]], n)[0]


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
    before = float(model.loss(batch))
    for _ in range(3):
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = model.logits(batch.tokens)
    assert float(model.loss(batch)) < before
    model.save(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert relative(theirs(batch.tokens[None]).logits[0], after) < 1e-5
    assert mt.load(tmp_path / "saved", dtype="float32", device="cpu").generate([5, 6], 4) == model.generate([5, 6], 4)


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
    model = mt.load(tmp_path / "base", train="full", device="cpu")
    before, write = [], writer._write_tensor
    with Casts() as casts:
        monkeypatch.setattr(writer, "_write_tensor", lambda *args: (before.append(casts.made), write(*args)))
        model.save(tmp_path / "saved")
    assert before == list(range(1, len(model.network.hf_weights()) + 1))
    name = "model.safetensors"
    assert (tmp_path / "saved" / name).stat().st_size <= (tmp_path / "base" / name).stat().st_size


def test_a_model_moves_and_casts_to_the_dtype_that_it_has(folder):
    model = mt.load(folder, lora=mt.LoRA(rank=2), device="cpu", dtype="float32")
    assert model.to("cpu") is model and model.float() is model and model.cpu() is model
    assert model.logits([5, 6, 7]).shape == (3, 4096)


def test_all_is_frozen_by_default(folder):
    model = mt.load(folder, device="cpu")
    with pytest.raises(mt.InputError, match="nothing to train"):
        model.trainable_parameters()
    assert not model.loss(_batch()).requires_grad


def test_train_lowers_the_loss_and_repeats_bit_for_bit(folder, data, tmp_path):
    runs = []
    for place in ("a", "b"):
        model = mt.load(folder, lora=mt.LoRA(rank=4), device="cpu")
        run = mt.train(model, data, tokens=128, epochs=12, lr=3e-3, micro_batches=2)
        model.save_adapter(tmp_path / place)
        runs.append(run)
    assert runs[0].final_loss < runs[0].records[0].loss - 0.2
    assert [r.loss for r in runs[0].records] == [r.loss for r in runs[1].records]
    a, b = ((tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("a", "b"))
    assert a == b
    loaded = mt.load(folder, adapter=tmp_path / "a", device="cpu")
    assert loaded.complete("Number 3 is", 8) == model.complete("Number 3 is", 8)


def test_memory_policies_train_alike(folder):
    losses = []
    for memory in ("keep", "pointwise", "full", "offload", "auto"):
        model = mt.load(folder, lora=mt.LoRA(rank=4), device="cpu", memory=memory)
        optimizer = mt.AdamW(model.trainable_parameters(), lr=1e-2)
        for _ in range(3):
            loss = model.loss(_batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    assert len(set(losses)) == 1


def test_adapter_rates_of_lora_plus(folder):
    model = mt.load(folder, lora=mt.LoRA(rank=2, lr_ratio=16.0), device="cpu")
    first, second = model.param_groups(1e-3)
    assert (first["lr"], second["lr"]) == (1e-3, 16e-3)
    assert all(p.shape[0] == 2 for p in first["params"]) and all(p.shape[1] == 2 for p in second["params"])


def test_weights_of_tokens(folder):
    model = mt.load(folder, device="cpu", dtype="float32")
    plain = _batch()
    weights = torch.rand(plain.n_tokens)
    batch = mt.Batch(tokens=plain.tokens, labels=plain.labels, cu_seqlens=plain.cu_seqlens, weights=weights)
    expected = (model.token_losses(plain) * weights).sum() / plain.n_trained
    assert float(model.loss(batch)) == pytest.approx(float(expected), rel=1e-6)


def test_sampling_is_by_seed_and_cut_by_top_k_and_top_p(folder):
    model = mt.load(folder, device="cpu", dtype="float32")
    draws = [model.generate([5, 6, 7], 12, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    greedy = model.generate([5, 6, 7], 12)
    assert model.generate([5, 6, 7], 12, temperature=1.0, top_k=1, seed=3) == greedy
    assert model.generate([5, 6, 7], 12, temperature=1.0, top_p=1e-6, seed=3) == greedy


def test_stop_text_and_eos_are_not_handed_out(folder):
    model = mt.load(folder, device="cpu", dtype="float32")
    tokenizer = model.tokenizer
    answer = model.generate(tokenizer.encode("import"), 12)
    text = tokenizer.decode(answer, continues=True)
    stop = text[len(text) // 2:][:3]
    assert model.complete("import", 12, stop=stop) == text[: text.index(stop)]      # to the character
    ids = model.generate(tokenizer.encode("import"), 12, stop=stop)
    assert ids == answer[: len(ids)] and stop not in tokenizer.decode(ids, continues=True)
    end = answer[4]
    model.network.config = type(model.config)(**{**model.config.__dict__, "eos_ids": (end,)})
    assert model.generate(tokenizer.encode("import"), 12) == answer[: answer.index(end)]


@pytest.mark.parametrize("shape", SHAPES)
def test_named_shapes_have_their_published_sizes(shape):
    billions = {"llama-2-7b": 6.738, "llama-3-8b": 8.030, "llama-3.1-8b": 8.030, "llama-3.2-1b": 1.236,
                "mistral-7b": 7.242, "qwen2-7b": 7.616, "qwen3-8b": 8.191, "134m": 0.134, "787m": 0.787,
                "tiny": 0.001312}
    c = SHAPES[shape]
    heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    layer = c.d_model * (heads + c.n_heads * c.head_dim + 3 * c.d_ff + 2) + heads * c.qkv_bias
    layer += 2 * c.head_dim * c.qk_norm
    total = c.n_layers * layer + c.d_model + c.vocab_size * c.d_model * (1 if c.tied_head else 2)
    assert total / 1e9 == pytest.approx(billions[shape], rel=5e-3)


MISUSE = {
    "no folder": (lambda f: mt.load("nowhere"), "nowhere"),
    "quant": (lambda f: mt.load(f, quant="fp4"), "quant is 'fp4'"),
    "device": (lambda f: mt.load(f, device="gpu"), "device"),
    "dtype": (lambda f: mt.load(f, dtype="int8"), "dtype"),
    "target": (lambda f: mt.load(f, lora=mt.LoRA(targets=("qproj",))), "qproj"),
    "pattern": (lambda f: mt.load(f, lora=mt.LoRA(rank_pattern={"o_prj": 2})), "o_prj"),
    "path": (lambda f: mt.load(None), "path is None"),
    "batch": (lambda f: mt.load(f).loss("text"), "loss: batch is 'text'; give an mt.Batch"),
    "batch of ids": (lambda f: mt.load(f).loss_sum([1, 2]), r"loss_sum: batch is \[1, 2\]; give an mt.Batch"),
    "adapter path": (lambda f: mt.load(f, adapter=3), "adapter is 3"),
    "seed": (lambda f: mt.load(f, lora=mt.LoRA(), seed="a"), "seed is 'a'"),
    "device meta": (lambda f: mt.load(f, device="meta"), "'meta' is not one that minitune runs on"),
    "device mps": (lambda f: mt.load(f, device="mps"), "'mps' is not one that minitune runs on"),
    "device type": (lambda f: mt.load(f, device=[1]), "device"),
    "half": (lambda f: mt.load(f).half(), "cast to torch.float16"),
    "float": (lambda f: mt.load(f, dtype="bfloat16").float(), "cast to torch.float32"),
    "to dtype": (lambda f: mt.load(f, dtype="float32").to("cpu", torch.float64), "cast to torch.float64"),
    "init folder": (lambda f: mt.init("tiny", None), "folder is None"),
    "train data": (lambda f: mt.train(mt.load(f, lora=mt.LoRA()), 3), "data is 3"),
    "rank": (lambda f: mt.LoRA(rank=0), "rank"),
    "dropout": (lambda f: mt.LoRA(dropout=1.0), "dropout"),
    "train": (lambda f: mt.load(f, train="lst:2"), "lst:2"),
    "train nothing": (lambda f: mt.load(f, train=[]), r"train is \[\]"),
    "train type": (lambda f: mt.load(f, train=3), "train is 3"),
    "train pattern": (lambda f: mt.load(f, train=["*.q_prj.*"]), "q_prj"),
    "lora and adapter": (lambda f: mt.load(f, lora=mt.LoRA(), adapter=f), "both"),
    "lr": (lambda f: mt.Training(lr=float("nan")), "lr"),
    "setting": (lambda f: mt.train(mt.load(f), [], learning_rate=1), "learning_rate"),
    "empty prompt": (lambda f: mt.load(f).generate([], 3), "empty"),
    "id": (lambda f: mt.load(f).generate([4096], 3), "4096"),
    "id type": (lambda f: mt.load(f).generate([1.5], 3), "ids is"),
    "temperature type": (lambda f: mt.load(f).generate([1], 3, temperature="a"), "temperature is 'a'"),
    "top_k type": (lambda f: mt.load(f).generate([1], 3, temperature=1, top_k=1.5), "top_k is 1.5"),
    "top_p type": (lambda f: mt.load(f).generate([1], 3, temperature=1, top_p="a"), "top_p is 'a'"),
    "stop": (lambda f: mt.load(f).generate([1], 3, stop=[3]), r"stop is \[3\]"),
    "stop type": (lambda f: mt.load(f).complete("a", 3, stop=3), "stop is 3"),
    "draw seed": (lambda f: mt.load(f).generate([1], 3, temperature=1, seed="a"), "seed is 'a'"),
    "large seed": (lambda f: mt.load(f).complete("a", 3, temperature=1, seed=2**64), "seed is 18446744073709551616"),
    "max_new_tokens": (lambda f: mt.load(f).complete("a", max_new_tokens=1.5), "max_new_tokens is 1.5"),
    "too many tokens": (lambda f: mt.load(f).generate([1], 2**31), "max_new_tokens is 2147483648"),
    "text": (lambda f: mt.load(f).complete(3), "expected text"),
    "temperature": (lambda f: mt.load(f).generate([1], 3, temperature=-1), "temperature"),
    "top_p": (lambda f: mt.load(f).generate([1], 3, temperature=1, top_p=0), "top_p"),
    "logits": (lambda f: mt.load(f).logits([1, 2, 3], torch.tensor([0, 2])), "cu_seqlens"),
    "logits text": (lambda f: mt.load(f).logits("a"), "tokens is 'a'"),
    "logits fraction": (lambda f: mt.load(f).logits([1.5]), r"tokens is \[1.5\]"),
    "logits true": (lambda f: mt.load(f).logits(torch.tensor([True])), "tokens is"),
    "logits none": (lambda f: mt.load(f).logits([]), "tokens is"),
    "logits bounds": (lambda f: mt.load(f).logits([1, 2], [0, 2**32 + 2]), "cu_seqlens is"),
    "save adapter": (lambda f: mt.load(f).save_adapter(f / "x"), "no adapter"),
    "save with adapter": (lambda f: mt.load(f, lora=mt.LoRA()).save(f / "x"), "adapter"),
    "nothing trained": (lambda f: mt.load(f).loss(mt.Batch(
        tokens=torch.tensor([1, 2]), labels=torch.tensor([-100, -100]),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))), "no token"),
    "shape": (lambda f: mt.init("llama2-7b", f / "x"), "llama-2-7b"),
    "batch labels": (lambda f: mt.Batch(
        tokens=torch.tensor([1, 2]), labels=torch.tensor([2, 1]),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)), "-100"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_gets_one_clear_error(case, folder):
    action, word = MISUSE[case]
    with pytest.raises(mt.InputError, match=word.replace("*", ".")) as error:
        action(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (folder / "x").exists()


def test_a_rank_beyond_the_layer_is_refused(tmp_path):
    make("llama-2-gqa", tmp_path)
    with pytest.raises(mt.InputError, match=r"rank is 100000 for model.layers.0.self_attn.q_proj, which is \d+ x \d+"):
        mt.load(tmp_path, lora=mt.LoRA(rank=100_000))
