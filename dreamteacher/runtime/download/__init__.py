"""Files from elsewhere, whole, checked and resumed."""
