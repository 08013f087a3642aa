"""The DeepSeek-V3 model family. Knows torch; knows nothing of Ray, DeepSpeed, W&B or training stages."""
