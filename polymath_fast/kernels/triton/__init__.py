"""What the Triton implementations share: row passes, the LM head, and the list of all kernels."""
