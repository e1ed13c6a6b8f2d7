"""What every stage stands on: command line, cached stages, tracking, progress, workers, errors, launch."""
