"""What a backbone is worth."""
