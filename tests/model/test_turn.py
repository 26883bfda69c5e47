"""Turn: threads that share a model get what one thread gets, whatever the others do with it."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import minitune as mt
from minitune.model.generate import WORTH_PREPARING as MANY
from minitune.model.turn import Turn


@pytest.fixture(params=[{"lora": mt.LoRA(rank=4)}, {"lora": mt.LoRA(rank=4, dora=True)},
                        {"lora": mt.LoRA(rank=4), "quant": "nf4"}], ids=["lora", "dora", "nf4"])
def model(request, tiny):
    made = mt.load(tiny, device="cpu", dtype="bfloat16", **request.param)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.normal_(0, 0.1)
    return made.eval()


def jobs(model):
    batch = mt.data.pack([list(range(5, 60)), list(range(70, 90))], tokens=75)[0]

    def loss():
        with torch.no_grad():
            return float(model.loss(batch))

    def base():
        with model.adapter_disabled():
            return loss()

    return [loss, base, lambda: model.logits(range(5, 30)).detach().sum().item(),
            lambda: model.generate([5, 6, 7], 20), lambda: model.generate([[5, 6, 7], [9, 8]], 20)]


def test_losses_and_answers_are_those_of_one_thread(model):
    calls = jobs(model)
    wanted = [call() for call in calls]
    assert len({str(each) for each in wanted[:2]}) == 2

    def run(place):
        return calls[place % len(calls)]() == wanted[place % len(calls)]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(90)))


def test_a_stream_leaves_room_for_others_between_its_pieces(model):
    wanted, calls = model.generate([5, 6, 7], 12), jobs(model)
    expected = calls[0]()
    found, pieces = [], model.stream([5, 6, 7], 12)
    with ThreadPoolExecutor(1) as pool:
        for piece in pieces:
            found.append(piece)
            assert pool.submit(calls[0]).result(30) == expected
    assert found == wanted


def test_a_copy_has_a_turn_of_its_own():
    turn = Turn()
    with turn, turn:
        for other in (copy.deepcopy(turn), pickle.loads(pickle.dumps(turn))):
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(other.__enter__).result(10) is None


def test_several_answers_are_made_as_ever_beside_an_open_stream(model, monkeypatch):
    network, calls = model.network, []
    wanted = model.generate([5, 6, 7], MANY)
    monkeypatch.setattr("minitune.ops.few_rows.pack", lambda weight: calls.append(weight))
    pieces = model.stream([5, 6, 7], MANY)
    found = [next(pieces)]
    assert not calls and network._at_hand == 1
    several = model.generate([[5, 6, 7], [9, 8]], MANY)
    assert len(calls) > 1 and network._at_hand == 1 and network.output.packed is None
    found += pieces
    assert found == wanted and network._at_hand == 0
    assert several == model.generate([[5, 6, 7], [9, 8]], MANY)


def test_a_compiled_program_runs_the_model_as_it_is(model):
    """Rows of several lengths, forward and backward; what is compiled is what stands around the model."""
    seen = set()

    def as_written(graph, _):
        seen.update(getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes
                    if node.op.startswith("call"))
        return graph.forward

    def own(batch):
        hidden = model.hidden(batch)[batch.trained]
        return model.losses_at(hidden, batch.labels[batch.trained]).square().mean()

    torch.compiler.reset()
    compiled = torch.compile(own, backend=as_written)
    for length in (30, 50, 70):
        batch = mt.data.pack([list(range(5, 5 + length))], tokens=length)[0]
        found = []
        for function in (own, compiled):
            loss = function(batch)
            loss.backward()
            found.append([loss.detach(), *(each.grad for each in model.trainable_parameters())])
            model.zero_grad(set_to_none=True)
        for plain, other in zip(*found, strict=True):
            torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)
    assert {"square", "mean"} <= seen and not seen & {"mm", "matmul", "linear", "addmm", "embedding", "_Half"}, seen
