"""Model.generate and complete: draws by seed, and what ends an answer is not handed out."""

import minitune as mt


def test_sampling_is_by_seed_and_cut_by_top_k_and_top_p(tiny):
    model = mt.load(tiny, device="cpu", dtype="float32")
    draws = [model.generate([5, 6, 7], 12, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    greedy = model.generate([5, 6, 7], 12)
    assert model.generate([5, 6, 7], 12, temperature=1.0, top_k=1, seed=3) == greedy
    assert model.generate([5, 6, 7], 12, temperature=1.0, top_p=1e-6, seed=3) == greedy


def test_stop_text_and_eos_are_not_handed_out(tiny):
    model = mt.load(tiny, device="cpu", dtype="float32")
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
