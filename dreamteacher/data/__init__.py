"""Pictures and labels, from disk to tensors."""
