"""Images or pipelines to metrics, convergence curves, tables and reports."""
