"""Data, losses, optimizers and loops for pretraining and fine-tuning."""
