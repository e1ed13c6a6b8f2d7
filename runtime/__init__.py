"""Infrastructure that all stages share: command line, cached stages, tracking, progress, workers, errors, launch."""
