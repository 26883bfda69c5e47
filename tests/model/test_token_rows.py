"""Tokens that are added to a vocabulary: their rows are trained beside an adapter, as PEFT does it, and go along."""

import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import minitune as mt
from tests.files import BASE
from tests.oracles import logits_of, make
from tests.tolerance import relative

IDS = [5, 9, 40]
TOKENS = torch.tensor([3, 5, 11, 40, 9, 5, 2, 60])
LORA = mt.LoRA(rank=4, targets=("q_proj", "down_proj"))


def _theirs(folder, variant):
    base = make(variant, folder / "base")
    ids = IDS if variant.endswith("tied") else {"embed_tokens": IDS, "lm_head": IDS}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"],
                                            trainable_token_indices=ids))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            parameter.data += torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder / "theirs")
    return model


@pytest.fixture(params=["llama-tied", "llama-2-gqa"])
def pair(request, tmp_path):
    theirs = _theirs(tmp_path, request.param)
    return theirs, mt.load(tmp_path / "base", adapter=tmp_path / "theirs", device="cpu", dtype="float32"), tmp_path


def test_their_rows_give_their_logits(pair):
    theirs, ours, _ = pair
    assert ours.network.output.rows.ids == tuple(IDS)
    with torch.no_grad():
        assert relative(ours.logits(TOKENS), theirs(TOKENS[None]).logits[0]) < 1e-5
        with ours.adapter_disabled(), theirs.disable_adapter():
            assert relative(ours.logits(TOKENS), theirs(TOKENS[None]).logits[0]) < 1e-5


def test_our_rows_give_our_logits_in_peft(pair):
    _, ours, folder = pair
    with torch.no_grad():
        ours.network.output.rows.embedding.add_(0.05)
    ours.save_adapter(folder / "ours")
    assert relative(logits_of(folder / "base", TOKENS, folder / "ours"), ours.logits(TOKENS).detach()) < 1e-5


def test_ten_steps_follow_peft(pair):
    theirs, ours, _ = pair
    batch = mt.data.pack([TOKENS.tolist()], len(TOKENS))[0]
    mine, reference = (kind(model, lr=1e-3) for kind, model in (
        (mt.AdamW, ours.trainable_parameters()),
        (torch.optim.AdamW, [p for p in theirs.parameters() if p.requires_grad])))
    for group in reference.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(10):
        expected = torch.nn.functional.cross_entropy(theirs(TOKENS[None]).logits[0, :-1], TOKENS[1:])
        loss = ours.loss(batch)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5)
        for value, optimizer in ((expected, reference), (loss, mine)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    theirs_rows = next(p for n, p in theirs.named_parameters() if "embed_tokens" in n and "trainable" in n)
    assert relative(ours.network.output.rows.embedding, theirs_rows) < 1e-4


def test_a_merged_model_has_the_rows(pair):
    _, ours, folder = pair
    ours.save_merged(folder / "merged")
    expected = ours.logits(TOKENS).detach()
    assert relative(logits_of(folder / "merged", TOKENS), expected) < 1e-5
    assert relative(mt.load(folder / "merged", device="cpu", dtype="float32").logits(TOKENS), expected) < 1e-5


@pytest.mark.parametrize("prompts", [[[5, 6, 9]], [[5, 6, 7], [40, 8]]], ids=["one", "several"])
def test_generation_is_that_of_the_logits(pair, prompts):
    _, ours, _ = pair
    for prompt, new in zip(prompts, ours.generate(prompts, 10), strict=True):
        whole = torch.tensor([*prompt, *new])
        assert ours.logits(whole).argmax(-1)[len(prompt) - 1 : -1].tolist() == new


# -- tokens that the vocabulary lacks, by name ------------------------------------------------------------------------

NEW = ("<call>", "</call>")


def _data(model):
    text = "<call>weather</call> in Paris"
    return [mt.data.pack([model.tokenizer.encode(text) * 8], 512)[0]], text


def test_a_new_token_is_one_id_and_is_learned(tmp_path):
    model = mt.load(BASE, lora=mt.LoRA(rank=4), add_tokens=NEW, device="cpu", dtype="float32")
    before = mt.data.load_tokenizer(BASE)
    ids = [model.tokenizer.id_of(token) for token in NEW]
    assert ids == [before.vocab_size, before.vocab_size + 1] and model.config.vocab_size >= max(ids) + 1
    batches, text = _data(model)
    encoded = model.tokenizer.encode(text)
    assert ids[0] in encoded and ids[1] in encoded and model.tokenizer.decode(encoded) == text
    run = mt.train(model, batches, lr=1e-2, max_steps=25)
    assert run.losses[-1] < 0.5 * run.losses[0]
    model.save_adapter(tmp_path / "adapter")
    again = mt.load(BASE, adapter=tmp_path / "adapter", device="cpu", dtype="float32")
    assert again.tokenizer.encode(text) == encoded
    assert torch.equal(again.logits(encoded), model.logits(encoded))
    model.save_merged(tmp_path / "merged")
    merged = mt.load(tmp_path / "merged", device="cpu", dtype="float32")
    assert merged.tokenizer.encode(text) == encoded
    assert relative(merged.logits(encoded), model.logits(encoded).detach()) < 5e-3      # the base lies in 16 bits


def test_the_whole_model_may_train_new_tokens(tmp_path):
    model = mt.load(BASE, train="full", add_tokens=NEW, device="cpu", dtype="float32")
    batches, text = _data(model)
    mt.train(model, batches, lr=1e-3, max_steps=2)
    model.save(tmp_path)
    again = mt.load(tmp_path, device="cpu", dtype="float32")
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert again.config.vocab_size == model.config.vocab_size


def test_more_tokens_beside_those_of_an_adapter(tmp_path):
    model = mt.load(BASE, lora=mt.LoRA(rank=4), add_tokens=NEW[:1], device="cpu", dtype="float32")
    mt.train(model, _data(model)[0], lr=1e-2, max_steps=3)
    model.save_adapter(tmp_path)
    again = mt.load(BASE, adapter=tmp_path, add_tokens=NEW[1:], device="cpu", dtype="float32")
    assert len(again.network.output.rows.ids) == 2
    assert torch.equal(again.network.output.rows.embedding[0], model.network.output.rows.embedding[0])


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "add_tokens needs rows of the embedding to train"),
    ({"train": "norms"}, "add_tokens needs rows of the embedding to train"),
    ({"lora": LORA, "add_tokens": "<call>"}, "add_tokens is '<call>'; give a list of texts"),
    ({"lora": LORA, "add_tokens": [" a"]}, "without blanks around it"),
    ({"lora": mt.LoRA(rank=4, targets=("lm_head",))}, "an adapter on lm_head and trained rows of single tokens"),
], ids=["frozen", "norms", "text", "blank", "lm_head"])
def test_bad_use_is_named(settings, message):
    with pytest.raises(mt.InputError, match=message):
        mt.load(BASE, **{"add_tokens": NEW, "device": "cpu", **settings})


def test_rows_go_on_in_full_precision_beside_more_tokens(tmp_path):
    model = mt.load(BASE, lora=mt.LoRA(rank=4), add_tokens=NEW[:1], device="cpu", dtype="bfloat16")
    with torch.no_grad():
        model.network.output.rows.embedding.normal_()
    model.save_adapter(tmp_path)
    again = mt.load(BASE, adapter=tmp_path, add_tokens=NEW[1:], device="cpu", dtype="bfloat16")
    assert torch.equal(again.network.output.rows.embedding[0], model.network.output.rows.embedding[0])


def test_rows_of_a_head_of_its_own_go_on_too(tmp_path):
    make("llama-2-gqa", tmp_path)
    network = mt.load(tmp_path, lora=LORA, device="cpu", dtype="float32").network
    network.train_tokens([9, 5])
    with torch.no_grad():
        network.output.rows.embedding.normal_()
        network.output.rows.head.normal_()
    before = network.output.rows
    network.train_tokens([40, 9, 5])
    after = network.output.rows
    assert before.ids == (5, 9) and after.ids == (5, 9, 40)
    assert torch.equal(after.embedding[:2], before.embedding) and torch.equal(after.head[:2], before.head)
    assert torch.equal(after.embedding[2], network.embedding[40]) and torch.equal(after.head[2], network.head[40])


@pytest.mark.parametrize("variant", ["llama-tied", "llama-2-gqa"])
def test_a_vocabulary_that_peft_resized_is_taken_over(tmp_path, variant):
    base = make(variant, tmp_path / "base")
    base.resize_token_embeddings(100)
    ids = [98, 99] if variant.endswith("tied") else {"embed_tokens": [98, 99], "lm_head": [98, 99]}
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"],
                                             trainable_token_indices=ids)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            parameter.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours = mt.load(tmp_path / "base", adapter=tmp_path / "theirs", device="cpu", dtype="float32")
    tokens = torch.tensor([3, 97, 98, 5, 99])
    with torch.no_grad():
        assert relative(ours.logits(tokens), theirs(tokens[None]).logits[0]) < 1e-5


def test_a_list_of_tokens_leaves_an_untied_head_alone_as_in_peft(tmp_path):
    base = make("llama-2-gqa", tmp_path / "base")
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"],
                                             trainable_token_indices=IDS))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mt.load(tmp_path / "base", adapter=tmp_path / "theirs", device="cpu", dtype="float32")
    assert ours.network.output.rows.head is None
    with torch.no_grad():
        ours.network.output.rows.embedding.add_(0.1)
    ours.save_adapter(tmp_path / "ours")
    expected = logits_of(tmp_path / "base", TOKENS, tmp_path / "ours")
    assert relative(ours.logits(TOKENS).detach(), expected) < 1e-5
    ours.save_merged(tmp_path / "merged")
    assert relative(mt.load(tmp_path / "merged", device="cpu", dtype="float32").logits(TOKENS), expected) < 1e-5


def test_ids_far_beyond_the_vocabulary_take_no_memory(tmp_path):
    _theirs(tmp_path, "llama-tied")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [5, 9, 2_000_000_000]}))
    with pytest.raises(mt.InputError, match="trainable_token_indices go up to 2000000000, and the rows between 96 and"):
        mt.load(tmp_path / "base", adapter=tmp_path / "theirs", device="cpu")


@pytest.mark.parametrize(("said", "message"), [
    (None, "has trained rows of embed_tokens, but"), ([5, 9], "as many as"), ([5, 5, 9], "each once"),
    ("all", "must be a list of token ids"), ({"embed_tokens": IDS, "lm_head": [5, 9, 41]}, "the same ids"),
], ids=["none", "fewer", "twice", "text", "differ"])
def test_files_that_do_not_agree_are_refused(tmp_path, said, message):
    _theirs(tmp_path, "llama-tied")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": said}))
    with pytest.raises(mt.InputError, match=message):
        mt.load(tmp_path / "base", adapter=tmp_path / "theirs", device="cpu")


def test_rows_of_another_width_are_refused(tmp_path):
    _theirs(tmp_path, "llama-tied")
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "trainable" in name)
    save_file(tensors | {name: torch.ones(3, 7)}, path, metadata={"format": "pt"})
    with pytest.raises(mt.InputError, match="have 7 elements, the model's 48"):
        mt.load(tmp_path / "base", adapter=tmp_path / "theirs", device="cpu")
