"""The commands of the command line, one file each: a dataclass whose fields are the flags, and what it runs."""

COMMANDS = {
    "demo": ("Demo", "fine-tune a small shipped model on minitune's own facts, and check what it learned"),
    "init": ("Init", "write a checkpoint with random weights in a named shape"),
    "inspect": ("Inspect", "show what training would see of a data file"),
    "train": ("Train", "fine-tune a checkpoint folder on your data"),
    "evaluate": ("Evaluate", "measure loss, perplexity and accuracy on held-out data, base beside adapter"),
    "complete": ("Complete", "let a model continue a text"),
    "chat": ("Chat", "talk with a model through its chat template"),
    "merge": ("Merge", "add an adapter into its base: one folder for transformers, vLLM or further training"),
    "doctor": ("Doctor", "say what this machine has and lacks, and check every op on it"),
    "bench": ("Bench", "measure how fast training is on this machine, with a model or a shape"),
    "tune": ("Tune", "measure the fastest way of each op on this GPU"),
}
"""Name -> (class in the file of that name, what it does), in the order of a user's way. It stands here so that the list
of commands is there without loading torch."""
