"""Wrong folders: what each is, and what to do, in one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitune.checkpoint.adapter_reader import read_adapter
from minitune.checkpoint.files import read_json_object
from minitune.checkpoint.hf_config import read_config
from minitune.checkpoint.reader import Checkpoint
from minitune.errors import InputError

NO_CONFIG = r"model/config\.json: there is no such file; "
NO_WEIGHTS = r"model: holds neither model\.safetensors nor model\.safetensors\.index\.json; "
MODELS: dict[str, tuple[list[str], str]] = {
    "gguf": (["m.Q4_K.GGUF"], NO_CONFIG + r"GGUF \(\['m\.Q4_K\.GGUF'\]\) is not read; fetch .* in safetensors"),
    "pickles": (["pytorch_model.bin"], NO_CONFIG + r"fetch the model again in safetensors; pickles"),
    "weights alone": (["model.safetensors", "training_args.bin"], NO_CONFIG + "fetch it into the folder"),
    "nothing": ([], NO_CONFIG + "fetch it into the folder"),
    "adapter": (["adapter_config.json"], NO_CONFIG + "it is a PEFT adapter; give its base model here"),
    "one level too high": (["tiny/config.json"], NO_CONFIG + r"did you mean \S+model/tiny\?"),
    "cache": (["snapshots/0123/config.json", "refs/main"], NO_CONFIG + r"did you mean \S+model/snapshots/0123\?"),
}
WEIGHTS: dict[str, tuple[list[str], str]] = {
    "gguf": (["m.gguf"], NO_WEIGHTS + r"GGUF \(\['m\.gguf'\]\) is not read"),
    "pickles": (["pytorch_model.bin"], NO_WEIGHTS + "its weights are pickles .* convert it to safetensors"),
    "a shard": (["model-1-of-2.safetensors", "optimizer.pt"], NO_WEIGHTS + r"it has .*; fetch what is missing"),
    "adapter": (["adapter_model.safetensors"], NO_WEIGHTS + "it is a PEFT adapter"),
    "nothing": ([], NO_WEIGHTS + "fetch the weights into the folder"),
}
NO_ADAPTER = r"model/adapter_config\.json: there is no such file; "
ADAPTERS: dict[str, tuple[list[str], str]] = {
    "one level too high": (["adapter/adapter_config.json", "loss.png"], NO_ADAPTER + r"did you mean \S+/adapter\?"),
    "many": ([f"{i}/adapter_config.json" for i in "1234"], NO_ADAPTER + r"did you mean \S+/2 or \S+/3 or \S+/4\?"),
    "model": (["config.json"], NO_ADAPTER + "the folder holds a model, not an adapter; give it as the base"),
    "a run": (["config.json", "environment.json"], NO_ADAPTER + "it is the folder of a run that kept no adapter"),
    "nothing": ([], NO_ADAPTER + "give the folder that `minitune train` wrote"),
}


def holding(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("case", MODELS)
def test_a_folder_without_a_config(case: str, tmp_path: Path) -> None:
    names, message = MODELS[case]
    with pytest.raises(InputError, match=message) as error:
        read_config(holding(tmp_path / "model", names))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_folder_without_weights(case: str, tmp_path: Path) -> None:
    names, message = WEIGHTS[case]
    with pytest.raises(InputError, match=message) as error:
        Checkpoint.open(holding(tmp_path / "model", names))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_folder_without_an_adapter(case: str, tmp_path: Path) -> None:
    names, message = ADAPTERS[case]
    with pytest.raises(InputError, match=message) as error:
        read_adapter(holding(tmp_path / "model", names))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "modles/tiny", "tinny", "./tiny/x/y", "a\0b"])
def test_a_name_is_no_folder_and_nothing_is_downloaded(name: str, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        read_config(name)
    message = str(error.value)
    assert message.startswith(f"{Path(name)}: there is no such folder; a model is read from a local folder")
    assert "nothing is downloaded" in message and "correct the path" in message
    if name.startswith("meta"):
        assert message.endswith(": hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B")
    assert ("hf download" in message) is (name in ("meta-llama/Llama-3.2-1B", "modles/tiny"))
    with pytest.raises(InputError, match="there is no such folder; give the folder of a PEFT adapter"):
        read_adapter(name)


def test_a_mistyped_folder_is_answered_with_the_one_that_lies_there(tmp_path: Path) -> None:
    (tmp_path / "my-llama").mkdir()
    for read in (read_config, read_adapter):
        with pytest.raises(InputError, match=rf"there is no such folder \(did you mean {tmp_path / 'my-llama'}\?\); "):
            read(tmp_path / "my-lama")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    for read in (read_config, read_adapter):
        with pytest.raises(InputError, match=r"config\.json: is a file; give the folder that holds it"):
            read(path)


def test_a_pointer_in_place_of_json(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match=r"index\.json: is a Git LFS pointer, not the file itself.*git lfs pull"):
        read_json_object(path)
