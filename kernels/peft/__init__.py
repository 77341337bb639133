"""peft: a dense base and a LoRA adapter, for fine-tuning."""
