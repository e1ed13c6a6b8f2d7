"""Foundation model to image-conditioned tasks: what they share, and one file a task in `downstream.tasks`."""
