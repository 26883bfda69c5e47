"""The demo: our own small base model is asked ten questions, fine-tuned on our own facts, and asked again."""
