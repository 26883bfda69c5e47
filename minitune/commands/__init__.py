"""The commands of the command line, one file each: a dataclass whose fields are the flags, and what it runs."""
