"""What ties the stages together: reproduce, tables, sweeps, benchmarks."""
