"""The command minitune evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from minitune.commands.flags.groups import Reading
from minitune.config import ObjectiveName, Quant, Training
from minitune.errors import InputError


@dataclass(frozen=True)
class Evaluate(Reading):
    """Loss, perplexity and token accuracy on the trained tokens of a data file, the base beside its adapter; or how
    often the adapter prefers the chosen answer of a pair."""

    base: Positional[Path]
    """Hugging Face folder."""
    data: Positional[Path]
    """Held-out samples, in any format that training takes."""
    adapter: Path | None = None
    """PEFT adapter folder; its figures stand beside those of the base alone."""
    objective: ObjectiveName = "sft"
    """dpo: the data is pairs, and the adapter is measured by their loss against the base."""
    beta: float = Training.beta
    """dpo: as train's."""
    quant: Quant | None = None
    """nf4 or nf4-dq (double quantisation): the base's linears in 4 bits."""
    device: str | None = None
    """cuda or cpu; by default the GPU if there is one."""
    dtype: str | None = None
    """bfloat16 or float32; by default the one that the device is good at."""

    def run(self) -> None:
        from minitune.api import load
        from minitune.data.stream import stream
        from minitune.objectives import named, takes_pairs
        from minitune.objectives.dpo import DPO
        from minitune.objectives.evaluate import evaluate
        from minitune.report.progress import reading
        from minitune.report.tables import print_table

        objective = named(Training(objective=self.objective, beta=self.beta))
        pairs = takes_pairs(objective)
        if pairs and self.adapter is None:
            raise InputError("evaluate: the objective dpo compares an adapter with the base; name it, --adapter FOLDER")
        fields = self.fields()
        model = load(self.base, device=self.device, dtype=self.dtype, quant=self.quant, adapter=self.adapter,
                     chat_template_kwargs=self.template_kwargs())
        batches = stream(self.data, model.tokenizer, tokens=self.tokens, shuffle=False, field_map=fields,
                         long=self.long, progress=reading(), pairs=pairs)
        samples = f"{batches.n_documents:,} sample{'' if batches.n_documents == 1 else 's'}"
        title = f"{self.data}: {batches.n_trained:,} trained tokens of {samples}"
        if isinstance(objective, DPO):
            seen = objective.evaluate(model, batches)
            print_table(title, ["", "adapter"], [
                [f"loss (a pair, beta {self.beta:g})", f"{seen.loss:.4f}"],
                ["chosen answer ahead", f"{seen.accuracy:.2%}"],
                ["chosen answer over the base (nats)", f"{seen.chosen:+.2f}"],
                ["rejected answer over the base (nats)", f"{seen.rejected:+.2f}"]])
            return
        with model.adapter_disabled():
            found = [evaluate(model, batches)]
        if self.adapter is not None:
            found.append(evaluate(model, batches))
        rows = [["loss (nats a token)", *(f"{each.loss:.4f}" for each in found)],
                ["perplexity", *(f"{each.perplexity:,.3f}" for each in found)],
                ["token accuracy", *(f"{each.accuracy:.2%}" for each in found)]]
        print_table(title, ["", "base", "adapter"][: 1 + len(found)], rows)
