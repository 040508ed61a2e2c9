"""Judging agents and policies: returns, open-loop errors, comparisons, figures, and watching."""
