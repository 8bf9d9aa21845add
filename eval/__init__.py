"""Evaluation: loss by position, RULER, generation, reports."""
