"""RULER: synthetic long-context tasks, generated, run and scored exactly as published."""
