"""Evaluation: tasks of lm-evaluation-harness, the authors' protocols, comparisons, sweeps, answers read from solutions."""
