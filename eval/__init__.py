"""Evaluation: answers read from solutions."""
