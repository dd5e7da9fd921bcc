"""The stages that scripts/evaluate_stages.py measures."""
