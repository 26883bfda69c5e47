"""What was promised of a GPU, judged from the rows of a run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu_attention, gpu_products
from benchmarks.tables_gpu import CASES, PRODUCTS, promises


def _product(product: str, step: str, variant: str, ms: float, each: int = 16) -> dict[str, Any]:
    return {"what": "product", "product": product, "pass": step, "variant": variant, "each": each, "floor_ms": 0.1,
            "ms": {"median": ms}, "right": True}


def _attention(backend: str, step: str, tflops: float, case: str = "a", **more: Any) -> dict[str, Any]:
    return {"what": "attention", "case": case, "backend": backend, "pass": step, "tflops": tflops, "right": True,
            "repeats": True, **more}


def _judged(**parts: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """what -> (figure, verdict)."""
    found = promises({name: {"rows": rows} for name, rows in parts.items()})
    return {row[0]: (row[1], row[3]) for row in found}


def test_what_is_judged_is_what_is_measured() -> None:
    assert [case[0] for case in gpu_attention.CASES] == list(CASES)
    assert [shape[0] for shape in gpu_products.SHAPES] == list(PRODUCTS)


def test_without_rows_nothing_is_measured_and_nothing_met() -> None:
    found = _judged()
    assert len(found) == 20 and set(found.values()) == {("void", "not measured")}


def test_lora_is_the_fastest_way_of_each_product_summed_over_a_layer() -> None:
    rows = [_product(name, "forward", variant, ms) for name, bare in zip(PRODUCTS, (2.0, 1.0, 4.0, 3.0), strict=True)
            for variant, ms in (("bare", bare), ("addmm", 1.1 * bare), ("Triton", 1.03 * bare),
                                ("augmented, tail by the producer", bare))]
    name = "LoRA of rank 16, forward: % added to the time of a layer's products"
    assert _judged(products=rows)[f"{name} (at the least 4.0)"] == ("3.00", "met")
    rows[2]["ms"]["median"] = 3.0       # that of qkv by Triton: addmm is faster now
    assert _judged(products=rows)[f"{name} (at the least 4.0)"] == ("4.40", "short")
    augmented = [_product(name, "forward", "augmented, S as a product", 1.0) for name in ("o", "down")]
    assert _judged(products=[*rows, augmented[0]])[f"{name} (at the least 4.0)"] == ("4.40", "short")   # o: never
    assert _judged(products=[*rows, augmented[1]])[f"{name} (at the least 4.0)"][1] == "met"
    assert _judged(products=rows[:-4])[name][1] == "not measured"       # cut off before the last product
    del rows[4]["ms"]       # one product's bare time is missing: no sum
    assert _judged(products=rows)[name][1] == "not measured"


def test_attention_counts_by_its_worst_case_and_a_backward_that_repeats() -> None:
    rows = [_attention(backend, "forward", rate, case) for case in CASES for backend, rate in (
        ("sdpa cudnn, one batch", 100), ("minitune", 60 if case == CASES[-1] else 70), ("dispatch", 99))]
    kernel = "attention forward: our kernel of cuDNN's rate"
    assert _judged(attention=rows)[kernel] == ("0.60", "short")
    assert _judged(attention=rows[:-3])[kernel][1] == "not measured"       # cut off before the last case
    assert _judged(attention=rows)["attention forward: the dispatch of the best that is allowed"] == ("0.99", "met")
    ways = (("dispatch", "backward", 50, True), ("minitune", "backward, deterministic", 51, True),
            ("sdpa cudnn, one batch", "backward, deterministic", 90, False))
    back = [_attention(backend, step, rate, case, repeats=repeats) for case in CASES
            for backend, step, rate, repeats in ways]
    dispatch = "attention backward: the dispatch of the best that is allowed"
    assert _judged(attention=back)[dispatch] == ("0.98", "met")
    back[2]["repeats"] = True
    assert _judged(attention=back)[dispatch][1] == "short"
    back[2]["repeats"] = back[0]["repeats"] = False
    assert _judged(attention=back)[dispatch][1] == "not measured"


@pytest.mark.parametrize(("right", "verdict"), [(True, "met"), (False, "not measured")])
def test_a_step_that_is_wrong_is_not_measured(right: bool, verdict: str) -> None:
    rows = [{"what": "step", "case": f"{quant}, 8 x 2048, memory auto", "tokens_per_s": {"median": rate, "n": 5},
             "right": right} for quant, rate in (("bf16", 20_500.0), ("nf4-dq", 19_900.0))]
    peers = [{"what": "peer", "side": side, "tokens_per_s": {"median": rate, "n": 4}, "right": right}
             for side, rate in (("minitune", 20_000.0), ("peft", 9_000.0), ("peft compiled", 12_000.0))]
    found = _judged(step=rows, peers=peers)
    assert found["Llama-2-7B, LoRA, 8 x 2048: tokens/s"][1] == verdict
    assert found["QLoRA over LoRA, the same step"] == (("0.97", "met") if right else ("void", verdict))
    assert found["the step over transformers + PEFT's"] == (("1.67", "met") if right else ("void", verdict))


def test_ops_the_head_and_a_layer() -> None:
    ops = [{"what": "op", "op": op, "variant": "minitune", "share_of_copy": share, "right": op != "rope"}
           for op, share in (("rms_norm with the sum", 0.9), ("rms_norm backward with the sum", 0.84), ("adamw", 0.86),
                             ("rope", 0.95))]
    ops.append({"what": "over", "op": "linear_cross_entropy", "over": 1.04, "right": True})
    layer = [{"what": "layer", "case": "8 x 2048, bf16", "share_of_rate": 0.75, "right": True},
             {"what": "layer", "case": "8 x 2048, nf4-dq", "share_of_rate": 0.6, "right": True}]
    found = _judged(ops=ops, layer=layer)
    assert found["rms_norm: share of the copy rate"] == ("0.84", "short")
    assert found["adamw: share of the copy rate"] == ("0.86", "met")
    assert found["rope: share of the copy rate"] == ("void", "not measured")       # it was wrong
    assert found["linear_cross_entropy over its two products"] == ("1.04", "met")
    assert found["one layer: share of the matrix rate"] == ("0.75", "met")
