"""Pre-training objectives that need more than representations: RetroMAE and MNTP."""
