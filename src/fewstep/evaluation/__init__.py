"""Evaluation: figures and reports."""
