"""minitune merge: a checkpoint onto either base, with the losses that it prints of base, adapter and merged model."""

import pytest

pytest.importorskip("tyro")
import minitune as mt
from minitune.cli import main
from tests.files import write_numbers


def test_an_adapter_of_4_bits_merges_onto_either_base_with_the_losses_that_are_said(tiny, tmp_path, capsys):
    data = write_numbers(tmp_path / "data.jsonl", range(12))
    flags = ["--device", "cpu", "--quant", "nf4-dq"]
    main(["train", str(tiny), str(data), "--out", str(tmp_path / "run"), "--tokens", "64", "--max-steps", "4",
          "--lr", "1e-2", "--max-new-tokens", "1", "--dtype", "float32", *flags])
    adapter = str(tmp_path / "run" / "adapter")
    capsys.readouterr()
    for onto in ("loaded", "original"):
        main(["merge", str(tiny), adapter, str(tmp_path / onto), "--onto", onto, "--data", str(data), "--tokens",
              "64", "--dtype", "float32", *flags])
        losses = [float(line.split()[1].rstrip(":")) for line in capsys.readouterr().out.splitlines()
                  if line.startswith("loss")]
        base, on_loaded, on_original, merged = losses
        assert min(on_loaded, on_original, merged) < base - 0.01, "the adapter has learned"
        own, other = (on_loaded, on_original) if onto == "loaded" else (on_original, on_loaded)
        assert abs(merged - own) < 0.2 * abs(own - other) + 1e-4
        assert mt.load(tmp_path / onto, device="cpu").tokenizer.encode("a")
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(tiny), adapter, str(tmp_path / "loaded")])
    assert ended.value.code == 2 and "exists already" in capsys.readouterr().err
