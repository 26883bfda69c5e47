"""The command minitune merge."""

from __future__ import annotations

import json
import shlex
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tyro.conf import Positional

from minitune.commands.flags.declared import Given
from minitune.commands.flags.groups import Reading
from minitune.config import Onto, Quant
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.api import Model


@dataclass(frozen=True)
class Merge(Reading):
    """Add an adapter into its base: a checkpoint folder for transformers, vLLM or further training."""

    base: Positional[Path]
    """Hugging Face folder that the adapter was trained on."""
    adapter: Positional[Path]
    """PEFT adapter folder."""
    out: Positional[Path]
    """Folder to write; it must not exist yet, or be empty."""
    quant: Quant | None = None
    """nf4 or nf4-dq, if the adapter was trained on the base in 4 bits."""
    onto: Onto = "loaded"
    """In 4 bits: loaded merges into the decoded weights, which the adapter was trained on, original into the 16-bit
    weights of the folder."""
    data: Path | None = None
    """Held-out samples, in any format that training takes: prints the loss on them of the base, of the adapter (in 4
    bits on either base) and of what was written."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32 to compute in; by default the one that the device is good at. The files keep the base's."""

    given: ClassVar[Given] = frozenset()

    def run(self) -> None:
        from minitune.api import load
        from minitune.checkpoint.hf_config import is_prequantized
        from minitune.report.folder import check_free

        idle = sorted(name for (name, *_) in self.given if name in Reading.__dataclass_fields__)
        if self.data is None and idle:
            raise InputError(f"merge: {' and '.join(idle)} say how --data is read, and there is no --data; give it, or "
                             "leave them out")
        self.fields()
        check_free(self.out)
        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, adapter=self.adapter,
                     chat_template_kwargs=self.template_kwargs())
        kwargs = dict(model.tokenizer.chat_template_kwargs) if model._tokenizer is not None else {}
        if self.data is not None:
            with model.adapter_disabled():
                self._say("the base without the adapter", model)
            self._say("the adapter on the base as it was loaded", model)
        model.save_merged(self.out, self.onto)
        in_4bit = bool(model.network.nf4_shapes())
        del model
        print(f"merged model in {self.out}, weights in {_dtypes(self.out)}, as the base's own")
        if kwargs:
            given = shlex.join(f"{name}={json.dumps(value)}" for name, value in kwargs.items())
            print(f"it keeps no settings of its chat template; give them again: --chat-template-kwargs {given}")
        if self.data is None:
            return
        if in_4bit and not is_prequantized(self.base):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")     # that it was trained on another base is what the line says
                model = load(self.base, device=self.device, dtype=self.dtype, adapter=self.adapter,
                             chat_template_kwargs=kwargs)
            self._say("the adapter on the 16-bit base", model)
        self._say("the merged model", load(self.out, device=self.device, dtype=self.dtype,
                                           chat_template_kwargs=kwargs))

    def _say(self, what: str, model: Model) -> None:
        from minitune.data.stream import stream
        from minitune.objectives.evaluate import evaluate

        assert self.data is not None
        found = evaluate(model, stream(self.data, model.tokenizer, tokens=self.tokens, shuffle=False,
                                       field_map=self.fields(), long=self.long))
        print(f"loss {found.loss:.4f}: {what}")


def _dtypes(folder: Path) -> str:
    """The dtypes of a checkpoint's tensors, that of the most first."""
    from minitune.checkpoint.reader import Checkpoint

    with Checkpoint.open(folder) as written:
        found = Counter(str(written.info(name).dtype).removeprefix("torch.") for name in written.names())
    return " and ".join(name for name, _ in found.most_common())
