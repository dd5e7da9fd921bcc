"""The commands of scripts/convert_model.py."""
