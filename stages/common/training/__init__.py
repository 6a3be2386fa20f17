"""QLoRA training: the loss, the trainer, its checkpoints and what it leaves behind."""
