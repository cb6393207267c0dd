"""What the CPU implementations share: threads, matrix products, passes over rows of logits."""
