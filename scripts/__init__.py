"""Commands that combine the stages: reproduction, tables, sweeps, benchmarks."""
