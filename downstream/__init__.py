"""Image-conditioned tasks on a foundation model: shared code, and one file per task in `downstream.tasks`."""
