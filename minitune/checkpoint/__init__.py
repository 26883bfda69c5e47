"""Files of others and our own: safetensors, Hugging Face configs, PEFT adapters."""
