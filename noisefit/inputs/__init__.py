"""What goes in: files of questions, prompts, batches, models."""
