"""What tests/test_fake_gpu.py runs on a GPU that computes nothing: ``python -m tests.fake_gpu_runs LIBRARY GROUP``
prints a line of JSON a run.

A line has the run's name and "waits", what the host waited for and where; or "error".
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.fake_gpu import device, order

LENGTHS = (1500, 31, 700)
LORAS: dict[str, dict[str, Any]] = {"LoRA": {}, "dropout": {"dropout": 0.1}, "DoRA": {"dora": True},
                                    "rank 7 on two": {"rank": 7, "targets": ("q_proj", "down_proj")}}
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"memory {memory}": {"memory": memory} for memory in ("keep", "pointwise", "full", "offload")},
    "nf4": {"quant": "nf4"}, "nf4-dq, full": {"quant": "nf4-dq", "memory": "full"}, "fp32": {"dtype": "float32"}}
WAYS = ({"attention_forward": "triton"}, {"attention_backward": "triton"},
        {"attention_forward": "triton", "attention_backward": "triton"},
        *({f"lora_matmul_{step}": way} for step in ("forward", "input", "adapters")
                                   for way in ("triton", "augmented")))


def _load(folder: Path, variant: str, lora: dict[str, Any], **options: Any) -> Any:
    """A model of a variant with an adapter, or with what is trained, in training."""
    import minitune as mt
    from tests.oracles import make

    if not (folder / variant).exists():
        make(variant, folder / variant)
    adapter = {} if "train" in options else {"lora": mt.LoRA(**{"rank": 4} | lora)}
    model = mt.load(folder / variant, device="cuda", **adapter, **options)
    model.train()
    return model


def _step(folder: Path, variant: str = "qwen3", lora: dict[str, Any] | None = None, optimizer: str = "adamw",
          native: bool = True, forced: dict[str, str] | None = None, asked: str | None = None,
          lengths: tuple[int, ...] = LENGTHS, **options: Any) -> dict[str, Any]:
    """Two steps from a pinned batch on."""
    import minitune as mt
    from minitune.ops import backends, tuned
    from tests.batches import documents, packed

    batch = packed(documents(lengths, 5), sum(lengths) + 9 * (lengths is LENGTHS))
    by = contextlib.nullcontext() if asked is None else backends.use(asked)
    with device.fake_gpu(native) as watch, tuned.forced(**forced or {}), by:
        model = _load(folder, variant, lora or {}, **options)
        parameters = list(model.trainable_parameters())
        made = {"adamw": lambda: mt.AdamW(parameters), "8 bits": lambda: mt.AdamW(parameters, moments="8bit"),
                "sgd": lambda: mt.SGD(parameters, lr=1e-3, momentum=0.9)}[optimizer]()
        given = batch.pin_memory().to("cuda")
        watch.restart()
        for _ in range(2):
            model.loss(given).backward()
            made.clip(1.0)
            made.step()
            made.zero_grad()
        return {"waits": watch.waits, "races": watch.order.races, "launches": watch.launches, "ops": watch.ops}


def _recorded(folder: Path, **options: Any) -> dict[str, Any]:
    """A step as a CUDA graph."""
    import minitune as mt
    from minitune.objectives.sft import sft
    from minitune.training.graph import GraphedStep
    from tests.batches import documents, packed

    batch = packed(documents(LENGTHS, 5), sum(LENGTHS) + 9)
    with device.fake_gpu() as watch:
        model = _load(folder, "qwen3", {}, **options)
        whole = GraphedStep(model, mt.AdamW(model.trainable_parameters()), batch, sft, n_documents=8, n_trained=2_400)
        watch.restart()
        whole([batch, batch], 1e-3, 1.0)
        order.synchronize()     # tables that the warm-up made on its own stream go with the model
        return {"waits": watch.waits, "races": watch.order.races}


def steps(folder: Path) -> None:
    """Training steps of every variant and way, the optimizers, and a step that is recorded."""
    from tests.oracles import VARIANTS

    step = functools.partial(_step, folder)
    for variant in VARIANTS:
        report(variant, step, variant)
    for name, lora in LORAS.items():
        report(name, step, lora=lora)
        report(f"{name}, nf4-dq", step, lora=lora, quant="nf4-dq")
    for name, options in OPTIONS.items():
        report(name, step, **options)
        if "quant" in options:
            report(f"{name}, without the extension's CUDA half", step, native=False, **options)
    for optimizer in ("8 bits", "sgd"):
        report(optimizer, step, optimizer=optimizer)
    for train in ("full", "last:1", "norms", "embedding", "head"):
        report(f"train {train}", step, train=train)
    for forced in WAYS:
        report(f"forced {forced}", step, "llama-2-gqa", forced=forced)
    report("norms give S", step, "llama-2-gqa", forced={"rms_norm_s": "triton"}, lengths=(8300,))
    equal = functools.partial(step, "llama-2-gqa", lengths=(300,) * 4)
    report("cudnn forward", equal, forced={"attention_forward": "cudnn"})
    report("cudnn forward, whole layer", equal, forced={"attention_forward": "cudnn"}, memory="full")
    report("cudnn asked for", equal, asked="cudnn")
    report("forced augmented, nf4-dq", step, "llama-2-gqa", quant="nf4-dq",
           forced={f"lora_matmul_{each}": "augmented" for each in ("forward", "input")})
    for policy in ("keep", "full"):
        report(f"recorded, {policy}", _recorded, folder, memory=policy)
        report(f"recorded, {policy}, nf4-dq", _recorded, folder, memory=policy, quant="nf4-dq")


def uses(folder: Path) -> None:
    """What a user does beside the bare step: a whole run, evaluation, generation, files, the doctor's checks."""
    import torch

    import minitune as mt
    from minitune.bench import Setting, bench
    from minitune.objectives.dpo import DPO
    from minitune.ops import checks, tuning
    from minitune.training import runner, spikes
    from tests.batches import documents, packed
    from tests.oracles import make

    make("qwen3", folder / "base")
    batches = [packed(documents((40, 9), seed), 64) for seed in range(3)]

    def run(use: Callable[[Any], object], **options: Any) -> dict[str, Any]:
        with device.fake_gpu() as watch:
            model = mt.load(folder / "base", device="cuda", lora=mt.LoRA(rank=4), **options)
            watch.restart()
            use(model)
            return {"waits": watch.waits, "races": watch.order.races}

    def tune() -> dict[str, Any]:
        """Nothing has a value here, so every result would differ."""
        with (device.fake_gpu(), mock.patch.object(tuning, "_compare"),
              mock.patch.object(torch.cuda, "_sleep", create=True)):
            gpu = torch.device("cuda")
            tables = [
                tuning.measure({"qkv": (6144, 4096, 48)}, ("qkv",), (32, 8, 128), 16_384, 2048, torch.bfloat16, gpu),
                tuning.attention_table((16, 8, 256), 4096, 4096, torch.bfloat16, gpu)]
            return {"waits": {}, "ways": [[op, *shape, sorted(ms)] for table in tables for op, shapes in table.items()
                                          for shape, ms in shapes.items()]}

    def out_of_memory(model: Any) -> None:
        real, left = runner.gradients, [1, 1, 1, 1]

        def not_at_once(*given: Any) -> Any:
            found = real(*given)
            if left:
                left.pop()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        with mock.patch.object(runner, "gradients", not_at_once):
            assert len(mt.train(model, batches, tokens=64, quiet=True).records) == 3

    def spikes_skipped(model: Any) -> None:
        with mock.patch.object(spikes, "LEAST", 1):
            mt.train(model, batches, epochs=2, tokens=64, log_every=100, micro_batches=2, quiet=True, spikes="skip")

    class Unchecked(DPO):
        """It does not look whether the adapter is new, whose memory holds anything here."""

        with_reference = False

    def prefer(model: Any) -> None:
        """The four documents of a row as two pairs."""
        rows = [packed(documents((40, 9, 12, 30), seed), 96) for seed in range(3)]
        rows = [mt.Batch(tokens=row.tokens, labels=row.labels, cu_seqlens=row.cu_seqlens, n_filler=row.n_filler)
                for row in rows]
        mt.train(model, rows, tokens=96, epochs=2, micro_batches=2, log_every=100, quiet=True, objective=Unchecked())

    def save(model: Any) -> None:
        model.save_adapter(folder / "adapter")
        model.save_merged(folder / "merged")

    report("train", run, lambda model: mt.train(model, batches, epochs=2, tokens=64, log_every=100, micro_batches=2,
                                                quiet=True))
    report("train, out", run, lambda model: mt.train(model, batches, tokens=64, out=folder / "run", save_every=2,
                                                     valid=batches[:1], moments="8bit", quiet=True))
    report("train, spikes skipped", run, spikes_skipped)
    report("train, dpo", run, prefer)
    report("train, out of memory", run, out_of_memory)
    report("tune", tune)
    report("evaluate", run, lambda model: mt.evaluate(model, batches))
    report("generate", run, lambda model: model.generate([[5, 6, 7], [8]], 9))
    report("sample", run, lambda model: model.generate([[5, 6, 7], [8]], 9, temperature=0.7, top_p=0.9, top_k=5))
    report("generate, nf4-dq", run, lambda model: model.generate([[5, 6, 7], [8]], 9), quant="nf4-dq")
    report("save", run, save)
    report("save, nf4-dq", run, lambda model: model.save_merged(folder / "merged-nf4"), quant="nf4-dq")
    report("to the CPU", run, lambda model: model.network.to("cpu"))
    def measured(quant: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            bench(Setting(base="tiny", tokens=64, longest=None, micro_batches=2, seconds=1e-9, rank=4, train=(),
                          quant=quant, memory="auto", moments="fp32"), "cuda", None, None)

    report("bench", run, lambda model: measured(None))
    report("bench, nf4-dq", run, lambda model: measured("nf4-dq"))
    report("doctor", run, lambda model: list(checks.run(model.config, 300, torch.bfloat16, torch.device("cuda"))))


def faults(_: Path) -> None:
    """What must be seen."""
    import torch

    def run(use: Callable[[Any], object]) -> dict[str, Any]:
        with device.fake_gpu() as watch:
            x = torch.ones(1000, device="cuda")
            watch.restart()
            use(x)
            return {"waits": watch.waits, "peak": watch.peak, "live": watch.live}

    report("an item", run, lambda x: x.sum().item())
    report("to the host", run, lambda x: x.cpu())
    report("copied to the host", run, lambda x: torch.zeros(1000).copy_(x))
    report("copied from the host", run, lambda x: x.copy_(torch.zeros(1000)))
    report("from the host", run, lambda x: torch.zeros(1000).to(x.device))
    report("from memory that is not pinned", run, lambda x: torch.zeros(1000).to(x.device, non_blocking=True))
    report("from pinned memory", run, lambda x: torch.zeros(1000).pin_memory().to(x.device, non_blocking=True))
    report("into pinned memory", run, lambda x: torch.empty(1000, pin_memory=True).copy_(x, non_blocking=True))
    report("two devices", run, lambda x: x + torch.zeros(1000))
    report("a boolean index", run, lambda x: x[x > 0])
    report("memory", run, lambda x: (x * 2 * 2).sum())


def streams(folder: Path) -> None:
    """What must be seen of streams: work that nothing orders, and offload's steps, with each of its waits left out."""
    import torch

    from minitune.ops import swiglu

    kept = []

    def run(use: Callable[[Any, Any], object]) -> dict[str, Any]:
        with device.fake_gpu() as watch:
            x, side = torch.ones(1000, device="cuda"), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            use(x, side)
            order.synchronize()
            return {"races": watch.order.races}

    def read_there_written_here(x: Any, side: Any) -> None:
        with torch.cuda.stream(side):
            kept.append(x * 2)
        x.add_(1)

    def read_on_both(x: Any, side: Any) -> None:
        with torch.cuda.stream(side):
            kept.append(x * 2)
        kept.append(x * 3)

    def given_back(x: Any, side: Any) -> None:
        y = x * 2
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            kept.append(y * 2)

    def read_by_the_host(x: Any, side: Any) -> None:
        y = torch.empty(1000, pin_memory=True)
        y.copy_(x, non_blocking=True)
        y.sum()

    def read_by_the_host_in_time(x: Any, side: Any) -> None:
        y, done = torch.empty(1000, pin_memory=True), torch.cuda.Event()
        y.copy_(x, non_blocking=True)
        done.record()
        done.synchronize()
        y.sum()

    def written_by_a_kernel(x: Any, side: Any) -> None:
        pair = x.new_ones(8, 64, dtype=torch.bfloat16)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            kept.append(pair * 2)
        swiglu.backward(x.new_ones(8, 32, dtype=torch.bfloat16), pair, overwrite=True)

    for use in (read_there_written_here, read_on_both, given_back, read_by_the_host, read_by_the_host_in_time,
                written_by_a_kernel):
        report(use.__name__, run, use)
    _parked(folder)


def _parked(folder: Path) -> None:
    """Offload's steps, whole and with each of its waits left out."""
    from minitune.model.offload import Parking

    report("offload", _step, folder, memory="offload")
    for left_out in ("wait_stream", "wait_event"):
        with mock.patch.object(order.Stream, left_out, lambda *_: None):
            report(f"offload without {left_out}", _step, folder, memory="offload")
    with mock.patch.object(Parking, "_let_go", lambda self: setattr(self, "_leaving", None)):
        report("offload that gives back at once", _step, folder, memory="offload")


def memory(_: Path) -> None:
    """QLoRA steps of a 7B model, as benchmarks/fake_gpu/memory.py counts them."""
    from benchmarks.fake_gpu.memory import Case, count

    for policy in ("full", "offload"):
        report(policy, count, Case("Llama-2-7B", "nf4-dq", (2048,), policy, "8bit"))
    report("parking", parking)


def launches(folder: Path, arch: int, everything: bool) -> None:
    """What Triton kernels are launched as, in steps of models of true sizes, or in all runs that are here, compiled for
    a generation of GPUs."""
    from benchmarks.fake_gpu.launches import Launches
    from benchmarks.fake_gpu.memory import CASES, Case, count

    few = (Case("Llama-2-7B", None, (2048,) * 8, "keep", "fp32"), Case("Llama-3-8B", "nf4-dq", (8192,), "full", "8bit"),
           Case("Llama-3.2-1B", None, (2048,) * 4, "keep", "fp32", "full"))
    kernels = Launches(arch)
    with mock.patch.object(device, "fake_gpu", functools.partial(device.fake_gpu, kernels=kernels)):
        for case in CASES if everything else few:
            report(f"{case.model}, {case.quant}, {case.memory}, {case.moments}, {case.train}", count, case)
        if everything:
            steps(folder)
            uses(folder)
    for launch in kernels.found.values():
        report(launch.name, lambda launch=launch: {"faults": launch.faults(arch)})


def parking() -> dict[str, Any]:
    """Which of three parked tensors are still held by the parking: after each is parked, and after a fetch."""
    import torch

    from minitune.model.offload import Parking

    place, held, seen, tickets = Parking(), [], [], []
    with device.fake_gpu():
        for _ in range(3):
            x = torch.zeros(1000, device="cuda")
            held.append(weakref.ref(x))
            tickets.append(place.park(x))
            del x
            seen.append([each() is not None for each in held])
        place.fetch(tickets[-1], last=True)
    return {"held": [*seen, [each() is not None for each in held]]}


def report(name: str, run: Callable[..., dict[str, Any]], *args: Any, **options: Any) -> None:
    try:
        found = run(*args, **options)
    except Exception as failure:
        found = {"error": f"{type(failure).__name__}: {str(failure)[:300]}", "trace": traceback.format_exc()[-4000:]}
    print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    device.load(sys.argv[1])
    groups = {"steps": steps, "uses": uses, "faults": faults, "streams": streams, "memory": memory,
              **{f"launches on {arch}{' of all' * everything}": functools.partial(launches, arch=arch,
                                                                                   everything=everything)
                 for arch in (80, 89, 90, 100) for everything in (False, True)}}
    with tempfile.TemporaryDirectory() as place:
        groups[sys.argv[2]](Path(place))
    device.leave()
