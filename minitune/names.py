"""Names: what other trainers call our settings, and the known name that a mistyped one is meant to be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

ELSEWHERE = {
    "learning_rate": "lr", "lora_r": "rank", "lora_rank": "rank", "r": "rank", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "target_modules": "targets", "lora_target": "targets", "use_rslora": "rslora",
    "use_dora": "dora", "num_train_epochs": "epochs", "num_epochs": "epochs", "n_epochs": "epochs",
    "max_seq_length": "tokens", "max_seq_len": "tokens", "max_length": "tokens", "cutoff_len": "tokens",
    "sequence_len": "tokens", "block_size": "tokens", "gradient_accumulation_steps": "micro_batches",
    "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "warmup_ratio": "warmup", "warmup_steps": "warmup",
    "max_grad_norm": "clip", "optim": "optimizer", "output_dir": "out", "out_dir": "out", "load_in_4bit": "quant",
    "quantize": "quant", "model": "base", "model_name": "base", "model_name_or_path": "base", "base_model": "base",
    "dataset": "data", "train_file": "data",
    "batch_size": "tokens", "per_device_train_batch_size": "tokens", "micro_batch_size": "tokens",
    "learning_rate_multiplier": "lr", "val_set_size": "valid_split", "val_size": "valid_split",
    "validation_split": "valid_split", "val_file": "valid", "validation_file": "valid", "logging_steps": "log_every",
    "eval_steps": "evaluate_every", "save_steps": "save_every", "save_interval": "save_every",
    "early_stopping_patience": "patience", "early_stopping": "patience", "pref_beta": "beta", "dpo_beta": "beta",
    "loss_type": "objective", "pref_loss": "objective", "stage": "objective"}
"""Settings as PEFT, transformers, Unsloth, LitGPT, Axolotl, LLaMA-Factory and OpenAI call them -> as they are called
here. They are suggested, not taken: their units differ (a batch of sequences there, tokens here)."""

ARGUMENTS_ELSEWHERE = {
    "load_in_4bit": "quant", "quantization_config": "quant", "torch_dtype": "dtype", "device_map": "device",
    "peft_config": "lora", "use_gradient_checkpointing": "memory", "do_sample": "temperature", "num_beams":
    "temperature", "max_length": "max_new_tokens", "max_tokens": "max_new_tokens", "max_completion_tokens":
    "max_new_tokens", "stop_strings": "stop", "stopping_criteria": "stop", "eos_token_id": "stop", "enable_thinking":
    "chat_template_kwargs", "input_ids": "ids"}
"""The same of the arguments of loading and generating."""
QUANTS_ELSEWHERE = {"int4": "nf4_dq", "4bit": "nf4_dq", "bnb.nf4": "nf4", "bnb.nf4_dq": "nf4_dq"}
COMMANDS_ELSEWHERE = {
    "finetune": "train", "fine_tune": "train", "finetune_lora": "train", "sft": "train", "dpo": "train",
    "generate": "complete", "predict": "complete", "eval": "evaluate", "merge_lora": "merge", "export": "merge",
    "benchmark": "bench"}
"""The same of values of quant, and of commands."""
ENTRIES_ELSEWHERE = {
    "FastLanguageModel": "mt.load(folder, lora=mt.LoRA())", "AutoModelForCausalLM": "mt.load(folder)",
    "get_peft_model": "mt.load(folder, lora=mt.LoRA())", "PeftModel": "mt.load(folder, adapter=folder)",
    "LoraConfig": "mt.LoRA", "BitsAndBytesConfig": 'mt.load(folder, quant="nf4-dq")', "AutoTokenizer":
    "mt.data.load_tokenizer(folder), or model.tokenizer", "Trainer": "mt.train(model, data)",
    "from_pretrained": "mt.load(folder)", "SFTTrainer": "mt.train(model, data)", "TrainingArguments": "mt.Training",
    "SFTConfig": "mt.Training", "DPOTrainer": 'mt.train(model, data, objective="dpo")', "DPOConfig": "mt.Training"}
METHODS_ELSEWHERE = {
    "print_trainable_parameters": "print(model)", "get_nb_trainable_parameters": "print(model)",
    "save_pretrained": "model.save_adapter(folder), or model.save_merged(folder) for the whole model",
    "merge_and_unload": "model.save_merged(folder)", "merge_adapter": "model.save_merged(folder)",
    "save_pretrained_merged": 'model.save_merged(folder, onto="original")',
    "disable_adapter": "model.adapter_disabled()", "load_adapter": "mt.load(base, adapter=folder)",
    "gradient_checkpointing_enable": 'mt.load(base, memory="full")',
    "push_to_hub": "model.save_merged(folder), then `hf upload`"}
"""Methods of models in PEFT, transformers and Unsloth -> what is said here."""
TOKENIZER_ELSEWHERE = {
    "apply_chat_template": "encode_chat(messages), or model.chat(messages) for the answer",
    "batch_encode_plus": "encode_many(texts)", "encode_plus": "encode(text)", "tokenize": "encode(text)",
    "batch_decode": "decode(ids), for each", "convert_tokens_to_ids": "id_of(token)", "convert_ids_to_tokens":
    "token(id)", "eos_token_id": "eos_id", "bos_token_id": "bos_id", "pad_token_id": "pad_id", "unk_token_id": "unk_id",
    "pad_token": "pad_id", "eos_token": "eos_id", "all_special_ids": "control_ids", "from_pretrained":
    "mt.data.load_tokenizer(folder)"}
"""The same of tokenizers in transformers."""


ALIKE = 0.7
"""Share of two names that must agree (difflib's ratio) for one to be taken for a misspelling of the other."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely meant to be, or None. Hyphens and case do not count."""
    names = {each.lower().replace("-", "_"): each for each in known}
    plain = name.lower().replace("-", "_")
    for elsewhere in (ELSEWHERE, ARGUMENTS_ELSEWHERE, QUANTS_ELSEWHERE, COMMANDS_ELSEWHERE):
        if elsewhere.get(plain) in names:
            return names[elsewhere[plain]]
    close = get_close_matches(plain, names, n=1, cutoff=ALIKE)
    return names[close[0]] if close else None


def nearest_path(path: Path) -> str:
    """" (did you mean …?)" of a file or folder that lies where `path` does not, if one is called alike."""
    try:
        close = get_close_matches(path.name, filter(str.isprintable, os.listdir(path.parent)), n=1, cutoff=ALIKE)
    except (OSError, ValueError):       # ValueError: a name with a null byte
        return ""
    return f" (did you mean {path.with_name(close[0])}?)" if close else ""


def unknown_names(names: Iterable[str], known: Iterable[str]) -> str:
    """What a message says of names that are not known: each, with the one here that it is meant to be, if there is
    one."""
    known = list(known)
    said = []
    for name in sorted(names):
        meant = nearest(name, known)
        unit = ", counted in tokens" if meant == "tokens" and "batch" in name else ""
        said.append(f"{name} (here: {meant}{unit})" if meant else name)
    return ", ".join(said)
