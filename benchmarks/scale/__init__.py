"""One GPU against several: tokens per second, memory, losses and checkpoints by DDP and FSDP2."""
