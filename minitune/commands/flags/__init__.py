"""Between a command's dataclasses and its command line: the flags they make, --config files, help and suggestions."""
