"""The tasks, one file each: `make_task(cfg)` returns a `downstream.task.Task` from `cfg.downstream.<file>`."""
