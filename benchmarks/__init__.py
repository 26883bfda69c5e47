"""What minitune is measured by: against its rivals, against the machine's limit, and on a GPU."""
