"""Evaluation: harness tasks, the authors' protocols, comparisons, sweeps, answers read from solutions."""
