"""What a model is worth (probes, finetuning) and what a round costs a client."""
