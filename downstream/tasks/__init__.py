"""One file a task: `make_task(cfg)` returns its `downstream.task.Task`; its settings are `cfg.downstream.<file>`."""
