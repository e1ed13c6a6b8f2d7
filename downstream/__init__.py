"""Foundation model to super-resolution and semantic image synthesis."""
