"""The parts of scripts/doctor.py: the machine, and the estimates for the presets."""
