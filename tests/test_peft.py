"""minitune against PEFT: the same adapter trains the same way, and each reads the other's files."""

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
import peft
from peft import LoraConfig, get_peft_model

import minitune as mt
from tests.batches import documents, packed
from tests.oracles import load_theirs, make
from tests.tolerance import relative

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "all linears": ("llama-2-gqa", {"r": 4, "lora_alpha": 8, "target_modules": ALL}),
    "q and v": ("qwen2", {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("qwen3", {"r": 4, "lora_alpha": 4, "target_modules": ALL, "use_rslora": True}),
    "patterns": ("llama-biases", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"],
                                  "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.self_attn.o_proj": 5}}),
    "tied head": ("llama-tied", {"r": 3, "lora_alpha": 6, "target_modules": ["k_proj", "up_proj"]}),
    "lm_head": ("llama-2-gqa", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}),
    "lm_head, tied": ("llama-tied", {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]}),
    "dora": ("llama-biases", {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_dora": True}),
    "dora, some": ("qwen2", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "lm_head"],
                             "use_dora": True, "use_rslora": True}),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    variant, config = CASES[request.param]
    base = make(variant, tmp_path / "base")
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, mt.load(tmp_path / "base", adapter=tmp_path / "theirs", dtype="float32", device="cpu"), tmp_path


def test_their_adapter_gives_their_logits(case):
    theirs, ours, _ = case
    for document in documents():
        with torch.no_grad():
            assert relative(ours.logits(document), theirs(document[None]).logits[0]) < 1e-5
            with ours.adapter_disabled(), theirs.disable_adapter():
                assert relative(ours.logits(document), theirs(document[None]).logits[0]) < 1e-5


def test_our_adapter_gives_our_logits_in_peft(case):
    _, ours, folder = case
    with torch.no_grad():
        for adapter in ours.network.adapters().values():
            adapter.A.add_(0.01)
    ours.save_adapter(folder / "ours")
    loaded = load_theirs(folder / "base", folder / "ours")
    for document in documents():
        with torch.no_grad():
            assert relative(loaded(document[None]).logits[0], ours.logits(document)) < 1e-5


def _peft_loss(model, found):
    """Mean over all trained tokens of all documents, each run alone."""
    losses = [torch.nn.functional.cross_entropy(model(d[None]).logits[0, :-1], d[1:], reduction="sum") for d in found]
    return sum(losses) / sum(len(d) - 1 for d in found)


def test_twenty_steps_follow_peft(case):
    theirs, ours, _ = case
    batch = packed(documents())
    start = {name: p.detach().clone() for name, p in theirs.named_parameters() if p.requires_grad}
    reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    optimizer = mt.AdamW(ours.trainable_parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(20):
        expected, loss = _peft_loss(theirs, documents()), ours.loss(batch)
        assert float(loss) == pytest.approx(float(expected), rel=2e-5)
        for value, step in ((expected, reference), (loss, optimizer)):
            step.zero_grad()
            value.backward()
            step.step()
    adapters = ours.network.adapters()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            path, kind = name.removeprefix("base_model.model.").split(".lora_")
            mine = getattr(adapters[path], kind[0]).detach()
            change = parameter.detach() - start[name]
            assert relative(mine - start[name], change) < 0.02, name


@pytest.mark.parametrize("make_optimizer", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: mt.AdamW(p, lr=1e-2),
    lambda p: mt.SGD(p, lr=0.1, momentum=0.9),
], ids=["loop", "foreach", "fused", "torch-sgd", "adamw", "sgd"])
def test_nothing_stale_is_read_after_a_step(tmp_path, make_optimizer):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, lora=mt.LoRA(rank=4), dtype="float32", device="cpu")
    batch = packed(documents())
    optimizer = make_optimizer(model.trainable_parameters())
    losses = []
    for _ in range(3):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        fresh = mt.load(tmp_path, lora=mt.LoRA(rank=4), dtype="float32", device="cpu")
        for mine, theirs in zip(fresh.network.adapters().values(), model.network.adapters().values(), strict=True):
            mine.A.data.copy_(theirs.A)
            mine.B.data.copy_(theirs.B)
        assert torch.equal(fresh.loss(batch), model.loss(batch))
    assert losses[2] < losses[1] < losses[0]


def test_any_split_into_micro_batches_gives_the_same_gradient(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, lora=mt.LoRA(rank=4), dtype="float32", device="cpu")
    for adapter in model.network.adapters().values():
        adapter.B.data.normal_(0, 0.05)
    every = [*documents(), *documents()[:2]]
    splits = [[every], [every[:1], every[1:]], [[d] for d in every]]
    gradients = []
    for split in splits:
        n = sum(packed(part).n_trained for part in split)
        model.zero_grad()
        for part in split:
            (model.loss_sum(packed(part))[0] / n).backward()
        gradients.append([p.grad.clone() for p in model.trainable_parameters()])
    for other in gradients[1:]:
        assert all(relative(a, b) < 1e-6 for a, b in zip(other, gradients[0], strict=True))


def test_dropout_trains_and_is_off_in_evaluation(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, lora=mt.LoRA(rank=4, dropout=0.5), dtype="float32", device="cpu")
    for adapter in model.network.adapters().values():
        adapter.B.data.normal_(0, 0.05)
    batch = packed(documents())
    model.train()
    torch.manual_seed(1)
    first, second = float(model.loss(batch)), float(model.loss(batch))
    torch.manual_seed(1)
    assert float(model.loss(batch)) == first != second
    model.loss(batch).backward()
    assert all(p.grad is not None for p in model.trainable_parameters())
    model.eval()
    plain = copy.deepcopy(model)
    for adapter in plain.network.adapters().values():
        adapter.dropout = 0.0
    assert torch.equal(model.loss(batch), plain.train().loss(batch))


def test_peft_is_recent_enough_to_be_the_oracle():
    assert tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 17)
